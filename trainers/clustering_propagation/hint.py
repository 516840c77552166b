"""What the slice before says of each pixel of a slice.

Centres carry what a class looks like, and not where it is: averaging the logits of neighbouring
slices alone gave a plain 2D nnU-Net half a point of Dice on the hippocampus. So the logits of the
slice that was visited before are a second input of a slice's own: a design of ours, in addition to
clustering_propagation.md, 1.5. It adds nothing before training.
"""

from math import log

import torch
from torch import Tensor, nn

HIDDEN = 16
SCALE = 5.0
"""Logits are divided by it before the convolutions."""
INITIAL_REACH_MM = 10.0
"""Distance at which the slice before counts for 1/e; learnt."""


class SliceHint(nn.Module):
    """Two convolutions over the logits of a slice and of the one before.

    Parameters
    ----------
    classes : int
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * classes, HIDDEN, 3, padding=1)
        self.act = nn.GELU()
        self.change = nn.Conv2d(HIDDEN, classes, 3, padding=1)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)
        self.log_reach = nn.Parameter(torch.tensor(log(INITIAL_REACH_MM)))

    def forward(self, logits: Tensor, before: Tensor, distance_mm: Tensor) -> Tensor:
        """Return the logits of slices, shape (B, K, H, W), changed by those before them.

        Parameters
        ----------
        logits, before : Tensor, shape (B, K, H, W)
        distance_mm : Tensor, shape (B,)
            Between the two.
        """
        both = torch.cat((logits, before.to(logits)), 1) / SCALE
        share = torch.exp(-distance_mm * torch.exp(-self.log_reach))
        return logits + share[:, None, None, None] * self.change(self.act(self.mix(both)))
