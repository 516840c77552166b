"""Where a position in the world or in an image file lies in the array that the network sees.

methods/clustering_propagation.md, 5.4. The chain: world (mm) - index of the file (x, y, z) - array
of nnU-Net's reader (z, y, x) - ``transpose_forward`` - crop to what is not 0 - resampling. Every
step is affine, so the chain is one 4 x 4 matrix, and its inverse is the way back.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK

from nnmosaic.data_conversion.errors import InputError

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Of positions at the rim of an image, in voxels: files hold directions in single precision."""

REVERSED = np.eye(4)[[2, 1, 0, 3]]
"""x, y, z <-> z, y, x."""
RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))


@dataclass(frozen=True, eq=False)
class ImageGeometry:
    """Where the voxels of an array are.

    Attributes
    ----------
    shape : tuple of int
        Of the array that the reader returns, (z, y, x).
    file_to_array : ndarray, shape (4, 4)
        Index of the file (x, y, z) -> array index (z, y, x). Not just reversed if the reader
        reorients images.
    array_to_world : ndarray, shape (4, 4), or None
        Array index -> LPS, mm; None: the file does not say (PNG, TIFF).
    """

    shape: tuple[int, int, int]
    file_to_array: np.ndarray
    array_to_world: np.ndarray | None

    @classmethod
    def from_reader(cls, properties: Mapping[str, Any], shape: Sequence[int]) -> "ImageGeometry":
        """Take the geometry from what one of nnU-Net's readers says of an image.

        Parameters
        ----------
        shape : sequence of int
            Of the array that the reader returned, without channels.
        """
        z, y, x = (int(n) for n in shape)
        if "sitk_stuff" in properties:
            said = properties["sitk_stuff"]
            to_world = _itk_affine(said["spacing"], said["origin"], said["direction"])
            reoriented = np.eye(4)
            if "original_orientation" in said:
                now = SimpleITK.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(
                    said["direction"]
                )
                reoriented = _reorientation(said["original_orientation"], now, (x, y, z))
        elif "nibabel_stuff" in properties:
            said = properties["nibabel_stuff"]
            original = np.asarray(said["original_affine"], float)
            affine = np.asarray(said.get("reoriented_affine", original), float)
            to_world, reoriented = RAS_LPS @ affine, np.linalg.solve(affine, original)
        else:
            return cls((z, y, x), REVERSED, None)
        return cls((z, y, x), REVERSED @ reoriented, to_world @ REVERSED)


def _itk_affine(
    spacing: Sequence[float], origin: Sequence[float], direction: Sequence[float]
) -> np.ndarray:
    """Return index (x, y, z) -> LPS; of 2D images in the plane z = 0, of 4D ones without time."""
    size, used = len(spacing), min(len(spacing), 3)
    affine = np.eye(4)
    axes = np.reshape(direction, (size, size)) * np.asarray(spacing)
    affine[:used, :used] = axes[:used, :used]
    affine[:used, 3] = origin[:used]
    return affine


def _reorientation(before: str, after: str, shape: Sequence[int]) -> np.ndarray:
    """Return index in the file -> index after SimpleITK's DICOMOrient, both x, y, z.

    Parameters
    ----------
    before, after : str
        Orientations such as "LPS": the letters of an axis are the same or opposite.
    shape : sequence of int
        After, (x, y, z).
    """
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for axis, letter in enumerate(after):
        if letter in before:
            matrix[axis, before.index(letter)] = 1
        else:
            matrix[axis, before.index(OPPOSITE[letter])] = -1
            matrix[axis, 3] = shape[axis] - 1
    return matrix


@dataclass(frozen=True, eq=False)
class CaseCoordinates:
    """The way from a position in a preprocessed case's image to the network's array, and back.

    Attributes
    ----------
    array_to_network : ndarray, shape (4, 4)
        Index of the reader's array -> continuous index (slice, row, column) of the preprocessed
        image; 0 is the centre of the first pixel.
    crop : ndarray, shape (2, 3)
        Centres of the first and the last image voxel that was kept, in network coordinates.
    network_shape : tuple of int
        Slices, rows, columns.
    """

    geometry: ImageGeometry
    array_to_network: np.ndarray
    crop: np.ndarray
    network_shape: tuple[int, int, int]

    @classmethod
    def of_case(
        cls,
        properties: Mapping[str, Any],
        *,
        transpose_forward: Sequence[int],
        network_shape: Sequence[int],
    ) -> "CaseCoordinates":
        """Take the way from what nnU-Net's preprocessor left in ``properties``.

        Parameters
        ----------
        transpose_forward : sequence of int
            Of the plans.
        network_shape : sequence of int
            Of the preprocessed image, without channels.
        """
        before = np.empty(3, int)
        before[list(transpose_forward)] = properties["shape_before_cropping"]
        lower, upper = np.asarray(properties["bbox_used_for_cropping"], float).T
        # Borders of images coincide, not centres: i' = (i + 0.5) * new / old - 0.5.
        scale = np.asarray(network_shape) / (upper - lower)
        resample = np.eye(4)
        resample[:3, :3] = np.diag(scale)
        resample[:3, 3] = (0.5 - lower) * scale - 0.5
        crop = np.stack((0.5 * scale - 0.5, (upper - lower - 0.5) * scale - 0.5))
        slices, rows, columns = (int(n) for n in network_shape)
        return cls(
            ImageGeometry.from_reader(properties, before.tolist()),
            resample @ np.eye(4)[[*transpose_forward, 3]],
            crop,
            (slices, rows, columns),
        )

    @property
    def pixels_per_voxel(self) -> np.ndarray:
        """Network pixels per voxel of the image along slices, rows and columns, shape (3,)."""
        scale: np.ndarray = np.abs(self.array_to_network[:3, :3]).sum(1)
        return scale

    def voxel_centres(self, points: np.ndarray) -> np.ndarray:
        """Return the centres of the image's voxels that positions lie in, shape (N, 3).

        Parameters
        ----------
        points : ndarray, shape (N, 3)
            Slice, row, column of the network's array, as the result. A position in no voxel that
            was kept is taken to be in the nearest one.
        """
        first, last = self.crop
        voxels = np.floor((points - first) / self.pixels_per_voxel + 0.5)
        centres: np.ndarray = np.clip(first + voxels * self.pixels_per_voxel, first, last)
        return centres

    def to_network(
        self,
        points: np.ndarray,
        *,
        space: str,
        convention: str = "LPS",
        order: str = "xyz",
        where: str = "prompts",
    ) -> np.ndarray:
        """Return positions in the network's array, continuous in all axes.

        A position in the image, but in the part that was cropped, is moved to the nearest voxel
        that was kept, with a warning.

        Parameters
        ----------
        points : ndarray, shape (N, 3)
        space, convention, order : str
            As `nnmosaic.data_conversion.prompts.Prompts`.
        where : str
            What messages call the points.

        Returns
        -------
        ndarray, shape (N, 3)
            Slice, row, column.

        Raises
        ------
        InputError
            If a position is outside of the image, or the image has no place in the world.
        """
        points = np.asarray(points, float).reshape(-1, 3)
        to_array = np.linalg.inv(self._array_to(space, convention, order, where))
        return self.array_points_to_network(_apply(to_array, points), where=where, named=points)

    def array_points_to_network(
        self, points: np.ndarray, *, where: str, named: np.ndarray | None = None
    ) -> np.ndarray:
        """Return `to_network` of positions in the array that the reader returns (z, y, x).

        Parameters
        ----------
        named : ndarray, shape (N, 3), optional
            What an error calls the positions, if not as they are.
        """
        rim = 0.5 + TOLERANCE
        outside = (points < -rim) | (points > np.asarray(self.geometry.shape) - 1 + rim)
        if outside.any():
            first = int(outside.any(1).argmax())
            place = (points if named is None else named)[first]
            raise InputError(
                f"{where}: the position {[round(float(c), 3) for c in place]} is not in the image "
                f"(its array index z, y, x would be {points[first].round(1).tolist()}, the shape "
                f"is {list(self.geometry.shape)}). Check the position, and the space, convention "
                "and order of the file."
            )
        return self._into_crop(_apply(self.array_to_network, points), where)

    def from_network(
        self,
        points: np.ndarray,
        *,
        space: str,
        convention: str = "LPS",
        order: str = "xyz",
    ) -> np.ndarray:
        """Return the inverse of `to_network`, shape (N, 3)."""
        points = np.asarray(points, float).reshape(-1, 3)
        back = self._array_to(space, convention, order, "points") @ np.linalg.inv(
            self.array_to_network
        )
        return _apply(back, points)

    def _array_to(self, space: str, convention: str, order: str, where: str) -> np.ndarray:
        if space == "voxel":
            matrix = np.linalg.inv(self.geometry.file_to_array)
        elif self.geometry.array_to_world is None:
            raise InputError(
                f"{where}: the image has no place in the world (PNG and TIFF do not say it). Give "
                'positions with "space": "voxel".'
            )
        else:
            matrix = self.geometry.array_to_world
            matrix = RAS_LPS @ matrix if convention == "RAS" else matrix
        return REVERSED @ matrix if order == "zyx" else matrix

    def _into_crop(self, points: np.ndarray, where: str) -> np.ndarray:
        half = 0.5 * self.pixels_per_voxel * (1 + TOLERANCE)
        cropped = (points < self.crop[0] - half) | (points > self.crop[1] + half)
        moved = np.where(cropped, np.clip(points, *self.crop), points)
        if cropped.any():
            distance = np.abs(moved - points).max(0) / self.pixels_per_voxel
            logger.warning(
                "%s: %d of %d positions are where the image is 0 up to its border, which is cut "
                "off; moved to the nearest voxel, at most by %.0f voxels along an axis.",
                where, cropped.any(1).sum(), len(points), distance.max(),
            )  # fmt: skip
        return moved


def filled(voxels: np.ndarray, to_network: np.ndarray) -> np.ndarray:
    """Return positions all over voxels, so dense that no pixel of the network between them is left.

    Parameters
    ----------
    voxels : ndarray, shape (N, 3)
        Indices.
    to_network : ndarray, shape (4, 4)
        From these indices to pixels of the network.

    Returns
    -------
    ndarray, shape (M, 3), of float
        In the same coordinates as the voxels.
    """
    pixels = np.maximum(np.ceil(np.abs(to_network[:3, :3]).sum(0) - TOLERANCE), 1).astype(int)
    offsets = np.meshgrid(*((np.arange(n) + 0.5) / n - 0.5 for n in pixels), indexing="ij")
    within: np.ndarray = voxels[:, None] + np.stack(offsets, -1).reshape(1, -1, 3)
    return within.reshape(-1, 3)


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    result: np.ndarray = points @ matrix[:3, :3].T + matrix[:3, 3]
    return result
