"""A simulated user for training (clustering_propagation.md, 2).

Each interaction is drawn on the masks of one slice, and only then turned into weights of pixels. A
pixel's prompts follow from the masks alone, so that labels and regions differ in one function.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.box import box_pixels

KINDS = {"point": 0.6, "scribble": 0.25, "box": 0.1, "mask": 0.05}
"""How often each kind of interaction is drawn."""
MOST_INTERACTIONS = 3
"""Of a class in the first round."""
CLICKED = 0.5
"""Probability that a class that is present gets interactions; one does in any case."""
BACKGROUND_CLICK = 0.2
"""Probability of a click on the background in the first round."""
JITTER = 1.0
"""Standard deviation of a click's position, in pixels."""
OUTSIDE = 0.03
"""Probability that a click lands 1 to 3 pixels outside of its mask."""
BY_DEPTH, ON_BORDER = 0.4, 0.1
"""Probabilities of a click that likes the middle, and of one near the border; else anywhere."""
BORDER_BAND = 2
"""Width in pixels."""

Mask: TypeAlias = NDArray[np.bool_]


class Pixels(NamedTuple):
    """Where an interaction is, in pixels of one slice, each array of shape (n,).

    Attributes
    ----------
    rows, columns : ndarray of float
        Pixel centres are whole numbers.
    weights : ndarray of float
        Above 0.
    """

    rows: NDArray[Any]
    columns: NDArray[Any]
    weights: NDArray[Any]


class Interaction(NamedTuple):
    """Pixels that are prompts of some kind.

    Attributes
    ----------
    pixels : Pixels
    slots : tuple of int
        The prompts of the network that they belong to.
    """

    pixels: Pixels
    slots: tuple[int, ...]


class SliceView(NamedTuple):
    """What the user sees of a slice.

    Attributes
    ----------
    masks : ndarray of bool, shape (K, H, W)
        The truth, in the order of the output channels.
    annotated : ndarray of bool, shape (H, W)
        Elsewhere the user says nothing.
    predicted : ndarray of bool, shape (K, H, W), optional
    regions : bool
        Whether the masks may overlap, and have no background among them.
    """

    masks: Mask
    annotated: Mask
    predicted: Mask | None
    regions: bool

    @property
    def background(self) -> Mask:
        """Annotated pixels of no class."""
        return (~self.masks.any(0) if self.regions else self.masks[0]) & self.annotated

    @property
    def objects(self) -> list[int]:
        """Classes other than the background that are there."""
        return [k for k in range(0 if self.regions else 1, len(self.masks)) if self.masks[k].any()]

    def slots(self, inside: Mask) -> tuple[int, ...]:
        """Return the prompts that pixels are: of the classes that hold all of them (5.5).

        With regions they are also negative prompts, of regions that hold none of them but are
        predicted at one of them; before any prediction, those of the background are for all.
        """
        holding = [k for k, mask in enumerate(self.masks) if mask[inside].all()]
        if not self.regions:
            return tuple(holding)
        number = len(self.masks)
        if self.predicted is None:
            wrong = [] if holding else list(range(number))
        else:
            wrong = [
                r for r in range(number)
                if self.predicted[r][inside].any() and not self.masks[r][inside].any()
            ]  # fmt: skip
        return (*holding, *(number + r for r in wrong))

    def slots_at(self, pixel: tuple[int, int]) -> tuple[int, ...]:
        """Return the prompts that a click on a pixel is."""
        inside = np.zeros(self.annotated.shape, bool)
        inside[pixel] = True
        return self.slots(inside)


# -------------------------------------------------------------------- where to point at


def component(mask: Mask, generator: Generator) -> Mask:
    """Return a connected part of a mask, drawn in proportion to its area."""
    labels, _ = ndimage.label(mask)
    return np.asarray(labels == generator.choice(labels[mask]))


def largest_component(mask: Mask) -> Mask:
    """Return the largest connected part of a mask that is not empty."""
    labels, number = ndimage.label(mask)
    return np.asarray(labels == 1 + np.bincount(labels[mask])[1 : number + 1].argmax())


def draw_pixel(part: Mask, generator: Generator) -> tuple[int, int]:
    """Draw a pixel of a mask: anywhere, the rather the deeper inside, or near the border."""
    depth = ndimage.distance_transform_cdt(np.pad(part, 1))[1:-1, 1:-1]
    how = generator.uniform()
    weights = part.astype(float)
    if how < BY_DEPTH:
        weights = np.expm1(depth - depth.max()) - np.expm1(-float(depth.max()))
    elif how < BY_DEPTH + ON_BORDER:
        weights = (part & (depth <= BORDER_BAND)).astype(float)
    place = generator.choice(part.size, p=(weights / weights.sum()).ravel())
    row, column = np.unravel_index(place, part.shape)
    return int(row), int(column)


def shake(pixel: tuple[int, int], part: Mask, allowed: Mask, generator: Generator) -> Pixels:
    """Return a point near a pixel, as imprecise as a hand; the pixel itself if it is not allowed.

    Parameters
    ----------
    pixel : tuple of int
    part : ndarray of bool, shape (H, W)
        The mask that the pixel is of.
    allowed : ndarray of bool, shape (H, W)
        Pixels that the user may click on.
    """
    place = np.asarray(pixel) + generator.normal(0, JITTER, 2)
    if generator.uniform() < OUTSIDE:
        distance = ndimage.distance_transform_cdt(~part)
        around = np.argwhere((distance >= 1) & (distance <= 3) & allowed)
        place = generator.choice(around).astype(float) if len(around) else place
    place = np.clip(place, 0, np.asarray(part.shape) - 1)
    # A point has weight on the four pixels around it.
    (top, left), (bottom, right) = np.floor(place).astype(int), np.ceil(place).astype(int)
    if not allowed[top : bottom + 1, left : right + 1].all():
        place = np.asarray(pixel, float)
    return Pixels(place[:1], place[1:], np.ones(1))


# -------------------------------------------------------------------- kinds of interaction


def _point(part: Mask, view: SliceView, generator: Generator) -> list[Interaction]:
    pixel = draw_pixel(part, generator)
    return [Interaction(shake(pixel, part, view.annotated, generator), view.slots_at(pixel))]


def _scribble(part: Mask, view: SliceView, generator: Generator) -> list[Interaction]:
    """Return the pixels of the part on a line through three of its pixels."""
    corners = np.array([draw_pixel(part, generator) for _ in range(3)], float)
    steps = int(np.abs(np.diff(corners, axis=0)).max()) + 1
    path = np.concatenate([np.linspace(a, b, steps) for a, b in pairwise(corners)])
    drawn = np.zeros(part.shape, bool)
    drawn[tuple(path.round().astype(int).T)] = True
    return _pixels(drawn & part, view)


def _box(part: Mask, view: SliceView, generator: Generator) -> list[Interaction]:
    """Return the inside of a box, most of all its middle, and the ring around it as background."""
    (box,) = ndimage.find_objects(part.astype(np.uint8))
    lower = np.array([side.start for side in box]) - generator.integers(0, 2, 2) - 0.5
    upper = np.array([side.stop for side in box]) + generator.integers(0, 2, 2) - 0.5
    weights, ring = box_pixels(lower, upper, view.annotated.shape)
    weights *= view.annotated
    rows, columns = np.nonzero(weights)
    pixels = Pixels(rows.astype(float), columns.astype(float), weights[rows, columns])
    found = [Interaction(pixels, view.slots(part))]
    ring &= view.background
    return [*found, *(_pixels(ring, view) if ring.any() else [])]


def _mask(part: Mask, view: SliceView, generator: Generator) -> list[Interaction]:
    return _pixels(part, view)


def _pixels(chosen: Mask, view: SliceView) -> list[Interaction]:
    rows, columns = np.nonzero(chosen)
    pixels = Pixels(rows.astype(float), columns.astype(float), np.ones(len(rows)))
    return [Interaction(pixels, view.slots(chosen))]


_DRAW: dict[str, Callable[[Mask, SliceView, Generator], list[Interaction]]] = {
    "point": _point,
    "scribble": _scribble,
    "box": _box,
    "mask": _mask,
}


# -------------------------------------------------------------------- rounds


def first_round(view: SliceView, generator: Generator) -> list[Interaction]:
    """Draw interactions on some of the classes of a slice, at least one, by masks alone."""
    found: list[Interaction] = []
    objects = view.objects
    chosen = [k for k in objects if generator.uniform() < CLICKED]
    for k in chosen or generator.permutation(objects)[:1].astype(int):
        for _ in range(generator.integers(1, MOST_INTERACTIONS + 1)):
            part = component(view.masks[k], generator)
            kind = generator.choice(list(KINDS), p=list(KINDS.values()))
            found += _DRAW[kind](part, view, generator)
    if view.background.any() and generator.uniform() < BACKGROUND_CLICK:
        found += _point(component(view.background, generator), view, generator)
    return found


def click_per_class(view: SliceView, generator: Generator) -> list[Interaction]:
    """Draw a click on each class of a slice, without error."""
    found = []
    for k in view.objects:
        row, column = draw_pixel(largest_component(view.masks[k]), generator)
        pixels = Pixels(np.array([float(row)]), np.array([float(column)]), np.ones(1))
        found.append(Interaction(pixels, view.slots_at((row, column))))
    return found


def errors(view: SliceView) -> list[Mask]:
    """Return the masks of each way to be wrong: missed pixels of a class; of regions also extra."""
    predicted = view.predicted
    if predicted is None:
        return []
    missed = [mask & ~found for mask, found in zip(view.masks, predicted, strict=True)]
    extra = [found & ~mask for mask, found in zip(view.masks, predicted, strict=True)]
    wrong = [*missed, *extra] if view.regions else missed
    return [mask & view.annotated for mask in wrong]


def correction(view: SliceView, generator: Generator) -> list[Interaction]:
    """Draw a click on the largest connected error of a slice; none where all is right."""
    parts = [largest_component(mask) for mask in errors(view) if mask.any()]
    if not parts:
        return []
    part = max(parts, key=np.count_nonzero)
    return _point(part, view, generator)


# -------------------------------------------------------------------- weights


def splat(pixels: Pixels, shape: tuple[int, int]) -> Tensor:
    """Return weights (H, W) of points, each shared by the four pixels around it, bilinearly.

    Parameters
    ----------
    pixels : Pixels
        Inside the slice.
    shape : tuple of int
    """
    weights = torch.zeros(shape)
    rows, columns, amounts = (torch.as_tensor(x, dtype=torch.float32) for x in pixels)
    top, left = rows.floor(), columns.floor()
    for row, share_row in ((top, top + 1 - rows), (top + 1, rows - top)):
        for column, share in ((left, left + 1 - columns), (left + 1, columns - left)):
            part = amounts * share_row * share
            used = part > 0
            weights.index_put_((row[used].long(), column[used].long()), part[used], accumulate=True)
    return weights


def add_to(weights: Tensor, interactions: Sequence[Interaction]) -> None:
    """Add interactions on a slice to its weights (slots, H, W), in place; each weighs 1."""
    for interaction in interactions:
        one = splat(interaction.pixels, (weights.shape[1], weights.shape[2])).to(weights.device)
        for slot in interaction.slots:
            weights[slot] += one / one.sum()
