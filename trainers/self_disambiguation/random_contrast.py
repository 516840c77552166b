"""Images of a random contrast: what one sequence annotates is then found in another one, too."""

from typing import Any, TypeAlias

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from torch import Tensor

Curve: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Fractions of the voxels that are darker, ascending, and the new intensity at each of them."""

KNOTS = (4, 9)
"""Fewest and most points of a curve."""
AIR = 0.05
"""Voxels of less than this part of the range of intensities have no say in where the points are."""
EVERY = 8
"""Of so many voxels one is looked at for the quantiles."""


class RandomContrastTransform(ImageOnlyTransform):
    """Map the intensities of every channel by a random curve that rises and falls.

    The curve is linear between points at random quantiles of the intensities, so that tissues come
    apart however near each other they are; the darkest, air, stays the darkest. Mean and standard
    deviation stay as they were. After the random intensity curves of Zhou et al. (Models Genesis,
    Medical Image Analysis 2021).
    """

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Return the curve of every channel."""
        return {"curves": [_random_curve() for _ in data_dict["image"]]}

    def _apply_to_image(self, img: Tensor, curves: list[Curve]) -> Tensor:
        return torch.stack(
            [mapped(channel, *curve) for channel, curve in zip(img, curves, strict=True)]
        )


def _random_curve() -> Curve:
    points = int(torch.randint(KNOTS[0], KNOTS[1] + 1, ()))
    inner = torch.rand(points - 2).sort().values
    return np.array([0, *inner, 1]), np.array([0, *torch.rand(points - 1)])


def mapped(channel: Tensor, fractions: np.ndarray, values: np.ndarray) -> Tensor:
    """Return an image with its intensities on a curve, its mean and standard deviation as before.

    Parameters
    ----------
    channel : Tensor, shape (*spatial)
        Without contrast it stays as it is.
    fractions, values : ndarray, shape (points,)
        Quantiles and the intensities that take their place; the first quantile is the darkest voxel
        and the others are those of the voxels that are not air.
    """
    old = channel.numpy().astype(np.float32)
    low, high = old.min(), old.max()
    some = old.ravel()[::EVERY]
    tissue = some[some > low + AIR * (high - low)]
    if low == high or len(tissue) == 0:
        return channel
    knots = np.array([low, *np.quantile(tissue, fractions[1:-1]), high])
    new = np.interp(old, knots, values)
    if new.std() == 0:
        return channel
    new = (new - new.mean()) / new.std() * old.std() + old.mean()
    return torch.from_numpy(new).to(channel.dtype)
