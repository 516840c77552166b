"""Ways through the slices of a volume, by name. Imports no torch."""

from typing import Literal, TypeAlias

Sweep: TypeAlias = Literal["both", "up", "down", "centre_out", "none"]
SWEEPS: tuple[Sweep, ...] = ("both", "up", "down", "centre_out", "none")
"""Up and down, averaged; up; down; from the slice that shows most to both ends; each slice by
itself, as nnU-Net's own predictor does with the same model."""
