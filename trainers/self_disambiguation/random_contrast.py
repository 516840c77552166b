"""Images of a random contrast: what one sequence annotates is then found in another one, too."""

from collections.abc import Sequence

import torch
from torch import Tensor

KNOTS = (4, 9)
"""Fewest and most points of a curve."""
CUT = 0.005
"""Part of the voxels at either end whose intensities count as equal: outliers."""
AIR = 0.05
"""Voxels of less than this part of the range of intensities have no say in where the points are."""
SAMPLE = 10000
"""About so many voxels are looked at for quantiles."""
LEVELS = 4096
"""Intensities that are told apart."""
POWERS = (0.5, 16.0)
"""Least and greatest power that the values of a curve are raised to. High ones leave a few tissues
bright by many standard deviations, as T2 with fat suppression does."""
OWN = 0.5
"""Share of the annotated structures that get an intensity of their own."""
OWN_MEAN, OWN_SPREAD = (-1.5, 3.5), (0.7, 1.5)
"""Of such a structure: new mean, in standard deviations of the image above its mean, and the factor
of its own contrast."""


def with_random_contrast(
    images: Tensor,
    labels: Tensor,
    share: float,
    generator: torch.Generator,
    *,
    masked: Sequence[bool],
    classes: int,
) -> Tensor:
    """Return images of which a share has another contrast, as of another sequence.

    Some annotated structures get an intensity of their own: a curve alone cannot part tissues that
    are alike. Then all intensities follow a random curve that rises and falls. It is linear between
    points at random quantiles of the intensities, so that tissues come apart however near each
    other they are; the darkest voxels stay the darkest. Mean and standard deviation stay as they
    were. After the random intensity curves of Zhou et al. (Models Genesis, Medical Image Analysis
    2021) and the random intensities of labelled structures of Billot et al. (SynthSeg, Medical
    Image Analysis 2023).

    Parameters
    ----------
    images : Tensor, shape (B, channels, *spatial)
        Every channel has a contrast of its own.
    labels : Tensor, shape (B, 1, *spatial)
        Structures have the integers below ``classes``; 0 is what has no label.
    share : float
        Probability of an image to be changed.
    generator : torch.Generator
        On the CPU.
    masked : sequence of bool
        For each intensity channel, whether it is 0 outside of the object, and stays so (nnU-Net's
        ``use_mask_for_norm``). Channels after these, a cascade's, stay as they are.
    classes : int
        Number of classes, background included.
    """
    changed = images.clone()
    for image, label in zip(changed, labels[:, 0], strict=True):
        if torch.rand((), generator=generator) < share:
            for channel, is_masked in zip(image, masked, strict=False):
                new = with_own_intensities(channel, label, classes, generator, masked=is_masked)
                channel.copy_(on_curve(new, *_random_curve(generator), masked=is_masked))
    return changed


def with_own_intensities(
    channel: Tensor,
    labels: Tensor,
    classes: int,
    generator: torch.Generator,
    *,
    masked: bool = False,
) -> Tensor:
    """Return an image in which some of the annotated structures are darker or brighter.

    Parameters
    ----------
    channel, labels : Tensor, shape (*spatial)
    classes, generator, masked
        As in `with_random_contrast`.
    """
    old = channel.float()
    new = old
    for c in range(1, classes):
        chosen, mean, spread = torch.rand(3, generator=generator).tolist()
        if chosen < OWN:
            here = labels == c
            if masked:
                here = here & (old != 0)
            its_mean = (old * here).sum() / here.sum().clamp_min(1)
            goal = old.mean() + _between(*OWN_MEAN, mean) * old.std()
            new = torch.where(here, (old - its_mean) * _between(*OWN_SPREAD, spread) + goal, new)
    return new.to(channel.dtype)


def _between(low: float, high: float, part: float) -> float:
    return low + (high - low) * part


def _random_curve(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    points = int(torch.randint(KNOTS[0], KNOTS[1] + 1, (), generator=generator))
    inner = torch.rand(points - 2, generator=generator).sort().values
    values = torch.cat([torch.zeros(1), torch.rand(points - 1, generator=generator)])
    least, greatest = POWERS
    power = least * (greatest / least) ** torch.rand((), generator=generator)
    return inner, values**power


def on_curve(channel: Tensor, fractions: Tensor, values: Tensor, *, masked: bool = False) -> Tensor:
    """Return an image with its intensities on a curve, its mean and standard deviation as before.

    Parameters
    ----------
    channel : Tensor, shape (*spatial)
        Without contrast it stays as it is.
    fractions : Tensor, shape (points - 2,)
        Quantiles of the voxels that are not air, ascending. The first and the last point are the
        darkest and the brightest voxels.
    values : Tensor, shape (points,)
        The intensities that take their place.
    masked : bool
        Voxels that are 0 are outside, and stay so.
    """
    old = channel.float()
    inside = old != 0 if masked else torch.ones_like(old, dtype=torch.bool)
    voxels = old[inside]
    if len(voxels) == 0:
        return channel
    some = voxels[:: max(1, len(voxels) // SAMPLE)]
    low, high = some.quantile(torch.tensor([CUT, 1 - CUT], device=some.device)).unbind()
    if low == high:
        return channel
    tissue = some[some > low + AIR * (high - low)]
    knots = _level(tissue.quantile(fractions.to(some)), low, high)
    new = _curve(knots.tolist(), values.tolist()).to(old)[_level(voxels, low, high)]
    spread = new.std()
    if spread == 0:
        return channel
    new = (new - new.mean()) / spread * voxels.std() + voxels.mean()
    return old.masked_scatter(inside, new).to(channel.dtype)


def _level(intensities: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return ((intensities - low) / (high - low) * (LEVELS - 1)).round().clamp(0, LEVELS - 1).long()


def _curve(inner: list[int], values: list[float]) -> Tensor:
    """Return the value at every level of the curve through the points."""
    knots = [0, *inner, LEVELS - 1]
    pieces = [
        torch.linspace(first, last, right - left + 1)[:-1]
        for left, right, first, last in zip(knots, knots[1:], values, values[1:], strict=False)
    ]
    return torch.cat([*pieces, torch.tensor(values[-1:])])
