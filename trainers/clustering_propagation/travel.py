"""Carrying centres from slice to slice of a volume (clustering_propagation.md, 1.5 and 3)."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.memory import State
from nnmosaic.trainers.clustering_propagation.network import SliceResult
from nnmosaic.trainers.clustering_propagation.volume_features import VolumeFeatures


def travel(
    features: VolumeFeatures, slices: Iterable[int], state: State, *, distance_mm: float
) -> Iterator[tuple[int, SliceResult, State]]:
    """Yield index, result and memory afterwards of slices, one after another.

    Parameters
    ----------
    state : State
        Before the first of them.
    distance_mm : float
        Between neighbouring slices, and from the last slice of ``state`` to the first one.
    """
    network = features.network
    step = torch.full((len(features.copies),), distance_mm, device=features.device)
    for index in slices:
        with torch.inference_mode(), features.autocast():
            result = network.decode(features[index], network.initial_centres(state))
            state = network.update_state(state, result, step)
        yield index, result, state


def blend(one: Tensor, other: Tensor, weight: float) -> Tensor:
    """Return weight * one + (1 - weight) * other, in half precision."""
    return (weight * one.float() + (1 - weight) * other.float()).half()
