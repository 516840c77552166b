"""Entropy and teacher inside ambiguous groups: T2, T13 to T15 and golden numbers of the spec."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nnmosaic.trainers.self_disambiguation.ambiguity import OpenVoxels
from nnmosaic.trainers.self_disambiguation.loss import group_log_probabilities
from tests.trainers.self_disambiguation.golden import (
    COMPLETE,
    IGNORE,
    MERGED,
    PARTIAL,
    C,
    golden_logits,
    golden_target,
)


def limits(threshold: float, foreground_threshold: float) -> dict[str, float]:
    return {"threshold": threshold, "foreground_threshold": foreground_threshold}


def each_voxel(z: Tensor, y: Tensor, table: Tensor) -> Tensor:
    """Return the entropy of every voxel by itself, shape (B, *spatial)."""
    values = torch.zeros_like(z[:, 0])
    for b, *v in np.ndindex(*values.shape):
        here = (slice(b, b + 1), slice(None), *(slice(n, n + 1) for n in v))
        values[(b, *v)] = OpenVoxels(z[here], y[here], table[b : b + 1]).conditional_entropy()
    return values


def test_golden_entropies_and_chain_rule_t15() -> None:
    z, y = golden_logits(), golden_target()
    log_p = group_log_probabilities(z, PARTIAL)
    groups = -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(1)
    full = -(torch.softmax(z, 1) * torch.log_softmax(z, 1)).sum(1)
    # Entropy inside the background group, whatever the label of the voxel.
    inside = each_voxel(z, torch.zeros_like(y), PARTIAL)
    weighted = log_p[:, 0].exp() * inside
    assert (full - groups - weighted).abs().max().item() < 1e-12
    assert groups.mean().item() == pytest.approx(0.8709825387, abs=1e-9)
    assert weighted.mean().item() == pytest.approx(0.1711310644, abs=1e-9)
    assert weighted[1].abs().max().item() == 0.0
    ambiguous = y[0, 0] == 0
    assert weighted[0][ambiguous].mean().item() == pytest.approx(0.3413406308, abs=1e-9)
    assert OpenVoxels(z, y, PARTIAL).conditional_entropy().item() == pytest.approx(
        0.5627618612, abs=1e-9
    )


def test_chain_rule_t15_with_two_ambiguous_groups() -> None:
    z = golden_logits()[:1]
    table = torch.tensor([[0, 1, 1, 3, 0]])
    log_p = group_log_probabilities(z, table)
    groups = -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(1)
    full = -(torch.softmax(z, 1) * torch.log_softmax(z, 1)).sum(1)
    labels = torch.zeros(1, 1, *z.shape[2:], dtype=torch.long)
    inside = sum(log_p[:, c].exp() * each_voxel(z, labels + c, table) for c in (0, 1))
    assert (full - groups - inside).abs().max().item() < 1e-12


def test_t2_complete_sources_have_none() -> None:
    z, y = golden_logits(), golden_target(COMPLETE)
    assert OpenVoxels(z, y, COMPLETE).conditional_entropy().item() == 0.0
    assert OpenVoxels(z, y, COMPLETE).teacher_cross_entropy(z, **limits(0, 0)).item() == 0.0


def test_every_class_is_possible_at_an_ignored_voxel() -> None:
    z = golden_logits()
    y = torch.full_like(golden_target(), IGNORE)
    full = -(torch.softmax(z, 1) * torch.log_softmax(z, 1)).sum(1).mean()
    value = OpenVoxels(z, y, PARTIAL, ignore_label=IGNORE).conditional_entropy()
    assert value.item() == pytest.approx(full.item(), abs=1e-12)
    assert full.item() == pytest.approx(1.0421136032, abs=1e-9)


def test_entropy_does_not_see_how_likely_the_group_is() -> None:
    z, y = golden_logits(), golden_target()
    z.requires_grad_()
    (g,) = torch.autograd.grad(OpenVoxels(z, y, PARTIAL).conditional_entropy(), z)
    assert g[0, [1, 3]].abs().max().item() == 0.0
    assert g[0, [0, 2, 4]].sum(0).abs().max().item() < 1e-12


def slow_teacher(
    z: Tensor, t: Tensor, y: Tensor, table: Tensor, of_class: tuple[float, float]
) -> float:
    total, count = 0.0, 0
    for b, *v in np.ndindex(*y[:, 0].shape):
        label = int(y[(b, 0, *v)])
        classes = [c for c in range(C) if label in (IGNORE, int(table[b, c]))]
        if len(classes) < 2:
            continue
        count += 1
        goal, mine = (np.exp([float(x[(b, c, *v)]) for c in classes]) for x in (t, z))
        goal, mine = goal / goal.sum(), mine / mine.sum()
        best = int(goal.argmax())
        if goal[best] > of_class[classes[best] > 0]:
            total -= float((goal * np.log(mine)).sum())
    return total / count


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("table", [PARTIAL, MERGED])
@pytest.mark.parametrize("of_class", [(0.0, 0.0), (0.7, 0.7), (0.8, 0.4), (0.3, 0.9)])
def test_teacher_equals_the_slow_loop(
    table: Tensor, of_class: tuple[float, float], planar: bool
) -> None:
    z, y = golden_logits(), golden_target(table)
    y[:, :, 0] = IGNORE
    if planar:
        z, y = z[..., 2], y[..., 2]
    teacher = z.flip(1) * 1.3
    inside = OpenVoxels(z, y, table, ignore_label=IGNORE)
    value = inside.teacher_cross_entropy(teacher, **limits(*of_class)).item()
    assert value == pytest.approx(slow_teacher(z, teacher, y, table, of_class), abs=1e-9)


def taught(teacher: list[float], table: list[int], label: int, *of_class: float) -> float:
    """Return the cross-entropy of one voxel whose student knows nothing."""
    t = torch.tensor(teacher, dtype=torch.float64).log().view(1, -1, 1)
    inside = OpenVoxels(0 * t, torch.full((1, 1, 1), label), torch.tensor([table]))
    return inside.teacher_cross_entropy(t, **limits(*of_class)).item()


@pytest.mark.parametrize(
    ("teacher", "of_class", "counts"),
    [
        ([0.6, 0.4], (0.9, 0.3), False),  # a doubt of an organ is no certainty of background
        ([0.95, 0.05], (0.9, 0.3), True),
        ([0.4, 0.6], (0.9, 0.3), True),
        ([0.4, 0.6], (0.3, 0.9), False),  # and the other way round
        ([0.6, 0.4], (0.3, 0.9), True),
    ],
)
def test_a_voxel_counts_by_the_most_probable_class(
    teacher: list[float], of_class: tuple[float, float], counts: bool
) -> None:
    expected = np.log(2) if counts else 0
    assert taught(teacher, [0, 0], 0, *of_class) == pytest.approx(expected)


def test_in_a_group_without_background_all_are_foreground() -> None:
    merged = ([0.1, 0.6, 0.3], [0, 1, 1], 1)  # two thirds inside the group
    assert taught(*merged, 0.9, 0.6) == pytest.approx(np.log(2))
    assert taught(*merged, 0.6, 0.9) == 0


def test_gradients() -> None:
    z = golden_logits()[:, :, :2, :2, :2].clone().requires_grad_()
    y = golden_target(MERGED)[:, :, :2, :2, :2]
    teacher = z.detach().flip(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: OpenVoxels(x, y, MERGED).conditional_entropy(), z)
    learnt = OpenVoxels(z, y, MERGED).teacher_cross_entropy(teacher, **limits(0.5, 0.5))
    assert torch.autograd.gradcheck(
        lambda x: OpenVoxels(x, y, MERGED).teacher_cross_entropy(
            teacher.detach(), **limits(0.5, 0.5)
        ),
        z,
    )
    learnt.backward()
    assert teacher.grad is None


@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("table", [PARTIAL, MERGED, torch.zeros_like(PARTIAL)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_t13_t14_extreme_logits_stay_finite(
    dtype: torch.dtype, table: Tensor, scale: float
) -> None:
    z = (golden_logits() * scale).to(dtype).requires_grad_()
    y = golden_target(table)
    y[:, :, 0] = IGNORE
    inside = OpenVoxels(z, y, table, ignore_label=IGNORE)
    value = inside.conditional_entropy() + inside.teacher_cross_entropy(
        z.flip(1), **limits(0.9, 0.9)
    )
    (g,) = torch.autograd.grad(value, z)
    assert torch.isfinite(value)
    assert torch.isfinite(g).all()
