"""Which masks are predicted of a case that several raters may see differently. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.plans_section import rater_plan
from nnmosaic.trainers import FIRST_STAGE, RATER_TRAINERS

RATERS, SAMPLES, LATENTS = "raters", "samples", "latents"
"""Folders of masks, as RATER/CASE and 000/CASE, and of the codes that they were made with."""
MAPS = ("entropy", "mutual_information", "variance")
"""Of the mean of the samples; the part of it on which they differ (nats); and their variance,
summed over the foreground classes."""
ALL = "all"


@dataclass(frozen=True)
class WantedMasks:
    """What is predicted of a case.

    Attributes
    ----------
    raters : tuple of str
        Whose own masks; ("all",) for every rater.
    samples : int
        Plausible masks, shared out among the networks of an ensemble.
    uncertainty : bool
        Whether maps of the samples are written.
    seed : int
        Samples depend on it, on the name of the case, and not on the order; raters' masks do not.
    """

    raters: tuple[str, ...] = ()
    samples: int = 0
    uncertainty: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.uncertainty and self.samples < 2:
            raise InputError("--uncertainty compares samples: add --samples 16, or at least 2.")
        if not (self.raters or self.samples):
            raise InputError("Nothing is asked for: give raters, or a number of samples.")

    def of(self, plans: Mapping[str, Any], trainer: str) -> "WantedMasks":
        """Return the same for a model, with the names of the raters.

        Raises
        ------
        InputError
            If the model cannot predict them.
        """
        if trainer not in RATER_TRAINERS:
            raise InputError(
                f"{trainer} knows no raters: --raters, --samples and --uncertainty are for models "
                f"of {' and '.join(RATER_TRAINERS)}."
            )
        if self.raters and trainer not in FIRST_STAGE:
            raise InputError(
                f"{trainer} has not learnt the masks of single raters: predict --samples, or train "
                f"{' or '.join(FIRST_STAGE)}."
            )
        plan = rater_plan(plans)
        raters = plan.raters if ALL in self.raters else tuple(dict.fromkeys(self.raters))
        unknown = [name for name in raters if name not in plan.raters]
        if unknown:
            raise InputError(
                f"--raters: the model does not know {', '.join(unknown)}. It knows "
                f"{', '.join(plan.raters)}."
            )
        return replace(self, raters=raters)


def masks_of_a_run(trainer: str) -> WantedMasks | None:
    """Return what ``nnmosaic run`` predicts with a trainer; None: what plain nnU-Net does."""
    if trainer in FIRST_STAGE:
        return WantedMasks((ALL,), samples=16, uncertainty=True)
    if trainer in RATER_TRAINERS:
        return WantedMasks(samples=16, uncertainty=True)
    return None
