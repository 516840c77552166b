"""Carrying centres from slice to slice of a volume (clustering_propagation.md, 1.5 and 3)."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.memory import State
from nnmosaic.trainers.clustering_propagation.network import SliceBefore, SliceResult
from nnmosaic.trainers.clustering_propagation.volume_features import VolumeFeatures


class Visited(NamedTuple):
    """A slice, and what travels on from it.

    Attributes
    ----------
    number : int
        Of the slice.
    result : SliceResult
        Of all mirrored copies.
    logits : Tensor, shape (K, H, W)
        Of the slice, as `VolumeFeatures.merged` returns them.
    state : State
        The memory after it.
    """

    number: int
    result: SliceResult
    logits: Tensor
    state: State


def travel(
    features: VolumeFeatures,
    slices: Iterable[int],
    state: State,
    *,
    distance_mm: float,
    before: Tensor | None = None,
) -> Iterator[Visited]:
    """Yield slices, one after another.

    Parameters
    ----------
    state : State
        Before the first of them.
    distance_mm : float
        Between neighbouring slices, and from the last slice of ``state`` to the first one.
    before : Tensor, optional, shape (K, H, W)
        Logits of the slice before the first of them.
    """
    network = features.network
    for index in slices:
        with torch.inference_mode(), features.autocast():
            neighbour = neighbour_of(features, before, distance_mm)
            result = network.decode(features[index], network.initial_centres(state), neighbour)
            state = network.update_state(state, result, steps_of(features, distance_mm))
        before = features.merged(result.logits)
        yield Visited(index, result, before, state)


def steps_of(features: VolumeFeatures, distance_mm: float) -> Tensor:
    """Return the distance to the slice before for every mirrored copy."""
    return torch.full((len(features.copies),), distance_mm, device=features.device)


def neighbour_of(
    features: VolumeFeatures, before: Tensor | None, distance_mm: float
) -> SliceBefore | None:
    """Return what was found on the slice before, (K, H, W) or None, for every mirrored copy."""
    if before is None:
        return None
    logits = features.mirrored(before.float()).to(features.device)
    return SliceBefore(logits, steps_of(features, distance_mm))


def blend(one: Tensor, other: Tensor, weight: float) -> Tensor:
    """Return weight * one + (1 - weight) * other, in half precision."""
    return (weight * one.float() + (1 - weight) * other.float()).half()
