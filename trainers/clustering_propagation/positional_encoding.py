"""Where a pixel is in the field of view (clustering_propagation.md, 1.1)."""

from math import log, pi

import torch
from torch import Tensor

CYCLES = (0.5, 8.0)
"""Slowest and fastest wave, in cycles per field of view: the slowest tells left from right."""


def sine_encoding(height: int, width: int, channels: int, *, like: Tensor) -> Tensor:
    """Return sines and cosines of the position in the plane.

    Positions are fractions of the field of view, taken at pixel centres: levels of a pyramid agree
    on them, whatever their strides along the two axes.

    Parameters
    ----------
    height, width : int
    channels : int
        A multiple of 4; half of them tell the row.
    like : Tensor
        Gives device and dtype.

    Returns
    -------
    Tensor, shape (height, width, channels)
        In [-1, 1].

    Raises
    ------
    ValueError
        If ``channels`` is no multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"channels must be a multiple of 4, got {channels}")
    slow, fast = CYCLES
    steps = torch.linspace(log(slow), log(fast), channels // 4, device=like.device)
    frequencies = 2 * pi * steps.exp()

    def waves(size: int) -> Tensor:
        angles = ((torch.arange(size, device=like.device) + 0.5) / size)[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), 1).to(like.dtype)

    rows = waves(height)[:, None].expand(-1, width, -1)
    columns = waves(width).expand(height, -1, -1)
    return torch.cat((rows, columns), 2)
