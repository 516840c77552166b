"""From prompts to what a volume takes: marks of slices (clustering_propagation.md, 1.6, 5.5)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.interactive_volume import InteractiveVolume, Marks
from nnmosaic.trainers.clustering_propagation.prompt_classes import (
    PromptClasses,
    label_classes,
    region_classes,
)
from nnmosaic.trainers.clustering_propagation.slice_prompts import SlicePrompt

Found = Callable[[int], Tensor]
"""Slice -> logits (K, H, W) of what is found on it now."""


def apply_prompts(
    volume: InteractiveVolume, prompts: Iterable[SlicePrompt], labels: Any
) -> list[range]:
    """Add prompts to a volume, round by round; return the slices that each round may have changed.

    Parameters
    ----------
    prompts : iterable of SlicePrompt
    labels : LabelManager
        nnU-Net's, of the model.
    """
    prompts = tuple(prompts)
    return [
        volume.add(
            marks_of(
                [prompt for prompt in prompts if prompt.round == number],
                labels,
                lambda index: volume.logits([index])[:, 0],
            )
        )
        for number in sorted({prompt.round for prompt in prompts})
    ]


def marks_of(prompts: Sequence[SlicePrompt], labels: Any, found: Found) -> dict[int, Marks]:
    """Return the marks of each slice that prompts touch.

    With regions, a prompt only counts against regions that are found at its pixels (5.5). The ring
    around a box says no more than that its label, or region, is not there: it counts against
    regions all of which lies in this label or region, not against those that go on around it.
    """
    marks: dict[int, Marks] = {}
    for prompt in prompts:
        new = _marks(prompt, labels, found(prompt.slice_index))
        index = prompt.slice_index
        marks[index] = marks[index] + new if index in marks else new
    return marks


def _marks(prompt: SlicePrompt, labels: Any, found: Tensor) -> Marks:
    channels, *shape = found.shape
    plane = shape[0], shape[1]
    classes = _classes(prompt, labels)
    weights = torch.from_numpy(prompt.weight_map(plane))
    if not (labels.has_regions or prompt.exact or prompt.positive):
        # The ring around a box is no background where something else is found.
        (own,) = _classes(replace(prompt, positive=True), labels).positive
        highest = found.max(0).indices
        weights = weights * ((highest == 0) | (highest == own))
    weights = weights / weights.sum().clamp_min(1e-6)  # as the simulated user's
    surely = torch.zeros(plane, dtype=torch.bool)
    if prompt.exact:
        surely = torch.from_numpy(prompt.sure_pixels(plane))
    if labels.has_regions:
        covered = (found > 0) & (weights > 0)
        against = [r for r in classes.negative if covered[r].any()]
    else:
        against = []
    slots = torch.zeros(2 * channels if labels.has_regions else channels, *shape)
    slots[[*classes.positive, *(channels + r for r in against)]] = weights
    on, off = (torch.zeros(channels, *shape, dtype=torch.bool) for _ in range(2))
    on[list(classes.positive)] = surely
    if labels.has_regions:
        off[list(classes.negative)] = surely
    else:  # a pixel that gets another label later has the first one no more
        off[:] = surely & ~on
    clicked = torch.zeros_like(surely)
    if prompt.clicked:
        clicked = torch.from_numpy(prompt.pixels(plane))
    return Marks(slots, on, off, clicked)


def _classes(prompt: SlicePrompt, labels: Any) -> PromptClasses:
    if labels.has_regions:
        label = prompt.label
        if prompt.ring and isinstance(label, int):
            # Another label of a region around it may be there: only regions of this one end.
            label = (label,)
        return region_classes(label, positive=prompt.positive, regions=labels.foreground_regions)
    return label_classes(prompt.label, positive=prompt.positive, all_labels=labels.all_labels)
