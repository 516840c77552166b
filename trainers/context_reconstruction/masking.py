"""Which cells of a patch are hidden, and what stands there (context_reconstruction.md, 1.2, 5.2).

A cell is a block of voxels; masks are drawn on the grid of cells and applied to voxels.
"""

from collections.abc import Callable, Sequence
from math import floor, prod
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

MaskKind: TypeAlias = Literal["tube", "block", "random_tube"]
Fill: TypeAlias = Literal["zero", "noise", "foreign"]
EMPTY_CELL_WEIGHT = 0.1
"""How likely a cell without foreground is drawn, against 1 for a cell full of it."""


def block_size(
    patch_size: Sequence[int], strides: Sequence[Sequence[int]], *, min_cells: int = 6
) -> tuple[int, ...]:
    """Return the voxels of a cell along each axis: a product of the first strides of the network.

    The largest product that leaves at least ``min_cells`` cells along both in-plane axes (the last
    two), or that of the first two stages where none does (spec 5.2). Thick slices, which a network
    downsamples late, get proportionally thin cells.

    Parameters
    ----------
    patch_size : sequence of int
        Voxels, z y x or y x.
    strides : sequence of sequence of int
        Of each stage, as ``pool_op_kernel_sizes`` in the plans.

    Raises
    ------
    ValueError
        If the cells do not tile the patch.
    """
    products = np.cumprod(np.asarray(strides, int), axis=0)
    chosen = products[min(1, len(products) - 1)]
    for product in products[2:]:
        if all(n // b >= min_cells for n, b in zip(patch_size[-2:], product[-2:], strict=True)):
            chosen = product
    if any(n % b for n, b in zip(patch_size, chosen, strict=True)):
        raise ValueError(f"Blocks of {chosen.tolist()} voxels do not tile {list(patch_size)}.")
    return tuple(int(b) for b in chosen)


def check_ratio(grid: Sequence[int], ratio: float, kind: MaskKind) -> None:
    """Raise `ValueError` unless every mask of this kind hides some cells and leaves some."""
    axes: tuple[int | None, ...] = (None,)
    if len(grid) == 3 and kind != "block":
        axes = (0,) if kind == "tube" else (0, 1, 2)
    for tube_axis in axes:
        _number_of_cells(tuple(n for axis, n in enumerate(grid) if axis != tube_axis), ratio)


def _number_of_cells(shape: tuple[int, ...], ratio: float) -> int:
    cells = prod(shape)
    number = floor(ratio * cells)
    if not 0 < number < cells:
        raise ValueError(
            f"A ratio of {ratio:g} hides {number} of {cells} cells. Some must be hidden and some "
            f"left: choose at least {1 / cells:.3g}, and less than 1."
        )
    return number


def draw_mask(
    grid: Sequence[int],
    samples: int,
    *,
    ratio: float,
    kind: MaskKind,
    generator: torch.Generator,
    foreground: Tensor | None = None,
) -> Tensor:
    """Return which cells are hidden, bool of shape (samples, *grid): equally many in each sample.

    Of ``cells`` cells, ``floor(ratio * cells)`` are hidden; for tubes, which run through the whole
    patch, of the cells of a plane.

    Parameters
    ----------
    grid : sequence of int
        Cells, z y x or y x. In 2D there are no tubes: every kind draws single cells.
    kind : {"tube", "block", "random_tube"}
        Columns along the first axis (1.2), single cells, or columns along an axis drawn anew for
        every sample.
    foreground : Tensor, optional, shape (samples, *grid)
        Fraction of foreground in [0, 1]: such cells are drawn more often.

    Raises
    ------
    ValueError
        If no cell or every cell would be hidden.
    """
    hidden = torch.zeros(samples, *grid, dtype=torch.bool)
    for i in range(samples):
        tube_axis = None
        if len(grid) == 3 and kind == "tube":
            tube_axis = 0
        elif len(grid) == 3 and kind == "random_tube":
            tube_axis = int(torch.randint(3, (), generator=generator))
        shape = tuple(n for axis, n in enumerate(grid) if axis != tube_axis)
        weights = None
        if foreground is not None:
            weights = foreground[i] if tube_axis is None else foreground[i].mean(tube_axis)
        cells = _draw_cells(shape, ratio, generator, weights)
        hidden[i] = cells if tube_axis is None else cells.unsqueeze(tube_axis)
    return hidden


def _draw_cells(
    shape: tuple[int, ...], ratio: float, generator: torch.Generator, foreground: Tensor | None
) -> Tensor:
    cells, number = prod(shape), _number_of_cells(shape, ratio)
    # The largest of log(weight) + Gumbel noise are a weighted draw without replacement.
    noise = torch.rand(cells, generator=generator, dtype=torch.float64)
    keys = -torch.log(-torch.log(noise))
    if foreground is not None:
        weights = EMPTY_CELL_WEIGHT + (1 - EMPTY_CELL_WEIGHT) * foreground.double().flatten().cpu()
        keys += weights.log()
    hidden = torch.zeros(cells, dtype=torch.bool)
    hidden[keys.topk(number).indices] = True
    return hidden.reshape(shape)


def to_voxels(cells: Tensor, block: Sequence[int]) -> Tensor:
    """Return a mask of cells, (B, *grid), as one of voxels, (B, 1, *spatial)."""
    samples, *grid = cells.shape
    cells = cells.reshape(samples, *(n for size in grid for n in (size, 1)))
    sizes = [n for pair in zip(grid, block, strict=True) for n in pair]
    voxels = [n * size for n, size in zip(grid, block, strict=True)]
    return cells.expand(samples, *sizes).reshape(samples, 1, *voxels)


def foreground_of_cells(
    target: Tensor, block: Sequence[int], *, ignore_label: int | None
) -> Tensor:
    """Return the fraction of foreground in each cell, shape (B, *grid).

    Parameters
    ----------
    target : Tensor, shape (B, 1, *spatial)
        Integer labels; for regions (B, regions, *spatial), 1 inside.
    """
    foreground = target > 0
    if ignore_label is not None:
        foreground &= target != ignore_label
    pool = torch.nn.functional.avg_pool3d if len(block) == 3 else torch.nn.functional.avg_pool2d
    return pool(foreground.any(1, keepdim=True).float(), tuple(block))[:, 0]


def filler(
    data: Tensor,
    fill: Fill,
    *,
    generator: Callable[[], torch.Generator],
    others: Tensor,
    label_channels: int = 0,
) -> Tensor:
    """Return what stands at hidden voxels, shape of ``data`` (B, channels, *spatial).

    Parameters
    ----------
    fill : {"zero", "noise", "foreign"}
        0 (the mean intensity after nnU-Net's normalisation), normal noise, or ``others``.
    generator : callable
        Returns the generator of the noise, on the device of ``data``.
    others : Tensor
        Images of other samples, shape of ``data``. Labels are not mixed: what is shown there is to
        be told from what belongs there.
    label_channels : int
        This many last channels are labels of a previous stage, which are hidden as background.
    """
    if fill == "noise":
        options = {"device": data.device, "dtype": data.dtype}
        filled = torch.randn(data.shape, generator=generator(), **options)
    else:
        filled = others.clone() if fill == "foreign" else torch.zeros_like(data)
    if label_channels:
        filled[:, -label_channels:] = 0
    return filled
