"""Source heads: what they predict, and when the main head must agree with them."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nnmosaic.trainers.self_disambiguation.source_heads import (
    SourceHeads,
    consistency_loss,
    own_label_loss,
)

# A: class 1 and 2; B: 1 and 2 merged, and 3. Four classes with the background.
TABLES = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 3]])
GROUPS = [[0, 1, 2], [0, 1, 3]]


def log(rows: list[list[float]]) -> Tensor:
    """Return log-probabilities, shape (groups, voxels)."""
    return torch.tensor(rows, dtype=torch.float64).log().T


def test_a_head_has_the_labels_of_its_source() -> None:
    heads = SourceHeads(5, TABLES.tolist())
    assert heads.groups == GROUPS
    weight, bias = heads.linear.weight, heads.linear.bias
    for size, convolution in (((3, 4), functional.conv2d), ((3, 4, 5), functional.conv3d)):
        features = torch.randn(2, 5, *size)
        expected = convolution(features, weight.view(6, 5, *[1] * len(size)), bias)
        own, asked = heads(features, [0, 1], [1, None])
        torch.testing.assert_close(own[0], expected[0, :3])
        torch.testing.assert_close(own[1], expected[1, 3:])
        torch.testing.assert_close(asked[0], expected[0, 3:])
        assert own[0].requires_grad
        assert not asked[0].requires_grad


def test_each_sample_teaches_its_own_head() -> None:
    heads = [log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]) for _ in range(2)]
    target = torch.tensor([[[1, 2]], [[3, 9]]])
    value = own_label_loss(heads, GROUPS, target, [0, 1])
    expected = -(math.log(0.25) + math.log(0.1) + math.log(0.25)) / 3
    assert value.item() == pytest.approx(expected)
    heads[0].requires_grad_()  # under DDP every process must reach the heads
    nothing = own_label_loss(heads, GROUPS, target, [None, None])
    assert nothing.item() == 0.0
    assert nothing.requires_grad


def test_agreement_is_asked_where_the_label_leaves_it_open() -> None:
    # A sample of source A: voxel 0 is "background or 3", voxel 1 is class 1. What the head of B
    # says about "1 or 2" does not count at voxel 0: the label excludes it.
    target = torch.tensor([[[0, 1]]])
    head = log([[0.2, 0.1, 0.7], [0.1, 0.8, 0.1]])
    logits = torch.tensor([[0.4, 0.1, 0.2, 0.3]] * 2, dtype=torch.float64).log().T[None]
    logits.requires_grad_()
    value = consistency_loss([head], logits, TABLES, target, TABLES[:1], [1])
    told, found = (0.2 / 0.9, 0.7 / 0.9), (0.4 / 0.7, 0.3 / 0.7)
    expected = sum(h * math.log(h / q) for h, q in zip(told, found, strict=True))
    assert value.item() == pytest.approx(expected)
    (g,) = torch.autograd.grad(value, logits)
    assert g[..., 1].abs().max().item() == 0.0
    assert g[0, 3, 0].item() < 0  # class 3 must grow, at the cost of the background alone
    assert g[0, [1, 2], 0].abs().max().item() == 0.0
    assert g[0, [0, 3], 0].sum().abs().item() < 1e-12


def test_ignored_voxels_are_open_and_no_gradient_goes_to_the_head() -> None:
    head = log([[0.2, 0.1, 0.7]]).requires_grad_()
    logits = torch.zeros(1, 4, 1, dtype=torch.float64, requires_grad=True)
    target = torch.full((1, 1, 1), 9)
    arguments = ([head], logits, TABLES, target, TABLES[:1])
    value = consistency_loss(*arguments, [1], ignore_label=9)
    value.backward()
    assert value.item() > 0
    assert head.grad is None
    assert consistency_loss(*arguments, [None], ignore_label=9).item() == 0.0


def test_a_main_head_that_agrees_costs_nothing() -> None:
    logits = torch.randn(1, 4, 6, dtype=torch.float64)
    p = torch.softmax(logits, 1)
    head = torch.stack((p[0, 0], p[0, 1] + p[0, 2], p[0, 3])).log()
    target = torch.zeros(1, 1, 6, dtype=torch.long)
    value = consistency_loss(
        [head, head], logits, TABLES, target, torch.zeros_like(TABLES[:1]), [1]
    )
    assert abs(value.item()) < 1e-12
