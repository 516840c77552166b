"""Where things are: array index, world millimetres, and the grid that the page shows.

The array of an image is (z, y, x), and has other axes than the file if the reader reorients. World
coordinates are RAS+ millimetres, as in NIfTI. The page shows the array with its axes permuted and
flipped to be closest to RAS, as (x, y, z); it is told spacing and orientation of this display grid,
and never sees a rotation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from nnmosaic.trainers.clustering_propagation.coordinates import REVERSED, ImageGeometry

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Half-open range per axis."""


@dataclass(frozen=True)
class Grid:
    """The voxel grid of an image.

    Attributes
    ----------
    shape : tuple of int
        Of the array: (z, y, x).
    affine : ndarray, shape (4, 4)
        Index (x, y, z) of the array -> RAS millimetres.
    file_to_array : ndarray, shape (4, 4)
        Index of the file (x, y, z) -> array index (z, y, x).
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    file_to_array: np.ndarray = field(default_factory=REVERSED.copy)

    @classmethod
    def from_properties(cls, properties: Mapping[str, Any], shape: tuple[int, ...]) -> "Grid":
        """Return the grid of an array of nnU-Net's readers from the properties that came with it.

        A photograph has no orientation: its rows count downwards.
        """
        depth, height, width = shape
        geometry = ImageGeometry.from_reader(properties, shape)
        if geometry.array_to_world is None:
            to_lps = np.diag([*properties["spacing"][::-1], 1.0])
        else:
            to_lps = geometry.array_to_world @ REVERSED
        return cls((depth, height, width), LPS_TO_RAS @ to_lps, geometry.file_to_array)

    def from_file(self, indices: np.ndarray) -> np.ndarray:
        """Return continuous indices (z, y, x) of those of the file (x, y, z); both (N, 3)."""
        return np.asarray(indices @ self.file_to_array[:3, :3].T + self.file_to_array[:3, 3])

    def world_to_array(self, points: np.ndarray) -> np.ndarray:
        """Return continuous indices (z, y, x) of RAS millimetres; both have shape (N, 3)."""
        inverse = np.linalg.inv(self.affine)
        xyz = points @ inverse[:3, :3].T + inverse[:3, 3]
        return np.asarray(xyz[:, ::-1])

    def contains(self, indices: np.ndarray) -> np.ndarray:
        """Return which continuous indices (z, y, x), shape (N, 3), lie in a voxel; shape (N,)."""
        inside = (indices >= -0.5) & (indices <= np.array(self.shape) - 0.5)
        return np.asarray(inside.all(axis=1))

    @cached_property
    def _orientation(self) -> np.ndarray:
        """Per axis of (x, y, z): the display axis it becomes, and 1 or -1 (flipped)."""
        return np.asarray(io_orientation(self.affine))

    @cached_property
    def display_shape(self) -> tuple[int, int, int]:
        """Voxels along the display axes."""
        x, y, z = np.array(self.shape[::-1])[np.argsort(self._orientation[:, 0])].tolist()
        return x, y, z

    @cached_property
    def display_affine(self) -> np.ndarray:
        """Display index -> RAS millimetres, shape (4, 4)."""
        return np.asarray(self.affine @ inv_ornt_aff(self._orientation, self.shape[::-1]))

    @property
    def display_spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxels along the display axes."""
        x, y, z = np.linalg.norm(self.display_affine[:3, :3], axis=0).tolist()
        return x, y, z

    def to_display(self, array: np.ndarray) -> np.ndarray:
        """Return an array (z, y, x), or a box cut from one, with the axes of the display."""
        return np.asarray(apply_orientation(array.T, self._orientation))

    def display_box(self, box: Box) -> Box:
        """Return the same box, given in (z, y, x), on the display grid."""
        on_display: dict[int, tuple[int, int]] = {}
        for axis, (lower, upper) in enumerate(box):
            to, flip = self._orientation[2 - axis]
            last = self.shape[axis]
            on_display[int(to)] = (lower, upper) if flip > 0 else (last - upper, last - lower)
        return on_display[0], on_display[1], on_display[2]

    def display_axis(self, axis: int) -> int:
        """Return the display axis of an array axis."""
        return int(self._orientation[2 - axis, 0])

    def display_index(self, axis: int, index: int) -> int:
        """Return where a slice along an array axis is on the display."""
        return index if self._orientation[2 - axis, 1] > 0 else self.shape[axis] - 1 - index

    def world_to_display(self, points: np.ndarray) -> np.ndarray:
        """Return continuous display indices (x, y, z) of RAS millimetres; both (N, 3)."""
        inverse = np.linalg.inv(self.display_affine)
        return np.asarray(points @ inverse[:3, :3].T + inverse[:3, 3])

    def array_to_world(self, indices: np.ndarray) -> np.ndarray:
        """Return RAS millimetres of continuous indices (z, y, x); both have shape (N, 3)."""
        return np.asarray(indices[:, ::-1] @ self.affine[:3, :3].T + self.affine[:3, 3])


def changed_box(before: np.ndarray, after: np.ndarray) -> Box | None:
    """Return the smallest box that holds every voxel in which two label maps differ."""
    different = before != after
    ranges = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        (indices,) = np.nonzero(different.any(axis=others))
        if not len(indices):
            return None
        ranges.append((int(indices[0]), int(indices[-1]) + 1))
    return ranges[0], ranges[1], ranges[2]


def display_nifti(channel: np.ndarray, grid: Grid) -> bytes:
    """Return one channel (z, y, x) as NIfTI on the display grid, centred and without rotation.

    Whole numbers travel as int16 where they fit: half the bytes, and nothing is lost. The header's
    display range leaves out the extremes, and the lowest value, which most of the background has.
    """
    array = grid.to_display(channel)
    rounded = array.astype(np.int16) if np.abs(array).max(initial=0) < 2**15 else None
    if rounded is not None and np.array_equal(rounded, array):
        array = rounded
    affine = np.diag([*grid.display_spacing, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(grid.display_shape) - 1) / 2
    nifti = nibabel.Nifti1Image(array, affine)
    nifti.header["cal_min"], nifti.header["cal_max"] = _display_range(array)
    return bytes(nifti.to_bytes())


def _display_range(array: np.ndarray) -> tuple[float, float]:
    lowest, highest = float(array.min()), float(array.max())
    above = array[array > lowest]
    black, white = np.percentile(above, (0.5, 99.5)).tolist() if above.size else (lowest, highest)
    return (black, white) if black < white else (lowest, highest)
