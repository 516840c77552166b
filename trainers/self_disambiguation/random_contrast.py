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
"""Of such a structure: new mean, in standard deviations of the image above its mean (both of the
voxels inside), and the factor of its own contrast."""


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
    other they are. It starts at its lowest point: what is darkest after the first step, air or a
    structure, stays darkest. Mean and standard deviation of the image stay as they were. After the
    random intensity curves of Zhou et al. (Models Genesis, Medical Image Analysis 2021) and the
    random intensities of labelled structures of Billot et al. (SynthSeg, Medical Image Analysis
    2023).

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
                curve = _random_curve(generator)
                channel.copy_(on_curve(new, *curve, masked=is_masked, like=channel))
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

    What is drawn for a class does not depend on which classes are present.

    Parameters
    ----------
    channel, labels : Tensor, shape (*spatial)
    classes, generator, masked
        As in `with_random_contrast`.
    """
    draws = torch.rand(classes - 1, 3, generator=generator).tolist()
    old = channel.float()
    inside = _inside(old, masked)
    voxels, of_class = old[inside], labels[inside]
    if len(voxels) == 0:
        return channel
    deviation, mean = torch.std_mean(voxels, correction=0)
    # All that is no class, an ignore label say, is counted last.
    counts = torch.bincount(of_class.long().clamp(0, classes), minlength=classes + 1).tolist()
    new = voxels
    for c, (chosen, level, spread) in enumerate(draws, start=1):
        if counts[c] > 0 and chosen < OWN:
            here = of_class == c
            its_mean = (voxels * here).sum() / counts[c]
            goal = mean + _between(*OWN_MEAN, level) * deviation
            new = torch.where(here, (voxels - its_mean) * _between(*OWN_SPREAD, spread) + goal, new)
    return old.masked_scatter(inside, new).to(channel.dtype)


def _inside(channel: Tensor, masked: bool) -> Tensor:
    return channel != 0 if masked else torch.ones_like(channel, dtype=torch.bool)


def _between(low: float, high: float, part: float) -> float:
    return low + (high - low) * part


def _random_curve(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    points = int(torch.randint(KNOTS[0], KNOTS[1] + 1, (), generator=generator))
    inner = torch.rand(points - 2, generator=generator).sort().values
    values = torch.cat([torch.zeros(1), torch.rand(points - 1, generator=generator)])
    least, greatest = POWERS
    power = least * (greatest / least) ** torch.rand((), generator=generator)
    return inner, values**power


def on_curve(
    channel: Tensor,
    fractions: Tensor,
    values: Tensor,
    *,
    masked: bool = False,
    like: Tensor | None = None,
) -> Tensor:
    """Return an image with its intensities on a curve, and the moments of the one it was made from.

    Parameters
    ----------
    channel : Tensor, shape (*spatial)
    fractions : Tensor, shape (points - 2,)
        Quantiles of the voxels that are not air, ascending. The first and the last point are the
        darkest and the brightest voxels.
    values : Tensor, shape (points,)
        The intensities that take their place.
    masked : bool
        Voxels that are 0 in ``like`` are outside, and stay so.
    like : Tensor, shape (*spatial), optional
        Mean and standard deviation inside become those of this image; where ``channel`` has no
        contrast, this is returned. Default: ``channel``.
    """
    like = channel if like is None else like
    old, before = channel.float(), like.float()
    inside = _inside(before, masked)
    voxels, goal = old[inside], before[inside]
    if len(voxels) == 0:
        return like
    some = voxels[:: max(1, len(voxels) // SAMPLE)]
    low, high = some.quantile(torch.tensor([CUT, 1 - CUT], device=some.device)).unbind()
    if low == high:
        return like
    tissue = some[some > low + AIR * (high - low)]
    knots = _level(tissue.quantile(fractions.to(some)), low, high)
    new = _curve(knots.tolist(), values.tolist()).to(old)[_level(voxels, low, high)]
    spread = new.std()
    if spread == 0:
        return like
    new = (new - new.mean()) / spread * goal.std() + goal.mean()
    return before.masked_scatter(inside, new).to(channel.dtype)


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
