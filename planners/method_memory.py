"""Memory that a training step of a method needs, relative to plain nnU-Net."""

from collections.abc import Mapping

MEMORY_FACTOR: Mapping[str, float] = {
    "nnUNetTrainerMosaic": 1.0,
    "nnUNetTrainerSelfDisambiguation": 1.0,
    "nnUNetTrainerMultiRaterDiversified": 2.0,
    "nnUNetTrainerMultiRaterPersonalized": 2.0,
}
"""Trainer -> factor; 1 for all others. Self-disambiguation changes the loss only: on a CPU its
process took 1.00 times the memory (``python -m benchmarks.planning``). The first stage for many
raters took 1.7 (2D) to 2.0 times (3D) that of the steps alone, with nnU-Net's 32 features
(``python -m benchmarks.rater_cost``); the second stage shares its plans."""


def memory_factor(trainer: str | None) -> float:
    """Return the factor of a trainer; 1 if none is given."""
    return MEMORY_FACTOR.get(trainer or "", 1.0)
