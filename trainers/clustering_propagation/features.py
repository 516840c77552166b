"""From the decoder of a U-Net to what clustering needs of a slice (clustering_propagation.md, 1.1).

Nothing here depends on the centres: it is worked out once per slice.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import log2, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnmosaic.trainers.clustering_propagation.positional_encoding import sine_encoding

WIDEST, WIDEST_EMBEDDING = 256, 64
NARROWEST, NARROWEST_EMBEDDING = 32, 16
LEVEL_STRIDES = (16, 8, 4)
"""Pixels of a slice per pixel of a level, coarse to fine, where the plan has such levels."""


class SliceFeatures(NamedTuple):
    """What is known of N slices before clustering.

    Attributes
    ----------
    inputs, values : tuple of Tensor, each (N, h, w, D)
        Of each level, coarse to fine: position and appearance, and what centres are means of.
    embeddings : tuple of Tensor, each (N, h, w, E)
        Unit vectors that are compared with centres.
    mask_map : Tensor, shape (N, E, H, W)
        The same at full resolution.
    plain : Tensor, shape (N, heads, H, W)
        Logits of the pixels by themselves, without centres.
    """

    inputs: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    embeddings: tuple[Tensor, ...]
    mask_map: Tensor
    plain: Tensor

    def select(self, index: Any) -> "SliceFeatures":
        """Return the features of some slices, by a slice, list or tensor of positions."""
        inputs, values, embeddings = (
            tuple(level[index] for level in levels) for levels in self[:3]
        )
        return SliceFeatures(inputs, values, embeddings, self.mask_map[index], self.plain[index])

    def chunk(self, number: int) -> list["SliceFeatures"]:
        """Return the features of so many equal parts, one after the other, without a copy."""
        inputs, values, embeddings = (
            list(zip(*(level.chunk(number) for level in kind), strict=True)) for kind in self[:3]
        )
        maps = self.mask_map.chunk(number), self.plain.chunk(number)
        parts = zip(inputs, values, embeddings, *maps, strict=True)
        return [SliceFeatures(*part) for part in parts]


def widths(features: int) -> tuple[int, int]:
    """Return the widths of centres and of embeddings for a U-Net that begins with these features.

    They grow with it: nnU-Net's 32 features give the 256 and 64 of the design (1). There is an
    embedding for every pixel: a wide one would cost more than the narrow U-Net of a CPU's plan.
    """
    width = max(NARROWEST, min(WIDEST, 8 * features))
    return width, max(NARROWEST_EMBEDDING, min(WIDEST_EMBEDDING, 2 * features))


def choose_levels(strides: Sequence[Sequence[int]]) -> list[int]:
    """Return the decoder's stages to cluster on, coarse to fine.

    Those nearest to strides 16, 8 and 4, none twice, and not the full resolution unless there is no
    other: a small plan has one or two levels.

    Parameters
    ----------
    strides : sequence of sequence of int
        Of the encoder's stages, which may differ between the axes.
    """
    sizes = [log2(prod(stride)) / len(stride) for stride in strides]
    total = list(accumulate(sizes))[:-1][::-1]  # of the decoder's stages, coarse to fine
    left = list(range(len(total)))[: max(1, len(total) - 1)]
    chosen: list[int] = []
    for wanted in LEVEL_STRIDES[: len(left)]:
        nearest = min(left, key=lambda s: abs(total[s] - log2(wanted)))
        chosen.append(nearest)
        left.remove(nearest)
    return sorted(chosen)


class _Level(nn.Module):
    """Inputs, values and embeddings of a level."""

    def __init__(self, features: int, width: int, embedding: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width))
        self.value = nn.Linear(width, width)
        self.embed = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, embedding))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.reduce(x.movedim(1, -1))
        x = x + sine_encoding(*x.shape[1:], like=x)
        return x, self.value(x), functional.normalize(self.embed(x), dim=-1)


class FeatureHeads(nn.Module):
    """The projections of the decoder's features.

    Parameters
    ----------
    features : sequence of int
        Channels of the decoder's stages, coarse to fine.
    levels : sequence of int
        Those that are clustered on.
    width, embedding : int
        Of centres, and of what is compared with them.
    classes : int
        Output channels of the network.
    """

    def __init__(
        self,
        features: Sequence[int],
        levels: Sequence[int],
        width: int,
        embedding: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.plain = nn.Conv2d(features[-1], classes, 1)
        self.chosen = list(levels)
        self.levels = nn.ModuleList(_Level(features[s], width, embedding) for s in levels)
        self.embedding = embedding
        self.mask_map = nn.Conv2d(features[-1], embedding, 1)
        self.position = nn.Linear(embedding, embedding)

    def forward(self, stages: Sequence[Tensor]) -> SliceFeatures:
        """Return the features of slices for the decoder's outputs, coarse to fine."""
        found = [level(stages[s]) for s, level in zip(self.chosen, self.levels, strict=True)]
        inputs, values, embeddings = zip(*found, strict=True)
        x = self.mask_map(stages[-1])
        # Also here: what looks the same would be told apart on the levels, but not in the masks.
        x = x + self.position(
            sine_encoding(x.shape[2], x.shape[3], self.embedding, like=x)
        ).movedim(2, 0)
        plain = self.plain(stages[-1])
        return SliceFeatures(inputs, values, embeddings, functional.normalize(x, dim=1), plain)


def pool(levels: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return weighted means of the features, averaged over the levels (1.6).

    A level is read as if interpolated bilinearly to full resolution, but it is the weights that are
    brought to the level, by the transposed interpolation, which is cheap.

    Parameters
    ----------
    levels : sequence of Tensor, each (B, h, w, D)
    weights : Tensor, shape (B, S, H, W)
        Not negative.

    Returns
    -------
    Tensor, shape (B, S, D)
        0 where there is no weight.
    """
    weights = weights / weights.sum((2, 3), keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    total = torch.zeros((), device=weights.device)
    with torch.autocast(weights.device.type, enabled=False):
        for level in levels:
            rows, columns = (
                _interpolation(small, large, weights)
                for small, large in zip(level.shape[1:3], weights.shape[2:], strict=True)
            )
            small = rows @ weights.float() @ columns.T  # (B, S, h, w)
            total = total + torch.einsum("bshw,bhwd->bsd", small, level.float())
    return total / len(levels)


def _interpolation(small: int, large: int, like: Tensor) -> Tensor:
    """Return, shape (small, large), the weights of small pixels in linear interpolation."""
    unit = torch.eye(small, device=like.device)
    return functional.interpolate(unit[None], size=large, mode="linear", align_corners=False)[0]
