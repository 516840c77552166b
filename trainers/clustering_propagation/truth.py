"""Masks of the classes, the same for plain labels and for regions."""

from typing import NamedTuple

import torch
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.readout import highest


class Truth(NamedTuple):
    """What the labels say, class by class.

    Attributes
    ----------
    masks : Tensor, shape (..., K, H, W), bool
        In the order of the output channels.
    annotated : Tensor, shape (..., 1, H, W), bool
        False at ignored pixels, where all masks are False.
    """

    masks: Tensor
    annotated: Tensor

    @classmethod
    def of(
        cls, target: Tensor, classes: int, *, regions: bool, ignore_label: int | None
    ) -> "Truth":
        """Return the masks of a target (..., 1, H, W), or (..., K (+ ignored), H, W) of regions."""
        if regions:
            ignored = target[..., classes:, :, :].any(-3, keepdim=True)
            return cls(target[..., :classes, :, :].bool() & ~ignored, ~ignored)
        if ignore_label is None:
            return cls(_one_hot(target, classes), torch.ones_like(target, dtype=torch.bool))
        return cls(_one_hot(target, classes), target != ignore_label)


def masks_of(logits: Tensor, *, regions: bool) -> Tensor:
    """Return predicted masks (..., K, H, W), bool, for logits of this shape."""
    if regions:
        return logits > 0
    return _one_hot(highest(logits, -3).unsqueeze(-3), logits.shape[-3])


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return masks (..., K, H, W) of labels (..., 1, H, W); a higher label is in none."""
    return labels == torch.arange(classes, device=labels.device)[:, None, None]


def pixel_counts(logits: Tensor, truth: Truth, *, regions: bool) -> dict[str, Tensor]:
    """Return "tp", "fp" and "fn" of each foreground class or region, over clips (B, T, K, H, W)."""
    found = masks_of(logits, regions=regions) & truth.annotated
    counts = {"tp": found & truth.masks, "fp": found & ~truth.masks, "fn": truth.masks & ~found}
    first = 0 if regions else 1
    return {name: hit.sum((0, 1, 3, 4))[first:] for name, hit in counts.items()}
