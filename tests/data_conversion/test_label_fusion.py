"""Fusing the label maps of several raters."""

import numpy as np
import pytest

from nnmosaic.data_conversion.label_fusion import majority, staple


def slow_majority(votes: list[int], tie: str) -> int:
    counts = {value: votes.count(value) for value in votes}
    best = [value for value in sorted(counts) if counts[value] == max(counts.values())]
    if len(best) == 1:
        return best[0]
    if tie == "background":
        return 0
    if tie == "foreground":
        return next(value for value in best if value > 0)
    return next(value for value in votes if value in best)


@pytest.mark.parametrize("tie", ["background", "foreground", "first_rater"])
@pytest.mark.parametrize("raters", [1, 2, 3, 4, 5])
def test_majority_equals_the_slow_loop(raters: int, tie: str) -> None:
    labels = np.random.default_rng(raters).integers(0, 4, (raters, 9, 11))
    before = labels.copy()
    expected = [[slow_majority(labels[:, y, x].tolist(), tie) for x in range(11)] for y in range(9)]
    assert np.array_equal(majority(labels, 4, tie=tie), expected)
    assert np.array_equal(labels, before)


@pytest.mark.parametrize("raters", [1, 2, 3, 4, 5])
def test_the_mean_of_the_masks_says_the_same_as_majority(raters: int) -> None:
    labels = np.random.default_rng(raters).integers(0, 4, (raters, 9, 11))
    mean = np.mean([labels == value for value in range(4)], axis=1)
    best = np.isclose(mean, mean.max(0))
    background = np.where(best.sum(0) > 1, 0, mean.argmax(0))
    assert np.array_equal(majority(labels, 4), background)
    whole = labels > 0
    half = (whole.mean(0) > 0.5).astype(int)
    assert np.array_equal(majority(whole.astype(int), 2), half)
    at_half = (whole.mean(0) >= 0.5).astype(int)
    assert np.array_equal(majority(whole.astype(int), 2, tie="foreground"), at_half)


def test_staple_trusts_raters_who_agree() -> None:
    truth = np.zeros((3, 20, 20), int)
    truth[:, 5:15, 5:15] = 1
    truth[1, 6:8, 6:8] = 2
    careless = np.zeros_like(truth)
    careless[:, :4, :4] = 1
    found = staple(np.stack([truth, truth, careless]), 3)
    assert np.array_equal(found.fused, truth)
    np.testing.assert_allclose(found.sensitivity, [[1, 1, 0]] * 2, atol=0.02)
    np.testing.assert_allclose(found.specificity[1], [1, 1, 1], atol=0.02)
    assert found.specificity[0, 2] < 0.98  # drew a square where there is nothing


def test_staple_of_one_rater_is_the_rater() -> None:
    drawn = np.zeros((1, 4, 5), int)
    drawn[0, 2] = 2
    found = staple(drawn, 3)
    assert np.array_equal(found.fused, drawn[0])
    assert np.isnan(found.sensitivity).all()


def test_staple_of_empty_masks_is_empty() -> None:
    found = staple(np.zeros((3, 4, 5), int), 2)
    assert not found.fused.any()
    assert np.isnan(found.sensitivity).all()
