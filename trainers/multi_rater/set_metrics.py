"""How well a set of predictions matches a set of annotations (multi_rater_personalization.md, 5).

Masks are boolean arrays of shape (number, *spatial), of one class in one case; average over
foreground classes first, then over cases. Two empty masks agree: Dice and IoU 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
BINS = 20


def _sizes(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return intersections, shape (n, m), and sums of both sizes."""
    a, b = (masks.reshape(len(masks), -1).astype(np.float32) for masks in (first, second))
    # Exact below 2 ** 24 voxels in common; in parts beyond.
    step = 2**23
    parts = range(0, a.shape[1], step)
    common = sum((a[:, i : i + step] @ b[:, i : i + step].T).astype(np.float64) for i in parts)
    sizes = [masks.reshape(len(masks), -1).sum(1, dtype=np.int64) for masks in (first, second)]
    return np.asarray(common), sizes[0][:, None] + sizes[1][None]


def dice_matrix(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Dice of each pair, shape (n, m), of masks (n, *spatial) and (m, *spatial)."""
    common, total = _sizes(first, second)
    dice: np.ndarray = np.divide(2 * common, total, out=np.ones_like(common), where=total > 0)
    return dice


def iou_matrix(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return intersection over union of each pair, shape (n, m)."""
    common, total = _sizes(first, second)
    union = total - common
    iou: np.ndarray = np.divide(common, union, out=np.ones_like(common), where=union > 0)
    return iou


def generalised_energy_distance(annotations: np.ndarray, samples: np.ndarray) -> float:
    """Return GED with 1 - IoU as distance, self-pairs included: 0 if and only if the sets agree.

    It has a bias that depends on the number of samples: compare equal numbers only.
    """
    across, within, between = (
        1 - iou_matrix(one, other).mean()
        for one, other in ((annotations, samples), (annotations, annotations), (samples, samples))
    )
    return float(2 * across - within - between)


def dice_soft(annotations: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean Dice of mean annotation and mean probability over `THRESHOLDS`.

    Parameters
    ----------
    annotations : ndarray, bool, shape (n, *spatial)
    probabilities : ndarray, shape (samples, *spatial)
        Of the class, in [0, 1].
    """
    drawn, found = annotations.mean(0), probabilities.mean(0)
    # A share of 3 of 10 raters is not above 0.3, whatever its last bit says.
    pairs = [(drawn > t + 1e-9, found > t) for t in THRESHOLDS]
    return float(np.mean([dice_matrix(a[None], b[None])[0, 0] for a, b in pairs]))


@dataclass(frozen=True)
class SetDice:
    """Dice between a set of annotations and a set of predictions.

    Attributes
    ----------
    max_of_annotations : float
        Mean, over annotations, of the best prediction: an upper limit of ``match``.
    max_of_predictions : float
        Mean, over predictions, of the best annotation.
    match : float
        Mean over the best assignment of one prediction to each annotation.
    coverage : float
        Share of the annotations that have a prediction in it: below 1 with too few predictions.
    """

    max_of_annotations: float
    max_of_predictions: float
    match: float
    coverage: float


def set_dice(annotations: np.ndarray, predictions: np.ndarray) -> SetDice:
    """Compare two sets of masks, whatever their order."""
    dice = dice_matrix(annotations, predictions)
    rows, columns = linear_sum_assignment(dice, maximize=True)
    return SetDice(
        max_of_annotations=float(dice.max(1).mean()),
        max_of_predictions=float(dice.max(0).mean()),
        match=float(dice[rows, columns].mean()),
        coverage=len(rows) / len(annotations),
    )


@dataclass(frozen=True)
class Identification:
    """Whether the mask of a rater is nearest to that rater's own annotation.

    Attributes
    ----------
    score : float
        Share of masks; where several raters are equally near, each has its part.
    chance : float
        Expected score if masks and raters had nothing to do with each other.
    swapped : tuple of float
        2.5 and 97.5 percentile of the score when the raters of every case change names at random.
    """

    score: float
    chance: float
    swapped: tuple[float, float]


def rater_identification(
    matrices: Sequence[np.ndarray], *, swaps: int = 1000, seed: int = 0
) -> Identification:
    """Return how often a personalised mask is told from the others' by its rater.

    Parameters
    ----------
    matrices : sequence of ndarray, shape (R, R)
        Of each case: Dice of rater r's mask (row) with the annotation of each rater (column). NaN
        in the column of an absent rater, whose row does not count either.

    Raises
    ------
    ValueError
        If no case has two raters.
    """
    present = [np.flatnonzero(~np.isnan(matrix).all(0)) for matrix in matrices]
    kept = [m[np.ix_(p, p)] for m, p in zip(matrices, present, strict=True) if len(p) > 1]
    if not kept:
        raise ValueError("No case has annotations of two raters: nobody can be told apart.")
    # Row r, column c: the part of "nearest" that rater c has in the mask of rater r.
    nearest = [best / best.sum(1, keepdims=True) for m in kept for best in [m == m.max(1)[:, None]]]
    masks = sum(map(len, nearest))
    rng = np.random.default_rng(seed)
    swapped = [
        sum(part[np.arange(len(part)), rng.permutation(len(part))].sum() for part in nearest)
        / masks
        for _ in range(swaps)
    ]
    low, high = np.percentile(swapped, (2.5, 97.5))
    return Identification(
        score=float(sum(np.trace(part) for part in nearest) / masks),
        chance=len(nearest) / masks,
        swapped=(float(low), float(high)),
    )


@dataclass(frozen=True)
class Calibration:
    """Accuracy against confidence in `BINS` bins of equal width.

    Attributes
    ----------
    expected : float
        Mean absolute difference, weighted by the voxels of a bin (ECE).
    average : float
        Mean over the bins that have any voxel (ACE).
    """

    expected: float
    average: float


def calibration(labels: np.ndarray, probabilities: np.ndarray) -> Calibration:
    """Hold the confidence of the mean prediction against every rater.

    Parameters
    ----------
    labels : ndarray, int, shape (n, *spatial)
        Label maps of the raters; a voxel counts once for each.
    probabilities : ndarray, shape (K, *spatial)
        Mean over samples, background first.
    """
    confidence, found = probabilities.max(0).ravel(), probabilities.argmax(0)
    correct = (labels == found).mean(0).ravel()
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    voxels, right, sure = (
        np.bincount(bins, weights, BINS) for weights in (None, correct, confidence)
    )
    gaps = np.abs(right - sure)[voxels > 0]
    voxels = voxels[voxels > 0]
    return Calibration(float(gaps.sum() / voxels.sum()), float((gaps / voxels).mean()))


def variance_ratio(annotations: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the variance of samples, summed over voxels, over that of the annotations.

    1: as diverse as the raters. NaN where the raters agree everywhere.

    Parameters
    ----------
    annotations : ndarray, bool, shape (n, *spatial)
    probabilities : ndarray, shape (samples, *spatial)
    """
    drawn = annotations.astype(float).var(0).sum()
    return float(probabilities.var(0).sum() / drawn) if drawn else float("nan")
