"""Which centre belongs to which class, and what a pixel's likeness to centres says of its class.

Plain labels and overlapping regions differ only here (clustering_propagation.md, 1.2 - 1.4).
"""

from dataclasses import dataclass
from functools import cached_property
from math import log

import torch
from torch import Tensor

BACKGROUND_CENTRES = 4
"""Of plain labels: the background looks like many things, and clicks on it must go somewhere."""


def highest(logits: Tensor, dim: int) -> Tensor:
    """Return the positions of the highest values: `argmax` takes ten times as long on a CPU."""
    return logits.max(dim).indices


@dataclass(frozen=True)
class CentreLayout:
    """The centres of a network with ``classes`` output channels, in their order.

    Plain labels: `BACKGROUND_CENTRES` of channel 0, then one of each label. Regions: the inside of
    each region, then the outside of each.

    Attributes
    ----------
    classes : int
        Output channels, K.
    regions : bool
        Whether these are regions, which may overlap.
    """

    classes: int
    regions: bool

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The class of each centre."""
        if self.regions:
            return (*range(self.classes), *range(self.classes))
        return (*[0] * BACKGROUND_CENTRES, *range(1, self.classes))

    @cached_property
    def first(self) -> tuple[int, ...]:
        """The first centre of each class, which its presence is read from."""
        return tuple(self.owners.index(k) for k in range(self.classes))

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The centre that a kind of prompt goes to.

        Plain labels: prompts of each class. Regions: prompts inside each region, then those outside
        of each.
        """
        return tuple(range(2 * self.classes)) if self.regions else self.first

    def assign(self, similarity: Tensor) -> Tensor:
        """Return the hard assignment of pixels to centres, without gradient (1.3).

        Parameters
        ----------
        similarity : Tensor, shape (B, N, M)

        Returns
        -------
        Tensor, shape (B, N, M), of the dtype of ``similarity``
            One-hot over the centres; with regions, inside each pair of inside and outside.
        """
        found = similarity.detach()
        if self.regions:
            inside, outside = found.chunk(2, 1)
            return torch.cat((inside > outside, inside <= outside), 1).to(found)
        return torch.zeros_like(found).scatter_(1, highest(found, 1).unsqueeze(1), 1)

    def class_logits(self, similarity: Tensor) -> Tensor:
        """Return logits (B, K, *spatial) of the likeness to each centre, (B, N, *spatial) (1.4)."""
        if self.regions:
            inside, outside = similarity.chunk(2, 1)
            return inside - outside
        background = similarity[:, :BACKGROUND_CENTRES].logsumexp(1, keepdim=True)
        background = background - log(BACKGROUND_CENTRES)
        return torch.cat((background, similarity[:, BACKGROUND_CENTRES:]), 1)

    def areas(self, logits: Tensor) -> Tensor:
        """Return the number of pixels of each class, (B, K), for logits (B, K, H, W)."""
        if self.regions:
            return (logits > 0).sum((2, 3))
        winners = highest(logits, 1).flatten(1)
        return torch.stack([(winners == k).sum(1) for k in range(self.classes)], 1)
