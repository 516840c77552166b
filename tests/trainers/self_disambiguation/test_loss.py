"""Properties T1 to T17 and golden numbers of methods/self_disambiguation.md, 6.6 and 6.8."""

import math

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor

from nnmosaic.trainers.self_disambiguation.loss import (
    GroupedDiceCELoss,
    group_log_probabilities,
    grouped_cross_entropy,
    grouped_dice,
    hard_counts,
    merge_logits,
)
from tests.trainers.self_disambiguation.golden import (
    COMPLETE,
    IGNORE,
    MERGED,
    PARTIAL,
    B,
    C,
    golden_logits,
    golden_raw,
    golden_target,
)

IDENTITY = torch.arange(C)


def nnunet_loss(*, batch_dice: bool, ignore: int | None = None) -> DC_and_CE_loss:
    return DC_and_CE_loss(
        {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False},
        {},
        ignore_label=ignore,
        dice_class=MemoryEfficientSoftDiceLoss,
    )


def our_loss(
    *, batch_dice: bool, ignore: int | None = None, gamma: float = 0.0
) -> GroupedDiceCELoss:
    return GroupedDiceCELoss(
        nnunet_loss(batch_dice=batch_dice, ignore=ignore),
        batch_dice=batch_dice,
        ignore_label=ignore,
        gamma=gamma,
    )


def slow_loss(
    logits: np.ndarray, target: np.ndarray, table: np.ndarray, *, batch_dice: bool
) -> tuple[float, float]:
    """Return cross-entropy and Dice, written with loops over voxels and merged probabilities."""
    nll, sums = [], {}
    for b in range(len(logits)):
        for v in np.ndindex(logits.shape[2:]):
            z = logits[(b, slice(None), *v)]
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            y = target[(b, 0, *v)]
            if y == IGNORE:
                continue
            nll.append(-math.log(sum(p[c] for c in range(len(p)) if table[b][c] == y)))
            for c in range(1, len(p)):
                if table[b][c] == c:
                    union = sum(p[k] for k in range(len(p)) if table[b][k] == c)
                    key = c if batch_dice else (b, c)
                    i, s = sums.get(key, (0.0, 0.0))
                    sums[key] = (i + union * (y == c), s + union + (y == c))
    dice = [(2 * i + 1e-5) / (s + 1e-5) for i, s in sums.values()]
    return float(np.mean(nll)), -float(np.mean(dice))


def ce(logits: Tensor, target: Tensor, table: Tensor, **options: float) -> Tensor:
    return grouped_cross_entropy(group_log_probabilities(logits, table), target, **options)


def dice(logits: Tensor, target: Tensor, table: Tensor, *, batch_dice: bool = True) -> Tensor:
    log_p = group_log_probabilities(logits, table)
    return grouped_dice(log_p, target, scored=table == IDENTITY, batch_dice=batch_dice)


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


def test_golden_inputs_are_those_of_the_spec() -> None:
    counts = [torch.bincount(t.flatten(), minlength=C).tolist() for t in golden_target()]
    assert counts == [[49, 5, 0, 6, 0], [38, 6, 5, 5, 6]]


def test_golden_marginal_cross_entropy() -> None:
    z, y = golden_logits(), golden_target()
    assert ce(z, y, PARTIAL).item() == pytest.approx(1.6359877516, abs=1e-9)
    per_sample = [ce(z[b : b + 1], y[b : b + 1], PARTIAL[b : b + 1]).item() for b in range(B)]
    assert per_sample == pytest.approx([0.7915642042, 2.4804112990], abs=1e-9)


def test_golden_focal_cross_entropy_of_the_authors() -> None:
    value = ce(golden_logits(), golden_target(), PARTIAL, gamma=2.0)
    assert value.item() == pytest.approx(1.2588451064, abs=1e-9)


def test_golden_batch_dice_per_class_and_mean() -> None:
    z, y = golden_logits(), golden_target()
    assert -dice(z, y, PARTIAL).item() == pytest.approx(0.1343029777, abs=1e-9)
    log_p = group_log_probabilities(z, PARTIAL)
    per_class = []
    for c in range(1, C):
        scored = (PARTIAL == IDENTITY) & (c == IDENTITY)
        per_class.append(-grouped_dice(log_p, y, scored=scored, batch_dice=True).item())
    expected = [0.1269094284, 0.1061809251, 0.1791775717, 0.1249439858]
    assert per_class == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("batch_dice", "expected"), [(True, 1.5016847738), (False, 1.4953357582)])
def test_golden_total(batch_dice: bool, expected: float) -> None:
    value = our_loss(batch_dice=batch_dice)(golden_logits(), golden_target(), PARTIAL)
    assert value.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("batch_dice", "expected"), [(True, 2.2931444645), (False, 2.2929902077)])
def test_golden_complete_is_plain_nnunet(batch_dice: bool, expected: float) -> None:
    z, y = golden_logits().float(), golden_target(COMPLETE)
    value = our_loss(batch_dice=batch_dice)(z, y, COMPLETE)
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_the_focal_factor_also_counts_where_everything_is_annotated() -> None:
    z, y = golden_logits(), golden_target(COMPLETE)
    plain, focal = (our_loss(batch_dice=True, gamma=gamma)(z, y, COMPLETE) for gamma in (0.0, 2.0))
    difference = ce(z, y, COMPLETE) - ce(z, y, COMPLETE, gamma=2.0)
    assert (plain - focal).item() == pytest.approx(difference.item())
    assert difference.item() > 0.1


def test_golden_merged_labels() -> None:
    z, y = golden_logits()[:1], golden_target(MERGED)[:1]
    table = MERGED[:1]
    assert torch.bincount(y.flatten(), minlength=C).tolist() == [43, 11, 0, 6, 0]
    assert ce(z, y, table).item() == pytest.approx(1.2927856794, abs=1e-9)
    log_p = group_log_probabilities(z, table)
    for c, expected in ((1, 0.2494367888), (3, 0.1772840957)):
        scored = (table == IDENTITY) & (c == IDENTITY)
        value = -grouped_dice(log_p, y, scored=scored, batch_dice=True).item()
        assert value == pytest.approx(expected, abs=1e-9)


def test_golden_annotated_planes() -> None:
    y = golden_target()
    kept = torch.zeros_like(y, dtype=torch.bool)
    kept[:, :, 1] = True
    kept[:, :, :, 2] = True
    assert int(kept.sum()) == 60
    y = torch.where(kept, y, IGNORE)
    log_p = group_log_probabilities(golden_logits(), PARTIAL)
    value = grouped_cross_entropy(log_p, y, ignore_label=IGNORE)
    assert value.item() == pytest.approx(1.7679792738, abs=1e-9)
    value = grouped_dice(log_p, y, scored=PARTIAL == IDENTITY, batch_dice=True, ignore_label=IGNORE)
    assert -value.item() == pytest.approx(0.1420527382, abs=1e-9)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("table", [PARTIAL, MERGED])
def test_equals_the_slow_loop(batch_dice: bool, table: Tensor) -> None:
    z, y = golden_logits(), golden_target(table)
    expected = slow_loss(z.numpy(), y.numpy(), table.numpy(), batch_dice=batch_dice)
    assert ce(z, y, table).item() == pytest.approx(expected[0], abs=1e-12)
    value = dice(z, y, table, batch_dice=batch_dice).item()
    assert value == pytest.approx(expected[1], abs=1e-12)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_sources_of_all_kinds_in_one_batch_equal_the_slow_loop(
    batch_dice: bool, planar: bool
) -> None:
    """Complete, partial, merged and sparse; in 2D and 3D; with a lower resolution below."""
    z = torch.cat([golden_logits(), 0.7 * golden_logits().flip(1)])
    table = torch.cat([COMPLETE[:1], PARTIAL[:1], MERGED[:1], PARTIAL[:1]])
    raw = torch.cat([golden_raw(), golden_raw().flip(3)]).clamp_max(C - 1)
    y = torch.stack([row[labels] for row, labels in zip(table, raw, strict=True)])
    y[3, :, :, 1:3] = IGNORE
    if planar:
        z, y = z[:, :, 1], y[:, :, 1]
    levels = [(z, y), (z[..., ::2], y[..., ::2])]
    slow = [
        sum(slow_loss(x.numpy(), labels.numpy(), table.numpy(), batch_dice=batch_dice))
        for x, labels in levels
    ]
    loss = DeepSupervisionWrapper(our_loss(batch_dice=batch_dice, ignore=IGNORE), (0.7, 0.3))
    value = loss(*map(list, zip(*levels, strict=True)), [table, table])
    assert value.item() == pytest.approx(0.7 * slow[0] + 0.3 * slow[1], abs=1e-12)


def test_gradcheck() -> None:
    z = golden_logits()[:, :, :2, :2, :2].clone().requires_grad_()
    y = golden_target(MERGED)[:, :, :2, :2, :2]
    loss = our_loss(batch_dice=True, gamma=2.0)
    assert torch.autograd.gradcheck(lambda logits: loss(logits, y, MERGED), z)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("ignore", [None, IGNORE])
def test_t1_complete_source_is_bit_equal_to_nnunet(batch_dice: bool, ignore: int | None) -> None:
    y = golden_target(COMPLETE)
    if ignore is not None:
        y = torch.where(golden_raw() == 7, ignore, y)
    losses, gradients = [], []
    for function in (
        lambda z: nnunet_loss(batch_dice=batch_dice, ignore=ignore)(z, y),
        lambda z: our_loss(batch_dice=batch_dice, ignore=ignore)(z, y, COMPLETE),
    ):
        z = golden_logits().float().requires_grad_()
        losses.append(function(z))
        gradients.append(gradient(losses[-1], z))
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("ignore", [None, IGNORE])
def test_the_grouped_terms_of_a_complete_source_are_nnunets(
    batch_dice: bool, ignore: int | None
) -> None:
    """The module hands complete batches to nnU-Net's loss, but not under DDP with batch Dice."""
    z, y = golden_logits(), golden_raw().clamp_max(C - 1)
    if ignore is not None:
        y[:, :, 0] = ignore
    log_p = group_log_probabilities(z, COMPLETE)
    scored = torch.ones(B, C, dtype=torch.bool)
    ours = grouped_cross_entropy(log_p, y, ignore_label=ignore) + grouped_dice(
        log_p, y, scored=scored, batch_dice=batch_dice, ignore_label=ignore
    )
    expected = nnunet_loss(batch_dice=batch_dice, ignore=ignore)(z, y)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_t3_split_inside_a_group_does_not_matter(batch_dice: bool) -> None:
    z, y = golden_logits(), golden_target()
    moved = z.clone()
    group = [0, 2, 4]
    shares = torch.log_softmax(torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64), 0)
    moved[0, group] = torch.logsumexp(z[0, group], 0) + shares.view(3, 1, 1, 1)
    loss = our_loss(batch_dice=batch_dice)
    assert abs(loss(z, y, PARTIAL) - loss(moved, y, PARTIAL)).item() < 1e-12


@pytest.mark.parametrize("batch_dice", [True, False])
def test_t4_gradient_inside_a_group_is_proportional_to_probability(batch_dice: bool) -> None:
    z = golden_logits().requires_grad_()
    g = gradient(our_loss(batch_dice=batch_dice)(z, golden_target(), PARTIAL), z)
    ratio = (g / torch.softmax(z, 1))[0, [0, 2, 4]]
    assert (ratio - ratio[:1]).abs().max().item() < 1e-12


@pytest.mark.parametrize("batch_dice", [True, False])
def test_t5_permutations_do_not_matter(batch_dice: bool) -> None:
    z, y = golden_logits(), golden_target()
    loss = our_loss(batch_dice=batch_dice)
    value = loss(z, y, PARTIAL)
    swapped = z.clone()
    swapped[0, [2, 4]] = z[0, [4, 2]]
    assert loss(swapped, y, PARTIAL).item() == pytest.approx(value.item(), abs=1e-12)
    assert loss(z.flip(0), y.flip(0), PARTIAL.flip(0)).item() == pytest.approx(
        value.item(), abs=1e-12
    )


@pytest.mark.parametrize("batch_dice", [True, False])
def test_t6_nothing_annotated_gives_zero_with_zero_gradient(batch_dice: bool) -> None:
    z = golden_logits().requires_grad_()
    nothing = torch.zeros_like(PARTIAL)
    value = our_loss(batch_dice=batch_dice)(z, torch.zeros_like(golden_target()), nothing)
    assert value.item() == 0.0
    assert gradient(value, z).abs().max().item() == 0.0


@pytest.mark.parametrize("batch_dice", [True, False])
def test_t7_all_ignored_gives_a_connected_zero(batch_dice: bool) -> None:
    z = golden_logits().requires_grad_()
    y = torch.full_like(golden_target(), IGNORE)
    log_p = group_log_probabilities(z, PARTIAL)
    value = grouped_cross_entropy(log_p, y, ignore_label=IGNORE)
    assert value.item() == 0.0
    total = our_loss(batch_dice=batch_dice, ignore=IGNORE)(z, y, PARTIAL)
    assert total.item() == 0.0
    g = gradient(total, z)
    assert torch.isfinite(g).all()
    assert g.abs().max().item() == 0.0


def test_t8_more_annotation_never_lowers_the_cross_entropy() -> None:
    z = golden_logits()
    raw = golden_raw()[:1] % 4
    less, more = torch.tensor([[0, 1, 0, 3, 0]]), torch.tensor([[0, 1, 2, 3, 0]])
    y = torch.where(raw == 2, 0, raw)
    log_less = group_log_probabilities(z[:1], less)
    log_more = group_log_probabilities(z[:1], more)
    chosen = [log.gather(1, y).exp() for log in (log_less, log_more)]
    assert (chosen[1] <= chosen[0] + 1e-15).all()
    assert ce(z[:1], y, more).item() >= ce(z[:1], y, less).item()


def test_t9_merged_pair_with_one_impossible_member_is_a_single_class() -> None:
    z, y = golden_logits()[:1], golden_target(MERGED)[:1]
    z[:, 2] = -1e4
    alone = torch.tensor([[0, 1, 0, 3, 0]])
    assert ce(z, y, MERGED[:1]).item() == pytest.approx(ce(z, y, alone).item(), abs=1e-12)
    assert dice(z, y, MERGED[:1]).item() == pytest.approx(dice(z, y, alone).item(), abs=1e-12)


@pytest.mark.parametrize("table", [PARTIAL, MERGED, torch.zeros_like(PARTIAL)])
def test_t10_grouped_probabilities_are_sums_of_probabilities(table: Tensor) -> None:
    z = golden_logits()
    grouped = group_log_probabilities(z, table).exp()
    assert (grouped.sum(1) - 1).abs().max().item() < 1e-12
    p = torch.softmax(z, 1)
    for b in range(B):
        for c in range(C):
            expected = p[b, table[b] == c].sum(0)
            assert (grouped[b, c] - expected).abs().max().item() < 1e-12


def test_singletons_pass_through_bit_for_bit() -> None:
    z = golden_logits().float()
    merged = merge_logits(z, PARTIAL)
    assert torch.equal(merged[1], z[1])
    assert torch.equal(merged[0, [1, 3]], z[0, [1, 3]])
    assert (merged[0, [2, 4]] == -torch.inf).all()


def test_t11_batch_cross_entropy_is_the_voxel_weighted_mean() -> None:
    z, y = golden_logits(), golden_target()
    y[0, 0, :2] = IGNORE
    parts, voxels = [], []
    for b in range(B):
        log_p = group_log_probabilities(z[b : b + 1], PARTIAL[b : b + 1])
        parts.append(grouped_cross_entropy(log_p, y[b : b + 1], ignore_label=IGNORE).item())
        voxels.append(int((y[b] != IGNORE).sum()))
    log_p = group_log_probabilities(z, PARTIAL)
    value = grouped_cross_entropy(log_p, y, ignore_label=IGNORE).item()
    assert value == pytest.approx(np.average(parts, weights=voxels), abs=1e-12)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_t12_dice_of_a_class_ignores_sources_without_it(batch_dice: bool) -> None:
    z = golden_logits().requires_grad_()
    log_p = group_log_probabilities(z, PARTIAL)
    for c in (2, 4):
        scored = (PARTIAL == IDENTITY) & (c == IDENTITY)
        value = grouped_dice(log_p, golden_target(), scored=scored, batch_dice=batch_dice)
        g = torch.autograd.grad(value, z, retain_graph=True)[0]
        assert g[0].abs().max().item() == 0.0
        assert g[1].abs().max().item() > 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t13_huge_half_precision_logits_stay_finite(dtype: torch.dtype) -> None:
    z = (golden_logits() * 5e3).to(dtype).requires_grad_()
    for gamma in (0.0, 2.0):
        value = our_loss(batch_dice=True, gamma=gamma)(z, golden_target(), PARTIAL)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient(value, z)).all()


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("table", [PARTIAL, MERGED, torch.zeros_like(PARTIAL)])
def test_t14_no_gradient_is_nan_or_infinite(scale: float, table: Tensor, batch_dice: bool) -> None:
    y = golden_target(table)
    for gamma in (0.0, 2.0):
        z = (golden_logits() * scale).float().requires_grad_()
        value = our_loss(batch_dice=batch_dice, gamma=gamma)(z, y, table)
        assert torch.isfinite(gradient(value, z)).all()


@pytest.mark.parametrize("batch_dice", [True, False])
def test_t16_ignored_voxels_get_no_supervised_gradient(batch_dice: bool) -> None:
    z = golden_logits().requires_grad_()
    y = golden_target()
    y[:, :, 0] = IGNORE
    g = gradient(our_loss(batch_dice=batch_dice, ignore=IGNORE)(z, y, PARTIAL), z)
    assert g[:, :, 0].abs().max().item() == 0.0


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("table", [PARTIAL, MERGED])
def test_t17_deep_supervision_with_a_scale_without_labels(batch_dice: bool, table: Tensor) -> None:
    z = [golden_logits().requires_grad_(), golden_logits()[..., ::2].clone().requires_grad_()]
    y = [golden_target(table), torch.full((B, 1, 3, 4, 3), IGNORE)]
    loss = our_loss(batch_dice=batch_dice, ignore=IGNORE)
    value = DeepSupervisionWrapper(loss, (2 / 3, 1 / 3))(z, y, [table, table])
    value.backward()
    assert value.item() == pytest.approx(2 / 3 * loss(z[0], y[0], table).item(), abs=1e-12)
    assert z[1].grad is not None
    assert z[1].grad.abs().max().item() == 0.0


def test_two_dimensional_images_work() -> None:
    z, y = golden_logits()[:, :, 0], golden_target()[:, :, 0]
    expected = slow_loss(z.numpy(), y.numpy(), PARTIAL.numpy(), batch_dice=True)
    value = our_loss(batch_dice=True)(z, y, PARTIAL)
    assert value.item() == pytest.approx(sum(expected), abs=1e-12)


def test_a_table_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"representatives must have shape \(2, 5\), got \(1, 5\)"):
        merge_logits(golden_logits(), PARTIAL[:1])


def test_online_counts_by_hand() -> None:
    # One row of four voxels; the source annotates class 1, class 2 belongs to the background.
    table = torch.tensor([[0, 1, 0]])
    winners = torch.tensor([1, 2, 0, 1])
    z = torch.nn.functional.one_hot(winners, 3).T[None].double() * 9
    y = torch.tensor([[[1, 0, 1, 0]]])
    log_p = group_log_probabilities(z, table)
    tp, fp, fn = hard_counts(log_p, y, scored=table == torch.arange(3))
    assert [t.tolist() for t in (tp, fp, fn)] == [[1, 0], [1, 0], [1, 0]]
    y[0, 0, 3] = 3
    _, fp, _ = hard_counts(log_p, y, scored=table == torch.arange(3), ignore_label=3)
    assert fp.tolist() == [0, 0]
