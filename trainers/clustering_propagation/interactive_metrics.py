"""How fast a segmentation gets better with the clicks of a user (clustering_propagation.md, 4).

A curve holds one object of one case: Dice after 0, 1, 2, ... interactions. A user who finds nothing
to correct stops; the last value then holds for all interactions that were left.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnmosaic.data_conversion.prompts import Point

REPORTED = (0, 1, 3, 5, 10)
"""Numbers of interactions that Dice is reported after."""
TARGETS = (0.85, 0.9)
"""Of Dice, for the number of interactions until it is reached."""
CAP = 20
"""What counts for a target that is not reached."""


@dataclass(frozen=True)
class InteractionCurve:
    """What happened to one object of one case.

    Attributes
    ----------
    dice : tuple of float
        After 0, 1, 2, ... interactions; at least the first.
    seconds : tuple of float
        That each interaction took to be answered; the automatic result is none.
    slices : int
        Number of different slices that were annotated.
    """

    dice: tuple[float, ...]
    seconds: tuple[float, ...] = ()
    slices: int = 0

    def __post_init__(self) -> None:
        if not self.dice or not all(0 <= value <= 1 for value in self.dice):
            raise ValueError(f"dice must hold numbers between 0 and 1, got {self.dice}.")
        if self.seconds and len(self.seconds) != len(self.dice) - 1:
            raise ValueError(
                f"seconds must have one entry per interaction ({len(self.dice) - 1}), got "
                f"{len(self.seconds)}."
            )


def dice_after(curve: InteractionCurve, interactions: int) -> float:
    """Return Dice after that many interactions, or fewer if the user had stopped."""
    return curve.dice[min(interactions, len(curve.dice) - 1)]


def normalised_auc(curve: InteractionCurve, interactions: int) -> float:
    """Return the area under Dice from the first to the last interaction, in [0, 1].

    Trapezoid rule, divided by the width; with one interaction, Dice after it.
    """
    values = [dice_after(curve, n) for n in range(1, interactions + 1)]
    if len(values) == 1:
        return values[0]
    return (sum(values) - (values[0] + values[-1]) / 2) / (len(values) - 1)


def interactions_until(curve: InteractionCurve, target: float) -> int | None:
    """Return how many interactions reach a Dice; 0: none is needed; None: not within `CAP`."""
    for n, value in enumerate(curve.dice[: CAP + 1]):
        if value >= target:
            return n
    return None


def annotated_slices(points: Iterable[Point], *, slice_axis: int = 0) -> int:
    """Return how many different slices have a click.

    Parameters
    ----------
    points : iterable of Point
        In voxels, (z, y, x).
    """
    return len({round(point.coordinates[slice_axis]) for point in points})


def interactive_report(curves: Sequence[InteractionCurve], *, interactions: int) -> dict[str, Any]:
    """Summarise curves over cases and objects.

    Parameters
    ----------
    interactions : int
        How many each user was allowed: a shorter curve is one where nothing was left to correct.

    Returns
    -------
    dict
        For JSON. ``dice``: mean after 0, 1, ..., all interactions, and at `REPORTED` (None if
        fewer were allowed). ``never_falls``: whether these means never do, and ``largest_fall``.
        ``noc``: of each target, mean number of interactions, with `CAP` for failures (also if
        fewer than `CAP` were allowed: then an upper bound), and their share. ``first_click``: mean
        gain of all curves, and of the quarter that was worst before. ``seconds``: median and
        largest, None if not measured.

    Raises
    ------
    ValueError
        If there is no curve, or one is longer than allowed.
    """
    longest = max((len(curve.dice) - 1 for curve in curves), default=0)
    if not curves or interactions < 1 or longest > interactions:
        raise ValueError(
            f"At least one curve and one interaction are needed, got {len(curves)} curves of up "
            f"to {longest} interactions, {interactions} allowed."
        )
    table = np.array([[dice_after(c, n) for n in range(interactions + 1)] for c in curves])
    means = table.mean(0)
    falls = np.maximum(means[:-1] - means[1:], 0)
    seconds = [value for curve in curves for value in curve.seconds]
    return {
        "curves": len(curves),
        "interactions": interactions,
        "dice": means.tolist(),
        "dice_at": {n: float(means[n]) if n <= interactions else None for n in REPORTED},
        "never_falls": bool((falls < 1e-9).all()),  # not the rounding of a mean
        "largest_fall": float(falls.max()),
        "auc": float(np.mean([normalised_auc(curve, interactions) for curve in curves])),
        "noc": {target: _number_of_clicks(curves, target) for target in TARGETS},
        "first_click": _first_click(table),
        "seconds": {
            "median": float(np.median(seconds)) if seconds else None,
            "largest": max(seconds, default=None),
        },
        "slices": float(np.mean([curve.slices for curve in curves])),
    }


def _number_of_clicks(curves: Sequence[InteractionCurve], target: float) -> dict[str, float]:
    needed = [interactions_until(curve, target) for curve in curves]
    return {
        "mean": float(np.mean([CAP if n is None else n for n in needed])),
        "failures": needed.count(None) / len(needed),
    }


def _first_click(table: np.ndarray) -> dict[str, float]:
    gains = table[:, 1] - table[:, 0]
    worst = np.argsort(table[:, 0], kind="stable")[: -(-len(table) // 4)]
    return {"gain": float(gains.mean()), "worst_quarter_gain": float(gains[worst].mean())}
