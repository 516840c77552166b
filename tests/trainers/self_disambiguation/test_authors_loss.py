"""Golden numbers and properties of the authors' losses (self_disambiguation.md, 6.6 and 6.8)."""

import math

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor

from nnmosaic.trainers.self_disambiguation.authors_loss import (
    AuthorsLoss,
    authors_terms,
    full_entropy,
)
from tests.trainers.self_disambiguation.golden import (
    IGNORE,
    PARTIAL,
    SPATIAL,
    B,
    C,
    golden_logits,
    golden_target,
)

MERGED = torch.tensor([[0, 1, 1, 3, 0], [0, 1, 2, 3, 3]])
NOTHING = torch.zeros_like(PARTIAL)


def only_planes(target: Tensor, *, z: tuple[int, ...] = (), y: tuple[int, ...] = ()) -> Tensor:
    """Return the target with everything ignored outside these planes."""
    kept = torch.zeros_like(target, dtype=torch.bool)
    kept[:, :, list(z)] = True
    kept[:, :, :, list(y)] = True
    return torch.where(kept, target, IGNORE)


def slow_part(
    z: np.ndarray, y: np.ndarray, groups: dict[int, set[int]], *, released: bool = False
) -> tuple[float, float]:
    """Return the sum of the focal terms, and the Dice loss, of logits [C, V] and labels [V].

    With ``released``, the background of the Dice is the sum of all probabilities (2.7, bug 1).
    """
    p = np.exp(z - z.max(0))
    p /= p.sum(0)
    merged = {k: np.sum([p[c] for c in members], 0) for k, members in groups.items()}
    focal = 0.0
    for v, label in enumerate(y):
        chance = merged[label][v]
        focal -= (1 - chance) ** 2 * math.log(min(max(chance, 1e-6), 1 - 1e-6))
    scores = []
    for k in sorted(set(y.tolist())):
        q = p.sum(0) if released and k == 0 else merged[k]
        tp, fp, fn = q[y == k].sum(), q[y != k].sum(), (1 - q[y == k]).sum()
        scores.append((2 * tp + 1) / (2 * tp + fp + fn + 1))
    return focal, 1 - sum(scores) / len(scores)


def slow_sample(
    z: np.ndarray, y: np.ndarray, table: list[int], *, released: bool
) -> tuple[float, float] | None:
    """Return focal and Dice loss of one sample, from loops over axes and planes."""
    of_source = {k: {c for c in range(C) if table[c] == k} for k in set(table)}
    if (y != IGNORE).all():
        focal, dice = slow_part(z.reshape(C, -1), y.ravel(), of_source)
        return focal / y.size, dice
    axes = []
    for axis in range(3):
        focal, voxels, dices = 0.0, 0, []
        for k in range(y.shape[axis]):
            labels = np.take(y, k, axis).ravel()
            if IGNORE in labels or set(labels.tolist()) == {0}:
                continue
            groups = {k: members for k, members in of_source.items() if k and k in labels}
            groups[0] = set(range(C)) - set().union(*groups.values())
            part, dice = slow_part(
                np.take(z, k, axis + 1).reshape(C, -1), labels, groups, released=released
            )
            focal, voxels = focal + part, voxels + labels.size
            dices.append(dice)
        if dices:
            axes.append((focal / voxels, np.mean(dices)))
    return tuple(np.mean(axes, 0)) if axes else None


def slow_terms(
    logits: Tensor, target: Tensor, table: Tensor, *, released: bool = False
) -> tuple[float, float]:
    samples = [
        slow_sample(z, y[0], rows, released=released)
        for z, y, rows in zip(logits.numpy(), target.numpy(), table.tolist(), strict=True)
    ]
    focal, dice = np.mean([terms for terms in samples if terms is not None], 0)
    return float(focal), float(dice)


def terms(logits: Tensor, target: Tensor, table: Tensor) -> tuple[float, float]:
    focal, dice = authors_terms(logits, target, table, ignore_label=IGNORE)
    return focal.item(), dice.item()


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


def test_golden_dense() -> None:
    expected = (1.2588451064, 0.7132273068)
    z, y = golden_logits(), golden_target()
    focal, dice = authors_terms(z, y, PARTIAL)
    assert (focal.item(), dice.item()) == pytest.approx(expected, abs=1e-9)
    assert terms(z, y, PARTIAL) == pytest.approx(expected, abs=1e-9)
    assert slow_terms(z, y, PARTIAL) == pytest.approx(expected, abs=1e-9)
    assert AuthorsLoss()(z, y, PARTIAL).item() == pytest.approx(sum(expected), abs=1e-9)


def test_golden_sparse() -> None:
    z, y = golden_logits(), only_planes(golden_target(), z=(1,), y=(2,))
    expected = (1.3866525578, 0.6459019645)
    assert terms(z, y, PARTIAL) == pytest.approx(expected, abs=1e-9)
    assert slow_terms(z, y, PARTIAL) == pytest.approx(expected, abs=1e-9)
    loss = AuthorsLoss(ignore_label=IGNORE)
    assert loss(z, y, PARTIAL).item() == pytest.approx(sum(expected), abs=1e-9)


def test_golden_sparse_as_released_needs_the_bug() -> None:
    z, y = golden_logits(), only_planes(golden_target(), z=(1,), y=(2,))
    released = slow_terms(z, y, PARTIAL, released=True)
    assert released == pytest.approx((1.3866525578, 0.5727528054), abs=1e-9)


def test_golden_entropy() -> None:
    z, y = golden_logits(), golden_target()
    assert full_entropy(z, y).item() == pytest.approx(1.0421136032, abs=1e-9)
    assert full_entropy(z, torch.zeros_like(y)).item() == pytest.approx(3.1263408096, abs=1e-9)


def test_golden_nothing_annotated() -> None:
    focal, dice = authors_terms(golden_logits(), torch.zeros_like(golden_target()), NOTHING)
    assert abs(focal.item()) < 1e-30
    assert abs(dice.item()) < 1e-12


@pytest.mark.parametrize("table", [PARTIAL, MERGED, NOTHING])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_slow_loop(table: Tensor, seed: int) -> None:
    """The first sample is sparse, the second dense; labels are rare, so planes lack some."""
    random = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(B, C, *SPATIAL, generator=random, dtype=torch.float64)
    raw = torch.randint(0, 3 * C, (B, 1, *SPATIAL), generator=random)
    raw = torch.where(raw < C, raw, 0)
    y = torch.stack([table[b][raw[b]] for b in range(B)])
    planes = only_planes(y, z=(0, 2), y=(seed,))
    y[0] = planes[0]
    assert terms(z, y, table) == pytest.approx(slow_terms(z, y, table), abs=1e-12)
    if table is not NOTHING:
        assert terms(z, planes, table) == pytest.approx(slow_terms(z, planes, table), abs=1e-12)


def test_dense_dice_by_hand() -> None:
    # Uniform over 3 classes, 2 voxels, labels 0 and 1, everything annotated. Each present label:
    # (2 * 1/3 + 1) / (2/3 + 1 + 1) = 5/8. The absent class 2 has no term.
    z = torch.zeros(1, 3, 1, 1, 2, dtype=torch.float64)
    y = torch.tensor([0, 1]).view(1, 1, 1, 1, 2)
    focal, dice = authors_terms(z, y, torch.arange(3)[None])
    assert dice.item() == pytest.approx(3 / 8, abs=1e-12)
    assert focal.item() == pytest.approx(4 / 9 * math.log(3), abs=1e-12)


def test_only_the_logarithm_is_clamped() -> None:
    z = torch.tensor([[0.0], [-30.0]]).double().view(1, 2, 1, 1, 1).requires_grad_()
    for label, expected in ((1, -math.log(1e-6)), (0, 0.0)):
        y = torch.full((1, 1, 1, 1, 1), label)
        focal, _ = authors_terms(z, y, torch.arange(2)[None])
        assert focal.item() == pytest.approx(expected, abs=1e-11)
        assert gradient(focal, z).abs().max().item() < 1e-10


def test_gradcheck() -> None:
    z = golden_logits()[:, :, :2, :2, :2].clone().requires_grad_()
    y = golden_target(MERGED)[:, :, :2, :2, :2].clone()
    y[0, 0, :, 0, 0] = IGNORE
    assert terms(z.detach()[:1], y[:1], MERGED[:1])[0] > 0
    assert torch.autograd.gradcheck(
        lambda logits: authors_terms(logits, y, MERGED, ignore_label=IGNORE), z
    )
    assert torch.autograd.gradcheck(lambda logits: full_entropy(logits, y), z)


def test_the_order_of_axes_and_samples_does_not_matter() -> None:
    z, y = golden_logits(), only_planes(golden_target(MERGED), z=(1,), y=(0, 2))
    expected = terms(z, y, MERGED)
    turned = terms(z.permute(0, 1, 4, 2, 3), y.permute(0, 1, 4, 2, 3), MERGED)
    assert turned == pytest.approx(expected, abs=1e-12)
    assert terms(z.flip(0), y.flip(0), MERGED.flip(0)) == pytest.approx(expected, abs=1e-12)


def test_samples_that_contribute_nothing_are_left_out_of_the_mean() -> None:
    z, y = golden_logits(), only_planes(golden_target(), z=(1,))
    y[1] = IGNORE
    alone = terms(z[:1], y[:1], PARTIAL[:1])
    assert terms(z, y, PARTIAL) == pytest.approx(alone, abs=1e-12)
    assert alone[0] > 0


def test_planes_without_foreground_are_skipped() -> None:
    z, y = golden_logits(), golden_target()
    y[:, :, 0] = 0
    with_empty, without = only_planes(y, z=(0, 1)), only_planes(y, z=(1,))
    assert terms(z, with_empty, PARTIAL) == terms(z, without, PARTIAL)
    assert terms(z, only_planes(y, z=(0,)), PARTIAL) == (0.0, 0.0)


def test_oblique_annotation_has_no_complete_plane() -> None:
    y = golden_target()
    for k in range(3):
        y[:, :, k, k, k] = IGNORE
    y[:, :, :, 3, 3] = IGNORE
    y[:, :, 0, :, 4] = IGNORE
    assert terms(golden_logits(), y, PARTIAL) == (0.0, 0.0)


def test_t3_t16_only_group_probabilities_in_scored_planes_matter() -> None:
    """Plane z = 1 of sample 0 holds only label 3 here: 0, 2, 4 and the absent {1} are one group."""
    y = golden_target()[:1]
    y[y == 1] = 0
    y = only_planes(y, z=(1,))
    z = golden_logits()[:1]
    moved = z.clone()
    group = [0, 1, 2, 4]
    shares = torch.log_softmax(torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64), 0)
    moved[0, group] = torch.logsumexp(z[0, group], 0) + shares.view(4, 1, 1, 1)
    moved[:, :, ::2] = 7.0
    assert terms(moved, y, PARTIAL[:1]) == pytest.approx(terms(z, y, PARTIAL[:1]), abs=1e-12)
    z.requires_grad_()
    g = gradient(sum(authors_terms(z, y, PARTIAL[:1], ignore_label=IGNORE)), z)
    assert g[:, :, ::2].abs().max().item() == 0.0
    ratio = (g / torch.softmax(z, 1))[0, group, 1]
    assert (ratio - ratio[:1]).abs().max().item() < 1e-12  # T4


@pytest.mark.parametrize("present", [True, False])
def test_merged_labels_are_never_split(present: bool) -> None:
    """Label 1 means {1, 2}: a group where it occurs, wholly background where it does not."""
    y = golden_target(MERGED)[:1]
    if not present:
        y[y == 1] = 0
    y = only_planes(y, z=(1,))
    assert bool((y == 1).any()) is present
    as_pair = terms(golden_logits()[:1], y, MERGED[:1])
    z = golden_logits()[:1]
    z[:, 1], z[:, 2] = torch.logaddexp(z[:, 1], z[:, 2]), -1e4
    expected = terms(z, y, torch.tensor([[0, 1, 2, 3, 0]]))
    assert as_pair == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ndim", [2, 3])
def test_t7_everything_ignored_gives_a_connected_zero(ndim: int) -> None:
    z = (golden_logits() if ndim == 3 else golden_logits()[:, :, 0]).clone().requires_grad_()
    y = torch.full((B, 1, *z.shape[2:]), IGNORE)
    for value in authors_terms(z, y, PARTIAL, ignore_label=IGNORE):
        assert value.item() == 0.0
        assert torch.equal(torch.autograd.grad(value, z, retain_graph=True)[0], torch.zeros_like(z))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t13_huge_half_precision_logits_stay_finite(dtype: torch.dtype) -> None:
    y = golden_target()
    for target in (y, only_planes(y, z=(1,)), torch.full_like(y, IGNORE)):
        z = (golden_logits() * 5e3).to(dtype).requires_grad_()
        value = AuthorsLoss(ignore_label=IGNORE)(z, target, PARTIAL) + full_entropy(z, target)
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        assert torch.isfinite(gradient(value, z)).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("table", [PARTIAL, MERGED, NOTHING])
def test_t14_no_gradient_is_nan_or_infinite(scale: float, table: Tensor) -> None:
    y = golden_target(table)
    for target in (y, only_planes(y, z=(1,), y=(2,)), torch.zeros_like(y)):
        z = (golden_logits() * scale).float().requires_grad_()
        value = AuthorsLoss(ignore_label=IGNORE)(z, target, table) + full_entropy(z, target)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient(value, z)).all()


def test_t17_deep_supervision_with_a_scale_without_labels() -> None:
    z = [golden_logits().requires_grad_(), golden_logits()[..., ::2].clone().requires_grad_()]
    y = [golden_target(), torch.full((B, 1, 3, 4, 3), IGNORE)]
    loss = AuthorsLoss(ignore_label=IGNORE)
    value = DeepSupervisionWrapper(loss, (2 / 3, 1 / 3))(z, y, [PARTIAL, PARTIAL])
    value.backward()
    assert value.item() == pytest.approx(2 / 3 * loss(z[0], y[0], PARTIAL).item(), abs=1e-12)
    assert torch.equal(z[1].grad, torch.zeros_like(z[1]))


def test_a_2d_sample_is_scored_on_its_annotated_voxels() -> None:
    z, y = golden_logits()[:, :, 0], golden_target()[:, :, 0]
    y[:, :, 1] = IGNORE
    kept = [0, 2, 3]
    expected = authors_terms(z[:, :, kept], y[:, :, kept], PARTIAL)
    assert terms(z, y, PARTIAL) == pytest.approx([t.item() for t in expected], abs=1e-12)


def test_entropy_by_hand() -> None:
    y = torch.zeros(2, 1, 2, 2, 2, dtype=torch.long)
    y[1, 0, 0, 0, 0] = 1
    uniform = torch.zeros(2, 3, 2, 2, 2, dtype=torch.float64)
    # The first patch is all 0 and weighs 3.
    assert full_entropy(uniform, y).item() == pytest.approx(2 * math.log(3), abs=1e-12)
    y[0] = 5
    assert full_entropy(uniform, y, ignore_label=5).item() == pytest.approx(2 * math.log(3))
    assert full_entropy(uniform, y).item() == pytest.approx(math.log(3))
    sure = torch.tensor([0.0, 1e4]).view(1, 2, 1, 1).double()
    assert full_entropy(sure, torch.ones(1, 1, 1, 1)).item() == pytest.approx(1e-6, rel=1e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    z, y = golden_logits(), golden_target()
    with pytest.raises(ValueError, match=r"target must have shape \(2, 1, 3, 4, 5\), got \(2, 1, "):
        authors_terms(z, y[..., :2], PARTIAL)
    with pytest.raises(ValueError, match=r"representatives must have shape \(2, 5\), got \(1, 5\)"):
        authors_terms(z, y, PARTIAL[:1])
