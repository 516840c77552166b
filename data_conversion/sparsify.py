"""Sparse label maps from dense ones, to make an honest experiment.

Voxels that nobody is taken to have annotated get the label "ignore". Axes are those of the array
as nnU-Net's reader returns it: z, y, x for NIfTI through SimpleITK (the default); 2D images have a
first axis of length 1.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from nnmosaic.data_conversion.dataset_json import IGNORE
from nnmosaic.data_conversion.new_dataset import Relabelled, read_original, write_relabelled

BACKGROUND_DISTANCE = 3
"""Voxels (city block) from the foreground to its background scribble: clear of a blurred border."""


class Annotation(Protocol):
    """What is annotated of a dense label map."""

    def mask(
        self, label: np.ndarray, spacing: Sequence[float], *, ignore: int, case: str
    ) -> np.ndarray:
        """Return the annotated voxels.

        Parameters
        ----------
        label : ndarray, shape (Z, Y, X), int
            Dense label map.
        spacing : sequence of float
            In mm, per array axis.
        ignore : int
            Value of voxels that are unannotated already.
        case : str
            Name of the case.

        Returns
        -------
        ndarray, shape (Z, Y, X), bool
        """


@dataclass(frozen=True)
class Planes:
    """Planes whose index is above 0 and divisible by ``every``.

    Attributes
    ----------
    every : int
        At least 1. An axis too short for such a plane has its middle one annotated.
    axes : tuple of int
        Array axes that the planes are perpendicular to. Empty: the one with the largest spacing,
        the first of equal ones; in a 2D image axis 1, so that rows of pixels are annotated.
    """

    every: int
    axes: tuple[int, ...] = ()

    def mask(
        self, label: np.ndarray, spacing: Sequence[float], *, ignore: int, case: str
    ) -> np.ndarray:
        """Return the union of the planes of all axes; see `Annotation`."""
        mask = np.zeros(label.shape, dtype=bool)
        default = 1 if len(label) == 1 else through_plane_axis(spacing)
        for axis in self.axes or (default,):
            length = label.shape[axis]
            planes = np.arange(self.every, length, self.every)
            np.moveaxis(mask, axis, 0)[planes if len(planes) else length // 2] = True
        return mask


@dataclass(frozen=True)
class Scribbles:
    """A thin curve in each class of each plane along the axis with the largest spacing.

    In a class: the skeleton of each of its parts. In the background: a curve around the foreground,
    `BACKGROUND_DISTANCE` voxels from it (nearer or farther where there is no such voxel); in a
    plane without foreground, a curve halfway between the border and the centre of the background.
    """

    def mask(
        self, label: np.ndarray, spacing: Sequence[float], *, ignore: int, case: str
    ) -> np.ndarray:
        """Return the voxels of the curves; see `Annotation`."""
        mask = np.zeros(label.shape, dtype=bool)
        axis = through_plane_axis(spacing)
        for plane, drawn in zip(
            np.moveaxis(label, axis, 0), np.moveaxis(mask, axis, 0), strict=True
        ):
            drawn[...] = _scribble(plane, ignore)
        return mask


@dataclass(frozen=True)
class Cubes:
    """Cubes at random positions, the first half of them (rounded up) centred on foreground.

    They are cut off at the border of the image.

    Attributes
    ----------
    count : int
        At least 1.
    size : int
        Side in voxels, at least 1.
    seed : int
        At least 0. A case has the same cubes whichever other cases there are.
    """

    count: int
    size: int
    seed: int = 0

    def mask(
        self, label: np.ndarray, spacing: Sequence[float], *, ignore: int, case: str
    ) -> np.ndarray:
        """Return the union of the cubes; see `Annotation`."""
        rng = np.random.default_rng([self.seed, zlib.crc32(case.encode())])
        foreground = np.flatnonzero((label > 0) & (label != ignore))
        on_foreground = (self.count + 1) // 2 if len(foreground) else 0
        centres = [
            *(rng.choice(foreground, on_foreground) if on_foreground else ()),
            *rng.integers(label.size, size=self.count - on_foreground),
        ]
        mask = np.zeros(label.shape, dtype=bool)
        for centre in np.stack(np.unravel_index(centres, label.shape), axis=1):
            start = centre - self.size // 2
            mask[tuple(slice(max(0, s), s + self.size) for s in start)] = True
        return mask


def sparsify(
    folder: Path, target: Path, annotation: Annotation, *, copy_files: bool = False
) -> Relabelled:
    """Write a raw dataset in which only some voxels of another are annotated.

    The others become "ignore"; voxels that were so stay so. The complete label maps go to
    ``labelsTr_full``.

    Parameters
    ----------
    folder, target : Path
        The dataset, and the new one, which must not exist.
    annotation : Annotation
        `Planes`, `Scribbles` or `Cubes`.
    copy_files : bool
        Copy images and complete label maps instead of linking to them.

    Raises
    ------
    InputError
        If the dataset cannot be converted or a file is broken; nothing is written then.
    """
    original = read_original(folder)
    ignore = len(original.dataset.labels)  # where an ignore label already is

    def relabel(case: str, label: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        annotated = annotation.mask(label, spacing, ignore=ignore, case=case)
        return np.where(annotated, label, ignore)

    return write_relabelled(
        original,
        original.cases,
        target,
        relabel,
        labels={**original.dataset.labels, IGNORE: ignore},
        copy_files=copy_files,
    )


def through_plane_axis(spacing: Sequence[float]) -> int:
    """Return the array axis with the largest spacing, the first of equal ones."""
    return int(np.argmax(np.isclose(spacing, np.max(spacing), rtol=1e-4)))  # headers hold float32


def _scribble(plane: np.ndarray, ignore: int) -> np.ndarray:
    from skimage.morphology import skeletonize

    drawn: np.ndarray = np.zeros(plane.shape, dtype=bool)
    classes = [value for value in np.unique(plane) if value not in (0, ignore)]
    for value in classes:
        drawn |= skeletonize(plane == value)
    background = plane == 0
    if background.any():
        drawn |= _background_curve(background, np.isin(plane, classes))
    return drawn


def _background_curve(background: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    from scipy.ndimage import distance_transform_cdt

    if foreground.any():
        distance = distance_transform_cdt(~foreground, metric="taxicab")
        wanted = BACKGROUND_DISTANCE
    else:
        distance = distance_transform_cdt(np.pad(background, 1), metric="taxicab")[1:-1, 1:-1]
        wanted = (distance.max() + 1) // 2
    found = np.unique(distance[background])
    nearest = found[np.argmin(np.abs(found - wanted))]
    curve: np.ndarray = background & (distance == nearest)
    return curve
