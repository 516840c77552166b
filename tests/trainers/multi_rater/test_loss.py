"""Terms of the diversified stage against slow oracles (spec 7.8, invariants 3, 7, 8, 11)."""

import pytest
import torch
from torch import Tensor

from nnmosaic.trainers.multi_rater.loss import (
    bound_loss,
    draw_raters,
    energy_set_loss,
    gaussian_kl,
    of_raters,
    posterior_input,
    union_and_intersection,
)

CLASSES = 3


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def labels(generator: torch.Generator) -> Tensor:
    return torch.randint(0, CLASSES, (3, 4, 5, 6), generator=generator)


@pytest.fixture
def available() -> Tensor:
    return torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)


@pytest.fixture
def probabilities(generator: torch.Generator) -> Tensor:
    logits = torch.randn(7, 3, CLASSES, 5, 6, generator=generator, dtype=torch.float64)
    return logits.softmax(2)


def spoilt(labels: Tensor, available: Tensor) -> Tensor:
    """Return labels with nonsense where nobody annotated."""
    return torch.where(available[:, :, None, None], labels, 2 - labels.clamp(max=2))


def test_kl_is_torchs(generator: torch.Generator) -> None:
    m, s, pm, ps = (torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(4))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(m, s.exp()), normal(pm, ps.exp())).sum(1)
    got = gaussian_kl(m, s, pm, ps)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-5)
    assert (got >= 0).all()
    assert gaussian_kl(m, s, m, s).abs().max() == 0


def test_union_and_intersection_enclose_every_rater(labels: Tensor, available: Tensor) -> None:
    outer, inner = union_and_intersection(labels, available, CLASSES)
    for b, r in available.nonzero().tolist():
        for k in range(1, CLASSES):
            drawn = labels[b, r] == k
            assert (inner[b, k - 1] <= drawn).all()
            assert (drawn <= outer[b, k - 1]).all()
    alone_outer, alone_inner = union_and_intersection(labels[2:], available[2:], CLASSES)
    assert torch.equal(alone_outer, alone_inner)
    again = union_and_intersection(spoilt(labels, available), available, CLASSES)
    assert torch.equal(outer, again[0])
    assert torch.equal(inner, again[1])


def slow_bound(p: Tensor, labels: Tensor, available: Tensor) -> float:
    scores = []
    for extreme, combine in ((max, any), (min, all)):
        for k in range(1, CLASSES):
            common = total = 0.0
            for b in range(len(labels)):
                raters = available[b].nonzero()[:, 0].tolist()
                if len(raters) < 2:
                    continue
                for y in range(5):
                    for x in range(6):
                        q = extreme(float(sample[b, k, y, x]) for sample in p)
                        t = combine(int(labels[b, r, y, x]) == k for r in raters)
                        common += q * t
                        total += q + t
            scores.append(2 * common / max(total, 1e-6))
    return 1 - sum(scores) / len(scores)


def test_bound_equals_the_slow_loop(
    probabilities: Tensor, labels: Tensor, available: Tensor
) -> None:
    got = bound_loss(probabilities, labels, available)
    assert got.item() == pytest.approx(slow_bound(probabilities, labels, available), rel=1e-5)
    again = bound_loss(probabilities, spoilt(labels, available), available)
    assert again.item() == got.item()


def test_a_perfect_set_has_no_bound_loss(labels: Tensor) -> None:
    everyone = torch.ones(3, 4, dtype=torch.bool)
    samples = torch.nn.functional.one_hot(labels, CLASSES).movedim(-1, 2).transpose(0, 1).float()
    # Both extremes of every voxel must be there: repeat the same voxel for all raters.
    assert bound_loss(samples, labels, everyone).item() == pytest.approx(0, abs=1e-6)


def test_with_two_classes_it_is_the_released_form(generator: torch.Generator) -> None:
    logits = torch.randn(10, 2, 6, 7, generator=generator)
    masks = (torch.rand(2, 4, 6, 7, generator=generator) < 0.5).long()
    # Sigmoid of the extreme logits, Dice over batch and space, mean of union and intersection.
    dice = []
    for extreme, target in (
        (logits.amax(0), masks.amax(1)),
        (logits.amin(0), masks.amin(1)),
    ):
        p = extreme.sigmoid()
        dice.append(2 * (p * target).sum() / (p.sum() + target.sum()))
    two = torch.stack([torch.zeros_like(logits), logits], 2).softmax(2)
    got = bound_loss(two, masks, torch.ones(2, 4, dtype=torch.bool))
    assert got.item() == pytest.approx(1 - (dice[0] + dice[1]).item() / 2, rel=1e-5)


def test_bound_is_off_for_single_raters_and_reaches_only_extremes(
    probabilities: Tensor, labels: Tensor, available: Tensor
) -> None:
    alone = torch.zeros_like(available)
    alone[:, 1] = True
    p = probabilities.clone().requires_grad_()
    nothing = bound_loss(p, labels, alone)
    nothing.backward()
    assert nothing.item() == 0
    assert p.grad.abs().max() == 0
    p.grad = None
    bound_loss(p, labels, available).backward()
    assert p.grad[:, 2].abs().max() == 0  # one rater only
    moved = (p.grad[:, :2, 1:] != 0).sum(0)
    assert moved.max() <= 2
    extreme = probabilities[:, :2, 1:]
    inside = (extreme != extreme.amax(0)) & (extreme != extreme.amin(0))
    assert p.grad[:, :2, 1:][inside].abs().max() == 0


def test_dice_alone_says_nothing_about_empty_masks(probabilities: Tensor) -> None:
    empty, everyone = torch.zeros(3, 4, 5, 6).long(), torch.ones(3, 4, dtype=torch.bool)
    for weight, silent in ((0.0, True), (1.0, False)):
        p = probabilities.clone().requires_grad_()
        bound_loss(p, empty, everyone, cross_entropy=weight).backward()
        assert (p.grad.abs().max() == 0) == silent


def slow_energy(p: Tensor, labels: Tensor, available: Tensor) -> float:
    values = []
    for b in range(len(labels)):
        drawn = [
            torch.stack([labels[b, r] == k for k in range(1, CLASSES)]).double()
            for r in available[b].nonzero()[:, 0]
        ]
        found = [sample[b, 1:].double() for sample in p]

        def mean(one: list[Tensor], other: list[Tensor]) -> float:
            distances = [(x - y).norm() / x.numel() ** 0.5 for x in one for y in other]
            return float(torch.stack(distances).mean())

        values.append(2 * mean(found, drawn) - mean(found, found) - mean(drawn, drawn))
    return sum(values) / len(values)


def test_energy_equals_the_slow_loop(
    probabilities: Tensor, labels: Tensor, available: Tensor
) -> None:
    got = energy_set_loss(probabilities, labels, available)
    assert got.item() == pytest.approx(slow_energy(probabilities, labels, available), rel=1e-5)
    again = energy_set_loss(probabilities, spoilt(labels, available), available)
    assert again.item() == got.item()
    everyone = torch.ones_like(available)
    samples = torch.nn.functional.one_hot(labels, CLASSES).movedim(-1, 2).transpose(0, 1).float()
    samples.requires_grad_()
    same = energy_set_loss(samples, labels, everyone)
    same.backward()
    assert same.item() == pytest.approx(0, abs=1e-6)
    assert samples.grad.isfinite().all()


def test_raters_are_drawn_from_those_who_are_there(
    available: Tensor, generator: torch.Generator
) -> None:
    rows = available.repeat(4000, 1)
    drawn = draw_raters(rows, generator=generator).view(4000, 3)
    assert rows[torch.arange(len(rows)), drawn.flatten()].all()
    counts = torch.bincount(drawn[:, 0], minlength=4)
    assert (counts - 1000).abs().max() < 120
    weights = torch.tensor([1.0, 1, 1, 3])
    again = draw_raters(rows, generator=generator, weights=weights).view(4000, 3)
    assert (again[:, 1] == 3).float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_labels_of_the_drawn_raters_at_every_resolution(labels: Tensor) -> None:
    raters = torch.tensor([3, 0, 2])
    for level in of_raters([labels, labels[..., ::2, ::2]], raters):
        assert level.shape[:2] == (3, 1)
    full = of_raters(labels, raters)
    for b, r in enumerate(raters.tolist()):
        assert torch.equal(full[b, 0], labels[b, r])


def test_the_posterior_sees_masks_and_who_is_there(labels: Tensor, available: Tensor) -> None:
    data = torch.randn(3, 2, 5, 6)
    seen = posterior_input(data, labels, available, CLASSES)
    assert seen.shape == (3, 2 + 4 * 2 + 4, 5, 6)
    assert torch.equal(seen[:, :2], data)
    for k in (1, 2):
        masks = seen[:, 2 + 4 * (k - 1) : 2 + 4 * k]
        assert torch.equal(masks.bool(), (labels == k) & available[:, :, None, None])
    assert torch.equal(seen[:, -4:].amin((2, 3)), available.float())
    assert torch.equal(seen, posterior_input(data, spoilt(labels, available), available, CLASSES))


def test_the_cross_entropy_of_the_bound_is_torchs(
    probabilities: Tensor, labels: Tensor, available: Tensor
) -> None:
    both = [bound_loss(probabilities, labels, available, cross_entropy=w) for w in (0.0, 2.0)]
    several = available.sum(1) > 1
    outer, inner = union_and_intersection(labels[several], available[several], CLASSES)
    extremes = probabilities[:, several, 1:].float()
    entropy = torch.nn.functional.binary_cross_entropy
    expected = (
        entropy(extremes.amax(0), outer.float()) + entropy(extremes.amin(0), inner.float())
    ) / 2
    torch.testing.assert_close(both[1] - both[0], 2 * expected, rtol=1e-4, atol=1e-5)
