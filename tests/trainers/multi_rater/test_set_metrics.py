"""Set metrics against slow loops (spec 7.8, invariants 3 - 6)."""

from itertools import permutations

import numpy as np
import pytest

from nnmosaic.trainers.multi_rater.set_metrics import (
    calibration,
    dice_matrix,
    dice_soft,
    generalised_energy_distance,
    iou_matrix,
    rater_identification,
    set_dice,
    variance_ratio,
)


def masks(rng: np.random.Generator, number: int, share: float = 0.4) -> np.ndarray:
    return rng.random((number, 4, 5)) < share


def slow_dice(a: np.ndarray, b: np.ndarray) -> float:
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def slow_iou(a: np.ndarray, b: np.ndarray) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def slow_ged(a: np.ndarray, p: np.ndarray) -> float:
    def mean(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.mean([1 - slow_iou(x, y) for x in one for y in other]))

    return 2 * mean(a, p) - mean(a, a) - mean(p, p)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_matrices_equal_the_loops(rng: np.random.Generator) -> None:
    a, b = masks(rng, 3), masks(rng, 4)
    a[0], b[1] = False, False  # both empty: they agree
    for fast, slow in ((dice_matrix, slow_dice), (iou_matrix, slow_iou)):
        expected = [[slow(x, y) for y in b] for x in a]
        assert np.allclose(fast(a, b), expected, rtol=1e-12)
        assert fast(a, b)[0, 1] == 1


def test_ged_equals_the_loop_and_is_a_distance(rng: np.random.Generator) -> None:
    for _ in range(1000):
        a = masks(rng, int(rng.integers(1, 5)), rng.choice([0.0, 0.1, 0.5]))
        p = masks(rng, int(rng.integers(1, 6)), rng.choice([0.0, 0.1, 0.5]))
        value = generalised_energy_distance(a, p)
        assert value == pytest.approx(slow_ged(a, p), abs=1e-12)
        assert value >= -1e-12
        assert generalised_energy_distance(a, a) == pytest.approx(0, abs=1e-12)
        twice = [np.concatenate([m, m])[rng.permutation(2 * len(m))] for m in (a, p)]
        assert generalised_energy_distance(*twice) == pytest.approx(value, abs=1e-12)
    empty = np.zeros((2, 4, 5), bool)
    assert generalised_energy_distance(empty, empty[:1]) == 0


def test_one_rater(rng: np.random.Generator) -> None:
    a, p = masks(rng, 1), masks(rng, 3)
    across = np.mean([1 - slow_iou(a[0], x) for x in p])
    within = np.mean([1 - slow_iou(x, y) for x in p for y in p])
    assert generalised_energy_distance(a, p) == pytest.approx(2 * across - within)
    alone = set_dice(a, p[:1])
    expected = slow_dice(a[0], p[0])
    for value in (alone.match, alone.max_of_annotations, alone.max_of_predictions):
        assert value == pytest.approx(expected)


def test_match_is_the_best_of_all_assignments(rng: np.random.Generator) -> None:
    for _ in range(50):
        a, p = masks(rng, 3), masks(rng, 4)
        dice = [[slow_dice(x, y) for y in p] for x in a]
        best = max(
            np.mean([dice[i][j] for i, j in enumerate(chosen)])
            for chosen in permutations(range(4), 3)
        )
        found = set_dice(a, p)
        assert found.match == pytest.approx(best)
        assert found.coverage == 1
        assert found.max_of_annotations == pytest.approx(np.mean([max(row) for row in dice]))
        columns = zip(*dice, strict=True)
        assert found.max_of_predictions == pytest.approx(np.mean([max(c) for c in columns]))
        assert found.max_of_annotations >= found.match - 1e-12
        own = np.mean([dice[i][i] for i in range(3)])
        assert found.match >= own - 1e-12
        again = set_dice(a, p[::-1])
        assert again.match == pytest.approx(found.match)
    few = set_dice(a, p[:1])
    assert few.coverage == pytest.approx(1 / 3)
    assert few.match == pytest.approx(max(row[0] for row in dice))


def test_dice_soft_thresholds_the_means(rng: np.random.Generator) -> None:
    a, p = masks(rng, 3), rng.random((5, 4, 5))
    expected = np.mean([slow_dice(a.mean(0) > t, p.mean(0) > t) for t in (0.1, 0.3, 0.5, 0.7, 0.9)])
    assert dice_soft(a, p) == pytest.approx(expected)
    one, other = masks(rng, 1), masks(rng, 1)
    assert dice_soft(one, other.astype(float)) == pytest.approx(slow_dice(one[0], other[0]))


def test_a_share_that_equals_a_threshold_is_not_above_it() -> None:
    drawn = np.zeros((10, 1, 2), bool)
    drawn[:3, 0, 0] = True  # 3 of 10
    drawn[:, 0, 1] = True
    certain = np.array([[[0.2, 1.0]]])
    assert dice_soft(drawn, certain) == 1


def test_raters_are_identified_by_the_nearest_annotation() -> None:
    own = np.array([[0.9, 0.5, 0.6], [0.4, 0.8, 0.6], [0.7, 0.2, 0.3]])
    found = rater_identification([own])
    assert found.score == pytest.approx(2 / 3)
    assert found.chance == pytest.approx(1 / 3)
    tied = np.array([[0.5, 0.5], [0.5, 0.5]])
    assert rater_identification([tied]).score == 0.5
    absent = own.copy()
    absent[:, 1] = np.nan
    absent[1] = np.nan
    partly = rater_identification([absent, own])
    assert partly.score == pytest.approx((1 + 2) / 5)
    assert partly.chance == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match="No case has annotations of two raters"):
        rater_identification([np.array([[0.5, np.nan], [np.nan, np.nan]])])


def test_swapped_raters_are_at_chance(rng: np.random.Generator) -> None:
    cases = [np.eye(4) + 0.1 * rng.random((4, 4)) for _ in range(40)]
    found = rater_identification(cases)
    assert found.score == 1
    low, high = found.swapped
    assert low < found.chance == 0.25 < high < 0.4


def test_calibration_equals_the_loop(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 3, (2, 6, 7))
    probabilities = rng.dirichlet((1, 1, 1), (6, 7)).transpose(2, 0, 1)
    bins: dict[int, list[tuple[float, float]]] = {}
    for rater in labels:
        for y, x in np.ndindex(6, 7):
            p = probabilities[:, y, x]
            where = min(int(p.max() * 20), 19)
            bins.setdefault(where, []).append((p.max(), float(p.argmax() == rater[y, x])))
    gaps = {
        k: abs(np.mean([c for c, _ in pairs]) - np.mean([r for _, r in pairs]))
        for k, pairs in bins.items()
    }
    found = calibration(labels, probabilities)
    assert found.average == pytest.approx(np.mean(list(gaps.values())))
    assert found.expected == pytest.approx(
        sum(gaps[k] * len(pairs) for k, pairs in bins.items()) / labels.size
    )
    sure = np.stack([labels[0] == k for k in range(3)]).astype(float)
    assert calibration(labels[:1], sure).expected == 0


def test_variance_ratio(rng: np.random.Generator) -> None:
    a = masks(rng, 4)
    assert variance_ratio(a, a.astype(float)) == pytest.approx(1)
    assert variance_ratio(a, a[:1].astype(float)) == 0
    mean = a.mean(0)
    expected = a.astype(float).var(0).sum()
    assert expected == pytest.approx((mean * (1 - mean)).sum())
    assert np.isnan(variance_ratio(a[[0, 0]], a.astype(float)))
