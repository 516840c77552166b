"""Reconstruction losses against slow oracles (spec section 6, group 9)."""

import math

import pytest
import torch
from torch import Tensor

from nnmosaic.trainers.context_reconstruction.loss import reconstruction_loss

FORMS = ("kl", "mse_prob", "rel_mse", "mse_over_norm")


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        2 * torch.randn(2, 3, 4, 5, generator=generator),
        2 * torch.randn(2, 3, 4, 5, generator=generator),
    )


def probabilities(z: Tensor, temperature: float) -> Tensor:
    e = (z / temperature).exp()
    return e / e.sum()


def slow_kl(s: Tensor, t: Tensor, temperature: float, where: Tensor | None = None) -> float:
    values = []
    for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in (2, 4, 5))).tolist():
        if where is None or where[b, 0, y, x]:
            p, q = (probabilities(z[b, :, y, x], temperature) for z in (s, t))
            values.append(sum(float(qc * math.log(qc / pc)) for pc, qc in zip(p, q, strict=True)))
    return temperature**2 * sum(values) / len(values)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_kl_equals_the_slow_loop(
    logits: tuple[Tensor, Tensor], temperature: float, masked: bool
) -> None:
    where = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    where = where if masked else None
    value = reconstruction_loss(*logits, form="kl", temperature=temperature, where=where)
    assert value.item() == pytest.approx(slow_kl(*logits, temperature, where), rel=1e-5)


def test_probabilities_of_regions_are_sigmoids(logits: tuple[Tensor, Tensor]) -> None:
    p, q = (z.sigmoid().double() for z in logits)
    bernoulli = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    value = reconstruction_loss(*logits, form="kl", regions=True)
    assert value.item() == pytest.approx(bernoulli.mean().item(), rel=1e-4)
    value = reconstruction_loss(*logits, form="mse_prob", regions=True)
    assert value.item() == pytest.approx((p - q).square().mean().item(), rel=1e-5)
    p, q = (z.softmax(1) for z in logits)
    value = reconstruction_loss(*logits, form="mse_prob")
    assert value.item() == pytest.approx((p - q).square().mean().item(), rel=1e-5)


def test_sizes_of_the_two_squared_differences(logits: tuple[Tensor, Tensor]) -> None:
    s, t = logits
    squared = (s - t).square().mean().item()
    relative = reconstruction_loss(s, t, form="rel_mse").item()
    released = reconstruction_loss(s, t, form="mse_over_norm").item()
    assert released == pytest.approx(squared / t.square().sum().sqrt().item(), rel=1e-5)
    assert relative == pytest.approx(squared / t.square().mean().item(), rel=1e-5)
    root_mean_square = t.square().mean().sqrt().item()
    assert relative / released == pytest.approx(math.sqrt(t.numel()) / root_mean_square, rel=1e-5)
    scaled = reconstruction_loss(7 * s, 7 * t, form="rel_mse").item()
    assert scaled == pytest.approx(relative, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("regions", [False, True])
def test_agreement_is_0_without_gradient_and_the_teacher_gets_none(
    form: str, regions: bool, logits: tuple[Tensor, Tensor]
) -> None:
    s, t = (z.clone().requires_grad_() for z in logits)
    apart = reconstruction_loss(s, t, form=form, regions=regions)
    assert apart.item() > 0
    apart.backward()
    assert t.grad is None
    assert s.grad.abs().max() > 0
    s.grad = None
    same = reconstruction_loss(s, s.detach().clone(), form=form, regions=regions)
    same.backward()
    assert same.item() == pytest.approx(0, abs=1e-7)
    assert s.grad.abs().max().item() < 1e-7


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_logits_are_compared_in_single(
    form: str, logits: tuple[Tensor, Tensor]
) -> None:
    s, t = (z.half() for z in logits)
    value = reconstruction_loss(s, t, form=form)
    assert value.dtype == torch.float32
    assert value.item() == reconstruction_loss(s.float(), t.float(), form=form).item()


def test_only_voxels_that_count_have_gradients(logits: tuple[Tensor, Tensor]) -> None:
    s, t = logits[0].requires_grad_(), logits[1]
    where = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    where[0, 0, 1] = True
    reconstruction_loss(s, t, form="kl", where=where).backward()
    assert torch.equal((s.grad != 0).any(1, keepdim=True), where)
    none = reconstruction_loss(s, t, form="kl", where=torch.zeros_like(where))
    assert none.item() == 0
