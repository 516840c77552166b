"""A user who knows the reference and clicks on what is wrong, to evaluate interaction.

methods/clustering_propagation.md, 4: round 0 is automatic, round 1 a click in the middle of the
object on the slice where it is largest, then one click in the middle of the largest error of the
worst slice. Works on label maps as they are, without network or geometry.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from nnmosaic.data_conversion.prompts import Label, Point

MIN_PIXELS = 100
MIN_SHARE = 0.1
"""A slice is judged by its overlap only if prediction and reference together have `MIN_PIXELS`
there, as in Mem3D's evaluation, or `MIN_SHARE` of what they have on their largest slice: the whole
hippocampus has less than 100 on many slices. Mem3D counts the reference alone, which overlooks
slices where an object is only predicted."""

SPACE, ORDER = "voxel", "zyx"
"""Of the points, as `nnmosaic.data_conversion.prompts.Prompts` calls them."""


Voxel = tuple[int, int, int]


@dataclass(frozen=True)
class OracleUser:
    """The deterministic user: shows an object in round 1, then clicks on its worst error.

    Attributes
    ----------
    ignore_label : int, optional
        Integer of voxels of the reference that nobody annotated: neither clicked nor judged.
    slice_axis : int
        Axis of the arrays along which the network sees slices (``transpose_forward[0]``).
    spacing : tuple of float
        Of the two axes of a slice, mm, in their order.
    """

    ignore_label: int | None = None
    slice_axis: int = 0
    spacing: tuple[float, float] = (1.0, 1.0)

    def click(
        self,
        reference: np.ndarray,
        current: np.ndarray,
        label: Label,
        *,
        round: int,
        previous: Sequence[Point] = (),
    ) -> Point | None:
        """Return the next click for one object; None: nothing is left to correct.

        Parameters
        ----------
        reference, current : ndarray, int, shape (Z, Y, X)
        label : int or tuple of int
            The object; a tuple is a region of a dataset with overlapping regions.
        round : int
            From 1 on. Round 1 shows the object, whether it was found or not.
        previous : sequence of Point
            Earlier clicks; no voxel is clicked twice.

        Returns
        -------
        Point or None
            In voxels, (z, y, x). Not positive where the object is not.
        """
        voxel = self._voxel(reference, current, label, round=round, previous=previous)
        if voxel is None:
            return None
        return self._point(label, voxel, bool(np.isin(reference[voxel], label)), round)

    def clicks(
        self,
        reference: np.ndarray,
        current: np.ndarray,
        labels: Sequence[Label],
        *,
        round: int,
        previous: Sequence[Point] = (),
    ) -> tuple[Point, ...]:
        """Return one click for each object that needs one, as `click`.

        Where an object is not, the user says what is there instead, so that all are positive; two
        objects may ask for the same click, which is then made once.
        """
        points = []
        for label in labels:
            voxel = self._voxel(reference, current, label, round=round, previous=previous)
            if voxel is not None:
                is_there = np.isin(reference[voxel], label)
                points.append(
                    self._point(label if is_there else int(reference[voxel]), voxel, True, round)
                )
        return tuple(dict.fromkeys(points))

    def _point(self, label: Label, voxel: Voxel, positive: bool, number: int) -> Point:
        z, y, x = (float(i) for i in voxel)
        return Point(label, (z, y, x), positive, number)

    def _voxel(
        self,
        reference: np.ndarray,
        current: np.ndarray,
        label: Label,
        *,
        round: int,
        previous: Sequence[Point],
    ) -> Voxel | None:
        if reference.shape != current.shape or reference.ndim != 3:
            raise ValueError(
                f"reference and current must be volumes of one shape, got {reference.shape} and "
                f"{current.shape}."
            )
        judged = reference != self.ignore_label  # without such a label: everywhere
        free = judged.copy()
        for point in previous:
            z, y, x = (int(c) for c in point.coordinates)
            free[z, y, x] = False
        drawn, found, free = (
            np.moveaxis(mask, self.slice_axis, 0)
            for mask in (np.isin(reference, label) & judged, np.isin(current, label) & judged, free)
        )
        if round == 1 and (drawn & free).any():
            voxel: Voxel | None = self._show(drawn & free)
        else:
            voxel = self._correct(drawn & ~found & free, found & ~drawn & free, drawn | found)
        if voxel is None:
            return None
        in_plane = [*voxel[1:]]
        in_plane.insert(self.slice_axis, voxel[0])
        z, y, x = in_plane
        return z, y, x

    def _show(self, drawn: np.ndarray) -> Voxel:
        index = int(drawn.sum((1, 2)).argmax())
        return (index, *self._middle(drawn[index])[1])

    def _correct(self, missed: np.ndarray, wrong: np.ndarray, union: np.ndarray) -> Voxel | None:
        """Return a voxel where an object was missed or wrongly found; ``union``: where either."""
        errors, areas = (mask.sum((1, 2)) for mask in (missed | wrong, union))
        if not errors.any():
            return None
        judged = (errors > 0) & (areas >= min(MIN_PIXELS, MIN_SHARE * areas.max()))
        candidates = np.flatnonzero(judged if judged.any() else errors > 0)
        # Lowest overlap first; of equal ones the largest error, then the first slice.
        share = errors[candidates] / areas[candidates]
        index = int(candidates[np.lexsort((-errors[candidates], -share))[0]])
        parts = [self._middle(mask[index]) for mask in (missed, wrong) if mask[index].any()]
        return (index, *max(parts, key=lambda part: part[0])[1])

    def _middle(self, mask: np.ndarray) -> tuple[int, tuple[int, int]]:
        """Return the size of the largest connected part, and its pixel farthest from its edge."""
        parts, _ = ndimage.label(mask, np.ones((3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        largest = np.pad(parts == sizes.argmax() + 1, 1)  # the rim of the image is an edge
        depth = ndimage.distance_transform_edt(largest, self.spacing)[1:-1, 1:-1]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        return int(sizes.max()), (int(row), int(column))
