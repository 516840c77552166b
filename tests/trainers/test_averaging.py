"""Sums of products."""

import torch

from nnmosaic.trainers.averaging import inner_product


def test_inner_product_has_the_dtype_of_the_second_factor() -> None:
    one = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    other = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = inner_product(one, other)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, (one.double() * other).sum(), rtol=1e-12, atol=0)
    assert inner_product(other, one).dtype == torch.float32


def test_of_a_large_inner_product_the_value_is_near_and_the_gradient_exact() -> None:
    one, other = torch.rand(2, 10_000_000, generator=torch.Generator().manual_seed(2))
    expected = (one.double() * other.double()).sum().item()
    found = inner_product(one.requires_grad_(), other)
    assert abs(found.item() / expected - 1) < 2e-4
    found.backward()
    assert one.grad is not None
    assert torch.equal(one.grad, other)
