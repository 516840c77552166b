"""Inputs whose golden numbers stand in methods/self_disambiguation.md, 6.6."""

import torch
from torch import Tensor

B, C, SPATIAL = 2, 5, (3, 4, 5)
PARTIAL = torch.tensor([[0, 1, 0, 3, 0], [0, 1, 2, 3, 4]])
"""Representative of each class for two samples: of a partly and of a completely labelled source."""
MERGED = torch.tensor([[0, 1, 1, 3, 0], [0, 1, 2, 3, 4]])
COMPLETE = torch.arange(C).repeat(B, 1)
IGNORE = 5


def golden_logits() -> Tensor:
    i = torch.arange(B * C * 60, dtype=torch.float64)
    return (2 * torch.sin(0.7 * i + 0.3) + 0.5 * torch.cos(0.13 * i)).view(B, C, *SPATIAL)


def golden_raw() -> Tensor:
    return ((7 * torch.arange(B * 60) + 3) % 11).view(B, 1, *SPATIAL)


def golden_target(table: Tensor = PARTIAL) -> Tensor:
    """Return the stored labels: each class as its representative, everything else 0."""
    raw = golden_raw()
    raw = torch.where(raw > 4, 0, raw)
    return torch.stack([table[b][raw[b]] for b in range(B)])
