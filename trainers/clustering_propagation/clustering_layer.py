"""A step of clustering: pixels choose a centre, centres move (clustering_propagation.md, 1.3).

The k-means form of cross-attention is that of kMaX-DeepLab; mean and layer normalisation instead of
its sum and batch normalisation are ours, since a batch of clips is tiny.
"""

from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnmosaic.trainers.clustering_propagation.readout import CentreLayout

HEADS = 8
"""Of the attention among centres."""
INITIAL_SCALE = 10.0
"""Of cosines, so that they are logits; learnt."""


def cluster_means(assignment: Tensor, values: Tensor) -> Tensor:
    """Return the mean of the pixels of each cluster; 0 of an empty one.

    Parameters
    ----------
    assignment : Tensor, shape (B, N, M)
        Not negative.
    values : Tensor, shape (B, M, D)

    Returns
    -------
    Tensor, shape (B, N, D)
    """
    pixels = assignment.sum(2, keepdim=True)
    return assignment @ values / pixels.clamp_min(1)


class CosineLogits(nn.Module):
    """Cosines of centres and pixels, times a learnt scale, in single precision.

    Parameters
    ----------
    width, embedding : int
        Of a centre, and of what is compared.
    """

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, embedding)
        )
        self.log_scale = nn.Parameter(torch.tensor(log(INITIAL_SCALE)))

    def forward(self, centres: Tensor, pixels: Tensor) -> Tensor:
        """Return logits (B, N, M) of centres (B, N, width) at unit vectors (B, embedding, M)."""
        names = self.project(centres)
        with torch.autocast(centres.device.type, enabled=False):
            return (
                self.log_scale.exp() * functional.normalize(names.float(), dim=2) @ pixels.float()
            )


class ClusteringLayer(nn.Module):
    """Assign pixels to centres, move the centres to the means, let them talk.

    All three steps begin switched off, by gates of 0.

    Parameters
    ----------
    layout : CentreLayout
    width, embedding : int
        Of a centre, and of what is compared with pixels.
    """

    def __init__(self, layout: CentreLayout, width: int, embedding: int) -> None:
        super().__init__()
        self.layout = layout
        self.similarity = CosineLogits(width, embedding)
        self.move = nn.Linear(width, width, bias=False)  # an empty cluster stays where it is
        self.norm_attention, self.norm_rest = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.rest = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(3))

    def forward(self, centres: Tensor, values: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return the moved centres and the likeness of pixels to them before.

        Parameters
        ----------
        centres : Tensor, shape (B, N, width)
        values : Tensor, shape (B, M, width)
        embeddings : Tensor, shape (B, M, embedding)
            Unit vectors.

        Returns
        -------
        centres : Tensor, shape (B, N, width)
        similarity : Tensor, shape (B, N, M)
        """
        similarity = self.similarity(centres, embeddings.transpose(1, 2))
        with torch.autocast(centres.device.type, enabled=False):
            means = cluster_means(self.layout.assign(similarity), values.float())
        first, second, third = self.gates
        centres = centres + first * self.move(means)
        normed = self.norm_attention(centres)
        centres = centres + second * self.attention(normed, normed, normed, need_weights=False)[0]
        return centres + third * self.rest(self.norm_rest(centres)), similarity
