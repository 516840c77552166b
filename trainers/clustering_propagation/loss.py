"""Terms of the loss on clips (clustering_propagation.md, 2)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from nnmosaic.trainers.clustering_propagation.clip import ClipResult
from nnmosaic.trainers.clustering_propagation.truth import Truth

LAYERS, PLAIN, PRESENCE, USER = 0.5, 0.3, 0.1, 0.1
"""Weights of the terms beside the segmentation at full resolution."""
DISC = 2
"""Radius in pixels of what counts as clicked."""


def clip_losses(
    result: ClipResult,
    target: Tensor,
    truth: Truth,
    segmentation: Callable[[Tensor, Tensor], Tensor],
    *,
    regions: bool,
) -> dict[str, Tensor]:
    """Return the weighted terms by name.

    Parameters
    ----------
    result : ClipResult
    target : Tensor, shape (B, T, C, H, W)
    truth : Truth
        The same as masks.
    segmentation : callable
        nnU-Net's loss, which knows ignored pixels. Slices count as samples of a batch, so that a
        class that is absent from one of them does not upset Dice.
    regions : bool
        Whether classes overlap.
    """
    slices = target.flatten(0, 1)
    levels = [
        segmentation(level.flatten(0, 1), nearest(slices, level.shape[3:]))
        for level in result.layer_logits
    ]
    user = user_loss(result.logits, truth, result.clip.prompts.sum(2), regions=regions)
    return {
        "segmentation": segmentation(result.logits.flatten(0, 1), slices),
        "layers": LAYERS * torch.stack(levels).mean(),
        "plain": PLAIN * segmentation(result.plain_logits.flatten(0, 1), slices),
        "presence": PRESENCE * presence_loss(result.presence, truth),
        "user": USER * user,
    }


def nearest(target: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a target (N, C, H, W) at another size: of each pixel, the label at its middle."""
    rows, columns = (
        ((torch.arange(new, device=target.device) + 0.5) * old / new).long()
        for new, old in zip(size, target.shape[2:], strict=True)
    )
    return target[:, :, rows[:, None], columns]


def presence_loss(presence: Tensor, truth: Truth) -> Tensor:
    """Return the mean cross-entropy of "this class is on this slice", in nats.

    Where pixels are ignored, a class that is not annotated may be there all the same: it is left
    out.

    Parameters
    ----------
    presence : Tensor, shape (B, T, K)
        Logits.
    truth : Truth
    """
    there = truth.masks.flatten(3).any(3)
    known = there | truth.annotated.flatten(3).all(3)
    loss = functional.binary_cross_entropy_with_logits(
        presence.float(), there.float(), reduction="none"
    )
    return (loss * known).sum() / known.sum().clamp_min(1)


def user_loss(logits: Tensor, truth: Truth, clicked: Tensor, *, regions: bool) -> Tensor:
    """Return the mean cross-entropy near the user's pixels, in nats; 0 without any.

    Parameters
    ----------
    logits : Tensor, shape (B, T, K, H, W)
    truth : Truth
    clicked : Tensor, shape (B, T, H, W)
        Above 0 at the user's pixels.
    regions : bool
    """
    near = _dilate(clicked > 0) & truth.annotated[:, :, 0]
    logits, masks = logits.float(), truth.masks.float()
    if regions:
        loss = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(2)
    else:
        loss = -(logits.log_softmax(2) * masks).sum(2)
    return (loss * near).sum() / near.sum().clamp_min(1)


def _dilate(pixels: Tensor) -> Tensor:
    """Return the pixels within a disc of radius `DISC` of some (B, T, H, W), bool."""
    offsets = torch.arange(-DISC, DISC + 1, device=pixels.device)
    disc = (offsets[:, None] ** 2 + offsets**2 <= DISC**2).float()[None, None]
    near = functional.conv2d(pixels.flatten(0, 1)[:, None].float(), disc, padding=DISC) > 0.5
    return near[:, 0].view_as(pixels)
