"""What the page needs of a model that is corrected by clicks and scribbles."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Zyx = tuple[float, float, float]
"""Continuous array index (z, y, x) of the original image; voxel centres are whole numbers."""


class Session(Protocol):
    """One case at a time; calls come one after another.

    Attributes
    ----------
    labels : dict of str to int
        Foreground class -> its value in the label map.
    slice_axis : int
        Array axis of the open case (0 = z, 1 = y, 2 = x) along which the model goes from slice to
        slice; `suggest_slice` counts along it.
    """

    labels: dict[str, int]

    @property
    def slice_axis(self) -> int: ...  # noqa: D102 - in the docstring of the class

    def open(self, image_files: list[Path]) -> None:
        """Read a case (one file per channel) and compute the automatic result: slow."""

    def label_map(self) -> np.ndarray:
        """Return the present result: uint8, shape (Z, Y, X), as the image's array."""

    def save(self, path: Path) -> None:
        """Write the result with the geometry of the image, in one step."""

    def add_point(self, coordinates_zyx: Zyx, label: str, positive: bool) -> object:
        """Take one click, and compute what follows from it."""

    def add_scribble(
        self, coordinates_zyx: Sequence[Zyx], label: str, positive: bool, radius: float
    ) -> object:
        """Take one stroke; ``radius`` is in voxels."""

    def undo(self) -> bool:
        """Take the last click or stroke back; False: there is none."""

    def reset(self) -> None:
        """Go back to the automatic result."""

    def prompts(self) -> dict[str, Any]:
        """Return all clicks and strokes (JSON of methods/clustering_propagation.md, 5.4)."""

    def suggest_slice(self) -> int | None:
        """Return the slice where a click is likely to help most."""
