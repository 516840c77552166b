"""Interactions of a person as weighted positions in single slices of the network's array.

methods/clustering_propagation.md, 1.6 and 5.4: a point has weight 1 at a sub-pixel position, a
scribble and a mask have weight 1 at their pixels, a box has its interior, heavier in the middle,
and a ring outside where the label is not. Our own choices where the method says no number.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.prompts import (
    Box,
    Interaction,
    Label,
    Mask,
    Point,
    Prompts,
    Scribble,
)
from nnmosaic.trainers.clustering_propagation.box import box_pixels
from nnmosaic.trainers.clustering_propagation.coordinates import (
    CaseCoordinates,
    ImageGeometry,
    filled,
)

ReadMask = Callable[[Path], tuple[np.ndarray, Mapping[str, Any]]]
"""As ``read_seg`` of nnU-Net's readers: array (1, z, y, x) and properties of an image file."""
ROUNDING = 1e-6
"""Pixels by which computed positions are wrong at most."""


@dataclass(frozen=True, eq=False)
class SlicePrompt:
    """What an interaction says of one slice.

    Attributes
    ----------
    label : int or tuple of int
        Integer of the label map, or the integers of a region.
    slice_index : int
        Along axis 0 of the network's array.
    rows, columns, weights : ndarray, shape (P,)
        Continuous positions in the network's array, within the slice, and their weights.
    positive : bool
        Whether the label is there, or is not there.
    exact : bool
        Whether every position shows it. False for boxes, whose interior is more than the object.
    clicked : bool
        Whether it comes from a point or a line, which speak for what is around them.
    voxels : ndarray, shape (V, 2), optional
        Rows and columns of the centres of the image's voxels that show it for sure, of a point.
    ring : bool
        Whether it is around a box: the label is not there, but what it is a part of may be.
    """

    label: Label
    slice_index: int
    rows: np.ndarray
    columns: np.ndarray
    weights: np.ndarray
    positive: bool = True
    round: int = 0
    exact: bool = True
    clicked: bool = False
    voxels: np.ndarray | None = None
    ring: bool = False

    def weight_map(self, shape: tuple[int, int]) -> np.ndarray:
        """Return the weights of whole pixels, shape (rows, columns), float32.

        A position gives its weight to the four pixels around it, so that a mean under the map is
        a mean of bilinear samples.
        """
        weights = np.zeros(shape, np.float32)
        row, column = (np.floor(position).astype(int) for position in (self.rows, self.columns))
        lower, right = self.rows - row, self.columns - column
        for down, aside in product((0, 1), repeat=2):
            share = self.weights * np.abs(1 - down - lower) * np.abs(1 - aside - right)
            # At the last row or column the share of the pixel beyond it is 0.
            places = np.minimum(row + down, shape[0] - 1), np.minimum(column + aside, shape[1] - 1)
            np.add.at(weights, places, share)
        return weights

    def pixels(self, shape: tuple[int, int]) -> np.ndarray:
        """Return the pixels that show it: those that the voxels, or else the positions, lie in.

        Shape (rows, columns), bool.
        """
        places = np.stack((self.rows, self.columns), 1) if self.voxels is None else self.voxels
        return _drawn(_nearest(places, np.array(shape)), shape)

    def sure_pixels(self, shape: tuple[int, int]) -> np.ndarray:
        """Return all pixels that must show it, shape (rows, columns), bool.

        The result is interpolated linearly on its way to the image's grid, so that up to four
        pixels decide a voxel. Where two voxels share some of them, the later one has them.
        """
        drawn = self.pixels(shape)
        if self.voxels is not None:
            ends = np.floor(self.voxels + ROUNDING), np.ceil(self.voxels - ROUNDING)
            for row, column in product(ends, repeat=2):
                corner = np.stack((row[:, 0], column[:, 1]), 1)
                drawn |= _drawn(_nearest(corner, np.array(shape)), shape)
        return drawn


def slice_prompts(
    prompts: Prompts,
    coordinates: CaseCoordinates,
    *,
    read_mask: ReadMask,
    where: str = "prompts",
) -> tuple[SlicePrompt, ...]:
    """Return what all interactions say of the slices that they touch.

    Parameters
    ----------
    read_mask : callable
        Reads a mask file, with the reader of the images.
    where : str
        What messages call the prompts: their file.

    Raises
    ------
    InputError
        If an interaction is not in the image, or a mask is empty or does not fit.
    """
    found: list[SlicePrompt] = []
    for i, interaction in enumerate(prompts.interactions):
        name = f"{where}: interactions[{i}] ({type(interaction).__name__.lower()})"
        if isinstance(interaction, Mask):
            array, properties = read_mask(interaction.file)
            points = _mask_points(array[0], properties, coordinates, f"{name}, {interaction.file}")
            found += _by_slice(interaction, points, coordinates)
            continue
        points = coordinates.to_network(
            np.array(_positions(interaction)),
            space=prompts.space,
            convention=prompts.convention,
            order=prompts.order,
            where=name,
        )
        if isinstance(interaction, Point):
            (prompt,) = _by_slice(interaction, points, coordinates)
            found.append(replace(prompt, voxels=coordinates.voxel_centres(points)[:, 1:]))
        elif isinstance(interaction, Scribble):
            found += _by_slice(interaction, _line(points, interaction, coordinates), coordinates)
        else:
            found += _box(interaction, points, coordinates)
    return tuple(found)


def _positions(interaction: Point | Scribble | Box) -> list[tuple[float, ...]]:
    if isinstance(interaction, Point):
        return [interaction.coordinates]
    if isinstance(interaction, Scribble):
        return list(interaction.coordinates)
    return list(product(*zip(interaction.lower, interaction.upper, strict=True)))


def _nearest(positions: np.ndarray, size: int | np.ndarray) -> np.ndarray:
    """Return the index of the pixel or slice that each position lies in."""
    index: np.ndarray = np.clip(np.floor(positions + 0.5), 0, size - 1).astype(int)
    return index


def _drawn(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a mask (rows, columns) of pixels (P, 2)."""
    mask = np.zeros(shape, bool)
    mask[tuple(pixels.T)] = True
    return mask


def _by_slice(
    interaction: Interaction, points: np.ndarray, coordinates: CaseCoordinates
) -> list[SlicePrompt]:
    return by_slice(
        points, coordinates, interaction.label, positive=interaction.positive,
        round=interaction.round, clicked=isinstance(interaction, Point | Scribble),
    )  # fmt: skip


def by_slice(
    points: np.ndarray,
    coordinates: CaseCoordinates,
    label: Label,
    *,
    positive: bool,
    round: int,
    clicked: bool = False,
) -> list[SlicePrompt]:
    """Return weight 1 at points (P, 3) in network coordinates, each in the slice it lies in."""
    slices = _nearest(points[:, 0], coordinates.network_shape[0])
    last = np.array(coordinates.network_shape[1:]) - 1
    prompts = []
    for index in np.unique(slices):
        rows, columns = np.clip(points[slices == index, 1:], 0, last).T
        prompts.append(
            SlicePrompt(
                label,
                int(index),
                rows,
                columns,
                np.ones(len(rows)),
                positive=positive,
                round=round,
                clicked=clicked,
            )
        )
    return prompts


def _line(corners: np.ndarray, scribble: Scribble, coordinates: CaseCoordinates) -> np.ndarray:
    """Return the pixels (slice, row, column) that a line of some width covers."""
    samples = [corners[:1]]
    for start, end in pairwise(corners):
        steps = int(np.ceil(2 * np.abs(end - start).max())) + 1
        samples.append(start + (end - start) * np.linspace(0, 1, steps + 1)[1:, None])
    shape = np.array(coordinates.network_shape)
    centres = np.unique(_nearest(np.concatenate(samples), shape), axis=0)
    radii = np.maximum(scribble.radius * coordinates.pixels_per_voxel[1:], 1e-6)
    reach = np.floor(radii).astype(int)
    disc = [
        (0, row, column)
        for row in range(-reach[0], reach[0] + 1)
        for column in range(-reach[1], reach[1] + 1)
        if (row / radii[0]) ** 2 + (column / radii[1]) ** 2 <= 1
    ]
    covered = np.zeros(shape, bool)
    for offset in disc:
        places = centres + offset
        inside = ((places >= 0) & (places < shape)).all(1)
        covered[tuple(places[inside].T)] = True
    return np.argwhere(covered).astype(float)


def _mask_points(
    array: np.ndarray,
    properties: Mapping[str, Any],
    coordinates: CaseCoordinates,
    where: str,
) -> np.ndarray:
    """Return where the voxels above 0 of a mask are, shape (P, 3).

    A mask with a place in the world may cover a part of the image only, such as one slice.
    """
    voxels = np.argwhere(array > 0).astype(float)
    if not len(voxels):
        raise InputError(f"{where}: no voxel is above 0. Draw the label, or remove the entry.")
    mask = ImageGeometry.from_reader(properties, array.shape)
    if mask.array_to_world is not None and coordinates.geometry.array_to_world is not None:
        from_world = np.linalg.inv(coordinates.geometry.array_to_world)
        to_network = coordinates.array_to_network @ from_world @ mask.array_to_world
        world = filled(voxels, to_network) @ mask.array_to_world[:3, :3].T
        world += mask.array_to_world[:3, 3]
        return coordinates.to_network(world, space="world", where=where)
    if array.shape != coordinates.geometry.shape:
        raise InputError(
            f"{where}: the shape is {list(array.shape)}, that of the image "
            f"{list(coordinates.geometry.shape)}. Draw the mask on the image."
        )
    voxels = filled(voxels, coordinates.array_to_network)
    return coordinates.array_points_to_network(voxels, where=where)


def _box(box: Box, corners: np.ndarray, coordinates: CaseCoordinates) -> list[SlicePrompt]:
    """Return interior and ring of the slices of a box.

    A box that is oblique to the image is replaced by the smallest upright one around it.
    """
    shape = coordinates.network_shape
    first, last = _nearest(np.stack((corners.min(0), corners.max(0)))[:, 0], shape[0])
    half = 0.5 * coordinates.pixels_per_voxel[1:]  # the outermost voxels belong to the box
    lower, upper = corners.min(0)[1:] - half, corners.max(0)[1:] + half
    weights, ring = box_pixels(lower, upper, (shape[1], shape[2]))
    parts = [(weights, False)]
    if box.positive and ring.any():
        parts.append((ring.astype(float), True))
    found = []
    for index in range(int(first), int(last) + 1):
        for weight, is_ring in parts:
            rows, columns = weight.nonzero()
            prompt = SlicePrompt(
                box.label, index, rows, columns, weight[rows, columns],
                positive=box.positive and not is_ring, round=box.round, exact=False, ring=is_ring,
            )  # fmt: skip
            found.append(prompt)
    return found
