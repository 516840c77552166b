"""How well a network segments what it cannot see (context_reconstruction.md, 7.10).

Dice at voxels that are hidden by fixed masks, and next to the border of a patch that cuts through
the organs; each beside the Dice of the same voxels in full view.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor

from nnmosaic.trainers.context_reconstruction.masking import draw_mask, to_voxels
from nnmosaic.trainers.generator import generator_of

RATIOS = (0.2, 0.4, 0.6)
BORDER = 8
"""The border is this part of the patch: an eighth."""

Counts = dict[str, np.ndarray]


def readout(
    network: Callable[[Tensor], Tensor],
    data: np.ndarray,
    labels: np.ndarray,
    *,
    patch_size: Sequence[int],
    block: Sequence[int],
    classes: int,
    device: torch.device,
) -> Counts:
    """Return how many voxels of one case were right and wrong, out of view and in view.

    Parameters
    ----------
    network : callable
        From images (1, channels, *patch_size) to logits (1, classes, *patch_size), evaluating.
    data : ndarray, shape (channels, *spatial)
        Preprocessed image.
    labels : ndarray, shape (*spatial)
        Label map with a foreground voxel at least; below 0: outside of the image; from ``classes``:
        ignored.
    block : sequence of int
        Voxels of a cell.

    Returns
    -------
    dict of ndarray, shape (classes, 3)
        True positives, false positives and false negatives of "hidden R" and "hidden R, in view"
        for each ratio R, of "border" and of "border, in view".
    """

    def predict(image: Tensor) -> Tensor:
        with torch.no_grad():
            return network(image.to(device))[0].argmax(0).cpu()

    centre = foreground_centre(labels, classes)
    image, target = cut_patch(data, labels, centre, patch_size)
    in_view = predict(image)
    found: Counts = {}
    grid = [n // b for n, b in zip(patch_size, block, strict=True)]
    for ratio in RATIOS:
        cells = draw_mask(grid, 1, ratio=ratio, kind="block", generator=generator_of(0))
        hidden = to_voxels(cells, block)
        masked = predict(image.masked_fill(hidden, 0))
        found[f"hidden {ratio}"] = _counts(masked, target, hidden[0, 0], classes)
        found[f"hidden {ratio}, in view"] = _counts(in_view, target, hidden[0, 0], classes)
    border = [
        (predict(cut_patch(data, labels, centre + shift, patch_size)[0]).narrow(*there), here)
        for shift, there, here in _borders(patch_size)
    ]
    for name, pairs in (
        ("border", [(seen, target.narrow(*here)) for seen, here in border]),
        ("border, in view", [(in_view.narrow(*here), target.narrow(*here)) for _, here in border]),
    ):
        found[name] = sum(
            (_counts(f, t, torch.ones_like(t, dtype=torch.bool), classes) for f, t in pairs),
            start=np.zeros((classes, 3), int),
        )
    return found


def foreground_centre(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the voxel, int (axes,), in the middle of the labels from 1 to ``classes - 1``."""
    where = np.argwhere((labels > 0) & (labels < classes))
    centre: np.ndarray = np.round(where.mean(0)).astype(int)
    return centre


def cut_patch(
    data: np.ndarray, labels: np.ndarray, centre: np.ndarray, patch_size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return image (1, channels, *patch_size) and labels (*patch_size); outside are 0 and -1."""
    box = [[int(c - n // 2), int(c - n // 2 + n)] for c, n in zip(centre, patch_size, strict=True)]
    image = crop_and_pad_nd(data, [[0, len(data)], *box], 0)
    return torch.from_numpy(image)[None].float(), torch.from_numpy(crop_and_pad_nd(labels, box, -1))


Slab = tuple[int, int, int]
"""Axis, first plane and number of planes."""


def _borders(patch_size: Sequence[int]) -> Iterator[tuple[np.ndarray, Slab, Slab]]:
    """Yield shifts to patches that end at the centre, their last planes, and where these were."""
    for axis in range(len(patch_size))[-2:]:
        size = patch_size[axis]
        width, half = max(1, size // BORDER), size // 2
        for move, there, here in ((half - size, size - width, half - width), (half, 0, half)):
            shift = np.zeros(len(patch_size), int)
            shift[axis] = move
            yield shift, (axis, there, width), (axis, here, width)


def _counts(found: Tensor, target: Tensor, where: Tensor, classes: int) -> np.ndarray:
    inside = where & (target >= 0) & (target < classes)
    f, t = found[inside], target[inside]
    return np.array(
        [
            [
                ((f == c) & (t == c)).sum().item(),
                ((f == c) & (t != c)).sum().item(),
                ((f != c) & (t == c)).sum().item(),
            ]
            for c in range(classes)
        ]
    )


def dice_of(counts: Sequence[Counts]) -> dict[str, np.ndarray]:
    """Return Dice per class without background, mean over the cases in which there is any voxel.

    Parameters
    ----------
    counts : sequence of dict
        What `readout` returned for each case.

    Returns
    -------
    dict of ndarray, shape (classes - 1,)
        NaN where no case has any.
    """
    result = {}
    for name in counts[0]:
        tp, fp, fn = np.stack([case[name][1:] for case in counts]).astype(float).transpose(2, 0, 1)
        union = 2 * tp + fp + fn
        dice = np.divide(2 * tp, union, out=np.full_like(tp, np.nan), where=union > 0)
        cases = (union > 0).sum(0)
        sums = np.nansum(dice, 0)
        result[name] = np.divide(sums, cases, out=np.full_like(sums, np.nan), where=cases > 0)
    return result
