"""One label map from those of several raters (multi_rater_personalization.md, 7.7)."""

from typing import Literal, NamedTuple, TypeAlias

import numpy as np

Tie: TypeAlias = Literal["background", "foreground", "first_rater"]
STAPLE_MARGIN = 10
"""Voxels around the union of all masks: a larger background makes every rater look specific."""
STAPLE_ITERATIONS = 100


def majority(labels: np.ndarray, classes: int, *, tie: Tie = "background") -> np.ndarray:
    """Return, for every voxel, the label that most raters gave.

    The soft mean of the masks, of which 7.7 speaks, too, is the share of these votes: where it is
    highest among the classes, and of one structure where it is above half (from half on, if ties
    are foreground), is the majority. As shares themselves it cannot be a label map.

    Parameters
    ----------
    labels : ndarray, int, shape (raters, *spatial)
        Label maps, at least one.
    classes : int
        Labels are 0 to ``classes - 1``.
    tie : {"background", "foreground", "first_rater"}
        What wins among labels with equally many votes: 0; the lowest of them above 0; or the one of
        the first rater who gave one of them. With two raters, every voxel on which they differ is
        a tie.
    """
    votes = np.stack([(labels == value).sum(0) for value in range(classes)])
    best = votes == votes.max(0)
    tied = best.sum(0) > 1
    result: np.ndarray = best.argmax(0)
    if tie == "background":
        result[tied] = 0
    elif tie == "foreground":
        above = best[1:]
        result[tied] = (above.argmax(0) + 1)[tied]
    else:
        for rater in labels[::-1]:  # the first rater comes last, and stays
            wins = tied & np.take_along_axis(best, rater[None], 0)[0]
            result[wins] = rater[wins]
    return result


class Staple(NamedTuple):
    """What STAPLE finds.

    Attributes
    ----------
    fused : ndarray, int, shape (*spatial)
    sensitivity, specificity : ndarray, shape (classes - 1, raters)
        Of each rater for each class above 0, within `STAPLE_MARGIN` of all masks; NaN of a class
        that nobody drew, and of a rater alone.
    """

    fused: np.ndarray
    sensitivity: np.ndarray
    specificity: np.ndarray


def staple(labels: np.ndarray, classes: int) -> Staple:
    """Return STAPLE's estimate of the truth (Warfield et al., 2004), class by class.

    A voxel gets the most probable class, if that is more probable than not; else background. One
    rater alone is the truth.

    Parameters
    ----------
    labels : ndarray, int, shape (raters, *spatial)
    classes : int
        Labels are 0 to ``classes - 1``.
    """
    if len(labels) == 1:
        unknown = np.full((classes - 1, 1), np.nan)
        return Staple(labels[0].copy(), unknown, unknown)
    probabilities = np.zeros((classes, *labels.shape[1:]))
    probabilities[0] = 0.5
    rates = np.full((2, classes - 1, len(labels)), np.nan)
    for value in range(1, classes):
        masks = labels == value
        if masks.any():  # else STAPLE would say NaN
            probabilities[value], rates[:, value - 1] = _of_one_class(masks)
    return Staple(probabilities.argmax(0), *rates)


def _of_one_class(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of a mask, shape (*spatial), and how good the raters are, (2, raters).

    The latter are sensitivities and specificities.
    """
    import SimpleITK

    result = np.zeros(masks.shape[1:])
    union = np.argwhere(masks.any(0))
    box = tuple(
        slice(max(0, low - STAPLE_MARGIN), high + 1 + STAPLE_MARGIN)
        for low, high in zip(union.min(0), union.max(0), strict=True)
    )
    images = [SimpleITK.GetImageFromArray(mask[box].astype(np.uint8)) for mask in masks]
    staple_filter = SimpleITK.STAPLEImageFilter()
    staple_filter.SetForegroundValue(1)
    staple_filter.SetMaximumIterations(STAPLE_ITERATIONS)
    result[box] = SimpleITK.GetArrayFromImage(staple_filter.Execute(images))
    return result, np.array([staple_filter.GetSensitivity(), staple_filter.GetSpecificity()])
