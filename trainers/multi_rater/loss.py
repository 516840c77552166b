"""Terms of the diversified stage (multi_rater_personalization.md, 2.2 and 2.4).

Labels of raters are (B, R, *spatial), integer; ``available``, bool (B, R), says who annotated a
sample: what stands in the channel of an absent rater changes no term. All terms are computed in
single precision.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SMALLEST_DENOMINATOR = SMALLEST_PROBABILITY = 1e-6


def gaussian_kl(
    mean: Tensor, log_sigma: Tensor, prior_mean: Tensor, prior_log_sigma: Tensor
) -> Tensor:
    """Return the divergence of N(mean, sigma^2) from the prior, summed over the latent, shape (B,).

    Parameters
    ----------
    mean, log_sigma, prior_mean, prior_log_sigma : Tensor, shape (B, latent)
        Of axis-parallel normal distributions; logarithms of standard deviations.
    """
    mean, log_sigma, prior_mean, prior_log_sigma = (
        x.float() for x in (mean, log_sigma, prior_mean, prior_log_sigma)
    )
    ratio = 2 * (log_sigma - prior_log_sigma)
    distance = ((mean - prior_mean) / prior_log_sigma.exp()).square()
    return ((ratio.exp() + distance - 1 - ratio) / 2).sum(1)


def batch_dice(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Return soft Dice over batch and space of each channel, shape (C,), of (B, C, *spatial).

    A channel without a mask is 0, and has no gradient.
    """
    axes = (0, *range(2, probabilities.dim()))
    common = (probabilities * masks).sum(axes)
    total = probabilities.sum(axes) + masks.sum(axes)
    return 2 * common / total.clamp_min(SMALLEST_DENOMINATOR)


def union_and_intersection(
    labels: Tensor, available: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Return where any and where every rater saw each class, bool (B, classes - 1, *spatial)."""
    foreground = torch.arange(1, classes, device=labels.device)
    shape = (1, 1, -1, *[1] * (labels.dim() - 2))
    drawn = labels[:, :, None] == foreground.view(shape)
    there = available.view(*available.shape, *[1] * (drawn.dim() - 2))
    return (drawn & there).any(1), (drawn | ~there).all(1)


def bound_loss(
    probabilities: Tensor, labels: Tensor, available: Tensor, *, cross_entropy: float = 0.0
) -> Tensor:
    """Return how far the extremes of a set of samples are from those of the raters (2.2, 4).

    The highest probability of a class over the samples is held against the union of the raters, the
    lowest against their intersection: one minus the mean Dice over both and over the classes. Only
    samples with at least two raters count; 0 if there is none.

    Parameters
    ----------
    probabilities : Tensor, shape (samples, B, C, *spatial)
        Of prior samples; background first.
    labels, available
        See the module.
    cross_entropy : float
        Weight of binary cross-entropy beside Dice, which says nothing where a mask is empty.
    """
    several = available.sum(1) >= 2
    if not several.any():
        return probabilities.float().sum() * 0
    chosen = probabilities[:, several, 1:].float()
    outer, inner = union_and_intersection(
        labels[several], available[several], probabilities.shape[2]
    )
    highest, lowest = chosen.amax(0), chosen.amin(0)
    dice = torch.cat([batch_dice(highest, outer.float()), batch_dice(lowest, inner.float())])
    loss = 1 - dice.mean()
    if cross_entropy:
        # torch's own refuses to run under autocast.
        terms = [
            torch.where(mask, p, 1 - p).clamp_min(SMALLEST_PROBABILITY).log().mean()
            for p, mask in ((highest, outer), (lowest, inner))
        ]
        loss = loss - cross_entropy * (terms[0] + terms[1]) / 2
    return loss


def energy_set_loss(probabilities: Tensor, labels: Tensor, available: Tensor) -> Tensor:
    """Return the energy distance between samples and raters, mean over the batch (6, last lines).

    Twice the mean distance between a sample and a rater, less the mean distances within samples and
    within raters, self-pairs included; a distance is Euclidean over voxels and foreground classes,
    divided by the root of their number. It is 0 if the sets agree, and never below.

    Parameters
    ----------
    probabilities : Tensor, shape (samples, B, C, *spatial)
    labels, available
        See the module; each sample of the batch has at least one rater.
    """
    samples, batch, channels = probabilities.shape[:3]
    found = probabilities[:, :, 1:].float().reshape(samples, batch, -1)
    foreground = torch.arange(1, channels, device=labels.device)
    terms = []
    for b in range(batch):
        drawn = labels[b, available[b]][:, None] == foreground.view(-1, *[1] * (labels.dim() - 2))
        pairs = (found[:, b], drawn.float().flatten(1))
        across = _mean_distance(*pairs)
        terms.append(
            2 * across - _mean_distance(pairs[0], pairs[0]) - _mean_distance(pairs[1], pairs[1])
        )
    return torch.stack(terms).mean()


def _mean_distance(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean distance of all pairs of rows, over the root of their length."""
    # Differences, not products: a set is held against itself, and its distances to itself are 0.
    distances = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.mean() / first.shape[1] ** 0.5


def draw_raters(
    available: Tensor,
    *,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a rater for each sample, int (B,), who annotated it.

    Parameters
    ----------
    available : Tensor, bool, shape (B, R)
        At least one in each row.
    weights : Tensor, optional, shape (R,)
        How likely each rater is drawn, above 0; by default all alike.
    """
    odds = available.cpu().double() * (1 if weights is None else weights.cpu().double())
    return torch.multinomial(odds, 1, generator=generator)[:, 0].to(available.device)


def of_raters(labels: Tensor | list[Tensor], raters: Tensor) -> Tensor | list[Tensor]:
    """Return the label maps of one rater per sample, (B, 1, *spatial), at every resolution."""
    if isinstance(labels, list):
        return [_of_raters(level, raters) for level in labels]
    return _of_raters(labels, raters)


def _of_raters(labels: Tensor, raters: Tensor) -> Tensor:
    return labels[torch.arange(len(labels), device=labels.device), raters][:, None]


def posterior_input(data: Tensor, labels: Tensor, available: Tensor, classes: int) -> Tensor:
    """Return what the posterior encoder sees: image, masks of every rater, and who is there (2.4).

    Returns
    -------
    Tensor, shape (B, channels + R * (classes - 1) + R, *spatial)
        Masks of an absent rater are 0, as is the constant plane that says so.
    """
    return torch.cat([data, *_rater_channels(data, labels, available, classes)], 1)


def _rater_channels(
    data: Tensor, labels: Tensor, available: Tensor, classes: int
) -> Iterator[Tensor]:
    there = available.view(*available.shape, *[1] * (labels.dim() - 2))
    for value in range(1, classes):
        yield ((labels == value) & there).to(data.dtype)
    yield there.to(data.dtype).expand(*available.shape, *data.shape[2:])
