"""How far a click counts for the pixels around it, as the training cases tell.

That pixels look like the clicked one and lie around it means much where organs stand out, and
little where neighbouring classes look the same, as the two parts of the hippocampus do. So training
cases are clicked on in the middle of a class, and the reach of the class is the length of the ways
(see `nearby`) up to which most pixels belong to it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.clicks import largest_component
from nnmosaic.trainers.clustering_propagation.nearby import ALIKE, lengths_of_ways, smooth

CASES, SLICES = 12, 6
"""Training cases, and slices of each class in them, that are clicked on; at most."""
PURE = 0.85
"""Share of the pixels at every length up to the reach, at least, that belong to the class. With 0.8
the mean Dice of the hippocampus fell after some clicks; with 0.9 those on CHAOS T2 did less."""
LENGTHS = np.geomspace(ALIKE, 6.0, 24)
"""Upper ends of the lengths that are told apart; the last one is the longest reach."""


class ClickedSlice(NamedTuple):
    """A slice on which a class is clicked on.

    Attributes
    ----------
    output : int
        Output channel of the class.
    image : ndarray, shape (channels, H, W)
        Preprocessed.
    mask : ndarray of bool, shape (H, W)
        The class; at least one pixel.
    annotated : ndarray of bool, shape (H, W)
        False at ignored pixels.
    """

    output: int
    image: np.ndarray
    mask: np.ndarray
    annotated: np.ndarray


def reaches(slices: Iterable[ClickedSlice], outputs: int) -> Tensor:
    """Return the reach of clicks on each class: a length of ways, shape (outputs,).

    Channels that no slice is of, background among them, get the least of the others: a click on
    background must not fill an organ that looks like it.
    """
    counts = np.zeros((2, outputs, len(LENGTHS)), int)  # of all pixels, of those of the class
    for output, image, mask, annotated in slices:
        smoothed = smooth(image)
        window, ways = lengths_of_ways(_middle(mask), smoothed, smoothed, longest=LENGTHS[-1])
        lengths = ways.numpy()
        near = annotated[window] & (lengths <= LENGTHS[-1])
        for count, which in zip(counts, (near, near & mask[window]), strict=True):
            place = np.searchsorted(LENGTHS, lengths[which])
            count[output] += np.bincount(place, minlength=len(LENGTHS))
    impure = counts[1] < PURE * counts[0]
    first = np.where(impure.any(1), impure.argmax(1), len(LENGTHS))
    found = np.concatenate([[ALIKE], LENGTHS])[first]
    seen = counts[0].any(1)
    least = found[seen].min() if seen.any() else ALIKE
    return torch.tensor(np.where(seen, found, least)).float()


def _middle(mask: np.ndarray) -> Tensor:
    """Return the pixel, as a mask, that is deepest inside the largest part of a mask."""
    depth = distance_transform_edt(np.pad(largest_component(mask), 1))[1:-1, 1:-1]
    middle = torch.zeros(mask.shape, dtype=torch.bool)
    middle[np.unravel_index(depth.argmax(), depth.shape)] = True
    return middle


def clicked_slices(
    dataset: nnUNetBaseDataset, classes: Mapping[int | tuple[int, ...], int], ignored: int | None
) -> Iterator[ClickedSlice]:
    """Yield slices of training cases, evenly spread over each class.

    Parameters
    ----------
    dataset : nnUNetBaseDataset
        Training cases, preprocessed.
    classes : mapping
        Label, or labels of a region -> output channel.
    ignored : int, optional
        The ignore label.
    """
    for case in _spread(dataset.identifiers, CASES):
        image, labels, _, properties = dataset.load_case(case)
        for class_, output in classes.items():
            voxels = properties["class_locations"][class_]
            for index in _spread(sorted({int(voxel[1]) for voxel in voxels}), SLICES):
                here = np.asarray(labels[0, index])
                mask = np.isin(here, class_)
                yield ClickedSlice(output, np.asarray(image[:, index]), mask, here != ignored)


def _spread(items: Sequence[Any], number: int) -> list[Any]:
    """Return so many items at most, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[place] for place in places]
