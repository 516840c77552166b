"""Images of a random contrast: what one sequence annotates is then found in another one, too."""

import torch
from torch import Tensor

KNOTS = (4, 9)
"""Fewest and most points of a curve."""
AIR = 0.05
"""Voxels of less than this part of the range of intensities have no say in where the points are."""
LEVELS = 4096
"""Intensities that are told apart."""


def random_contrast(images: Tensor, share: float) -> Tensor:
    """Return images of which a share has its intensities on random curves that rise and fall.

    A curve is linear between points at random quantiles of the intensities, so that tissues come
    apart however near each other they are; the darkest, air, stays the darkest. Mean and standard
    deviation stay as they were. After the random intensity curves of Zhou et al. (Models Genesis,
    Medical Image Analysis 2021).

    Parameters
    ----------
    images : Tensor, shape (B, channels, *spatial)
        Every channel has a curve of its own.
    share : float
        Probability of an image to be changed.
    """
    return torch.stack(
        [
            torch.stack([mapped(channel, *_random_curve()) for channel in image])
            if torch.rand(()) < share
            else image
            for image in images
        ]
    )


def _random_curve() -> tuple[Tensor, Tensor]:
    points = int(torch.randint(KNOTS[0], KNOTS[1] + 1, ()))
    inner = torch.rand(points - 2).sort().values
    ends = torch.tensor([0.0, 1.0])
    return torch.cat([ends[:1], inner, ends[1:]]), torch.cat([ends[:1], torch.rand(points - 1)])


def mapped(channel: Tensor, fractions: Tensor, values: Tensor) -> Tensor:
    """Return an image with its intensities on a curve, its mean and standard deviation as before.

    Parameters
    ----------
    channel : Tensor, shape (*spatial)
        Without contrast it stays as it is.
    fractions, values : Tensor, shape (points,)
        Quantiles, ascending, and the intensities that take their place; the first quantile is the
        darkest voxel and the others are those of the voxels that are not air.
    """
    old = channel.float()
    low, high = old.aminmax()
    if low == high:
        return channel
    place = ((old - low) / (high - low) * (LEVELS - 1)).round()
    counts = torch.histc(place, LEVELS, 0, LEVELS - 1)
    counts[: int(AIR * LEVELS)] = 0
    below = counts.cumsum(0) / counts.sum()
    knots = torch.searchsorted(below, fractions[1:-1].to(below)).clamp_max(LEVELS - 1)
    new = _through(knots.tolist(), values.tolist()).to(old)[place.long()]
    spread = new.std()
    if spread == 0:
        return channel
    return ((new - new.mean()) / spread * old.std() + old.mean()).to(channel.dtype)


def _through(inner: list[int], values: list[float]) -> Tensor:
    """Return the value at every level of the curve through the points."""
    knots = [0, *inner, LEVELS - 1]
    pieces = [
        torch.linspace(first, last, max(right - left, 0) + 1)[:-1]
        for left, right, first, last in zip(knots, knots[1:], values, values[1:], strict=False)
    ]
    return torch.cat([*pieces, torch.tensor(values[-1:])])
