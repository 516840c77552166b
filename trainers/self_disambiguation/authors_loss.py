"""The losses of the method's authors, on groups of classes (self_disambiguation.md, 2.2 to 2.6).

They are here for comparison; `loss.py` holds our own. Nothing in this module sums over the batch:
each sample is scored alone. A sample that holds the ignore label is scored by its completely
annotated planes, in each of which only the classes that occur there count as annotated (2.4). Three
departures: a dense sample has the classes that its source declares, not those found in the image
(2.7, number 2); the background of a plane is the sum of its own group, not of all classes (2.7,
number 1); and what occurs is judged in the plane of the patch, where the authors look at the whole
plane of the image, which a loss does not know. A patch that was rotated cuts annotated planes
obliquely; it has no complete plane and contributes nothing.
"""

import math

import torch
from torch import Tensor, nn

from nnmosaic.trainers.averaging import average
from nnmosaic.trainers.self_disambiguation.loss import NO_LABEL, group_log_probabilities

EPSILON = 1e-6
"""Probabilities are clamped to [EPSILON, 1 - EPSILON] before the logarithm (2.2, 2.5)."""
SMOOTH = 1.0
"""Added to numerator and denominator of the Dice (2.3)."""
EMPTY_PATCH_FACTOR = 3.0
"""Weight of the entropy of a patch whose label is 0 everywhere (2.5)."""


def focal_cross_entropy(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of ``-(1 - P)^2 log P`` over all voxels, P of their group (2.2).

    Only the logarithm is clamped, so a voxel with P below `EPSILON` has almost no gradient.

    Parameters
    ----------
    log_probabilities : Tensor, shape (N, C, V)
        Of groups; ``-inf`` in channels that stand for none.
    labels : Tensor, shape (N, V), int64
        Representative of the group of each voxel. Every voxel is annotated.

    Returns
    -------
    Tensor, shape ()
        In nats.
    """
    log_p = log_probabilities.gather(1, labels[:, None])
    return -(torch.expm1(log_p).square() * _clamp(log_p)).mean()


def present_label_dice(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return 1 minus the soft Dice over the labels that occur, background included (2.3).

    Parameters
    ----------
    log_probabilities, labels
        As in `focal_cross_entropy`. Each of the N items has its own Dice.

    Returns
    -------
    Tensor, shape ()
        Between 0 and 1; mean over labels, then over items.
    """
    probabilities = log_probabilities.exp()
    one_hot = _one_hot(labels, num_classes=log_probabilities.shape[1])
    voxels = one_hot.sum(-1)
    intersection = (probabilities * one_hot).sum(-1)
    dice = (2 * intersection + SMOOTH) / (probabilities.sum(-1) + voxels + SMOOTH)
    present = voxels > 0
    return 1 - ((dice * present).sum(1) / present.sum(1)).mean()


def annotated_planes(
    log_probabilities: Tensor, labels: Tensor, annotated: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each axis, the planes of one sample that the authors score (2.4).

    These are completely annotated and hold some foreground. Classes whose label does not occur in
    a plane join its background; a merged label joins with all its members or stays one group.

    Parameters
    ----------
    log_probabilities : Tensor, shape (C, Z, Y, X)
        Of groups, as returned by `group_log_probabilities` for one sample.
    labels : Tensor, shape (Z, Y, X), int64
        0 where nothing is annotated.
    annotated : Tensor, shape (Z, Y, X), bool
        Where the labels are known.

    Returns
    -------
    list of (Tensor, Tensor), shapes (N, C, V) and (N, V)
        Log-probabilities and labels of the N planes of an axis; axes without one are left out.
    """
    views = []
    for axis in range(labels.ndim):
        plane_labels = labels.movedim(axis, 0).flatten(1)
        complete = annotated.movedim(axis, 0).flatten(1).all(1)
        (chosen,) = torch.where(complete & (plane_labels > 0).any(1))
        if len(chosen) > 0:
            planes = log_probabilities.movedim(axis + 1, 0)[chosen].flatten(2)
            views.append((_join_absent(planes, plane_labels[chosen]), plane_labels[chosen]))
    return views


def authors_terms(
    logits: Tensor,
    target: Tensor,
    representatives: Tensor,
    *,
    ignore_label: int | None = None,
    ddp: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the focal cross-entropy and the Dice loss: mean over samples that contribute.

    A sample without ignored voxels is scored as a whole, with the table of its source. A 3D sample
    with ignored voxels is scored by `annotated_planes`: mean over axes. A 2D sample is itself one
    plane, so there the annotated voxels are scored, with the table of its source.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *spatial), float
        Network output before softmax. Computed in float32 at least.
    target : Tensor, shape (B, 1, *spatial)
        Stored labels; each is the representative of its group.
    representatives : Tensor, shape (B, C), integer
        For each sample and class the channel that stands for its group.
    ignore_label : int, optional
        Value of voxels that carry no information.
    ddp : bool
        Count the samples that contribute in all processes, see `average`.

    Returns
    -------
    tuple of two Tensor, shape ()
        Both 0 and connected to the graph if no sample contributes.

    Raises
    ------
    ValueError
        If target or table do not fit the logits.
    """
    expected = (logits.shape[0], 1, *logits.shape[2:])
    if target.shape != expected:
        raise ValueError(f"target must have shape {expected}, got {tuple(target.shape)}")
    log_p = group_log_probabilities(logits, representatives)
    terms = []
    for sample, labels in zip(log_p, target[:, 0].long(), strict=True):
        views = _scored_views(sample, labels, ignore_label)
        if views:
            pairs = [(focal_cross_entropy(*view), present_label_dice(*view)) for view in views]
            terms.append(torch.stack([torch.stack(pair) for pair in pairs]).mean(0))
    nothing = log_p[:0].sum().expand(2)
    total = torch.stack(terms).sum(0) if terms else nothing
    focal, dice = average(total, torch.tensor(len(terms), device=total.device), ddp=ddp)
    return focal, dice


def full_entropy(logits: Tensor, target: Tensor, *, ignore_label: int | None = None) -> Tensor:
    """Return the mean entropy over all classes and all voxels, annotated or not (2.5).

    Parameters
    ----------
    logits, target, ignore_label
        As in `authors_terms`.

    Returns
    -------
    Tensor, shape ()
        In nats; mean over samples, in which a patch without foreground weighs
        `EMPTY_PATCH_FACTOR`. Ignored voxels are no foreground: the authors store 0 there.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p = torch.log_softmax(logits, 1)
    entropy = -(log_p.exp() * _clamp(log_p)).sum(1).flatten(1).mean(1)
    foreground = (target != 0) & (target != (NO_LABEL if ignore_label is None else ignore_label))
    empty = ~foreground.flatten(1).any(1)
    return (entropy * torch.where(empty, EMPTY_PATCH_FACTOR, 1.0)).mean()


class AuthorsLoss(nn.Module):
    """Focal cross-entropy plus Dice as the authors define them; the entropy is a term of its own.

    Parameters
    ----------
    ignore_label, ddp
        As in `authors_terms`.
    """

    def __init__(self, *, ignore_label: int | None = None, ddp: bool = False) -> None:
        super().__init__()
        self.ignore_label, self.ddp = ignore_label, ddp

    def forward(self, logits: Tensor, target: Tensor, representatives: Tensor) -> Tensor:
        """Return the loss of one resolution; shapes as in `authors_terms`."""
        focal, dice = authors_terms(
            logits, target, representatives, ignore_label=self.ignore_label, ddp=self.ddp
        )
        return focal + dice


def _scored_views(
    log_probabilities: Tensor, labels: Tensor, ignore_label: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Return what is scored of one sample: pairs of shapes (N, C, V) and (N, V)."""
    if ignore_label is not None:
        annotated = labels != ignore_label
        if not annotated.all():
            if labels.ndim == 3:
                return annotated_planes(log_probabilities, labels * annotated, annotated)
            log_probabilities, labels = log_probabilities[:, annotated], labels[annotated]
    if labels.numel() == 0:
        return []
    return [(log_probabilities.flatten(1)[None], labels.flatten()[None])]


def _join_absent(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Move the probability of labels that do not occur in an item to its background."""
    joined = ~_one_hot(labels, num_classes=log_probabilities.shape[1]).any(-1)
    joined[:, 0] = True
    background = log_probabilities.masked_fill(~joined[..., None], -torch.inf).logsumexp(1)
    others = log_probabilities.masked_fill(joined[..., None], -torch.inf)[:, 1:]
    return torch.cat([background[:, None], others], 1)


def _one_hot(labels: Tensor, *, num_classes: int) -> Tensor:
    """Return, shape (N, C, V), where each voxel has each label."""
    return labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None]


def _clamp(log_probabilities: Tensor) -> Tensor:
    return log_probabilities.clamp(math.log(EPSILON), math.log1p(-EPSILON))
