"""Clips of slices, on which the network trains (clustering_propagation.md, 2)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class Clip(NamedTuple):
    """What is known of the slices of B clips beside the images.

    Attributes
    ----------
    positions : Tensor, shape (B, T)
        Millimetres along the axis.
    start : Tensor, shape (B,), integer
        The slice from which the centres travel to both ends.
    prompts : Tensor, shape (B, T, slots, H, W)
        Weights of the pixels of each kind of prompt.
    gate : Tensor, shape (B, T, heads), bool, optional
        Classes that are written to the memory; None: those that are found.
    base, corrected : Tensor, shape (B, N, D) and (B,), bool, optional
        The centres of the start slice before its prompts, where it is ``corrected``.
    """

    positions: Tensor
    start: Tensor
    prompts: Tensor
    gate: Tensor | None = None
    base: Tensor | None = None
    corrected: Tensor | None = None


class ClipResult(NamedTuple):
    """What clustering finds on B clips.

    Attributes
    ----------
    logits, layer_logits, presence, centres
        As in `SliceResult`, with T slices as second axis.
    plain_logits : Tensor, shape (B, T, heads, H, W)
        Of the pixels by themselves, a part of ``logits``.
    clip : Clip
        With which they were found, after all corrections.
    """

    logits: Tensor
    layer_logits: list[Tensor]
    presence: Tensor
    centres: Tensor
    plain_logits: Tensor
    clip: Clip


Correction: TypeAlias = Callable[[ClipResult], Clip]
"""Looks at a result, and returns the clip with further prompts."""


def visiting_order(start: Tensor, slices: int) -> Tensor:
    """Return, shape (B, T), the slices from the start to the upper end, then down to the lower."""
    upwards = start[:, None] + torch.arange(slices, device=start.device)
    downwards = slices - 1 - torch.arange(slices, device=start.device)
    return torch.where(upwards < slices, upwards, downwards)


def in_order(steps: Sequence[Tensor], back: Tensor) -> Tensor:
    """Return what was found step by step, (B, ...) each, as (B, T, ...) in order of the slices."""
    lanes = torch.arange(len(back), device=back.device)[:, None]
    return torch.stack(list(steps), 1)[lanes, back]
