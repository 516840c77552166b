"""Dice and cross-entropy for labels that mean sets of classes (self_disambiguation.md, 2.8).

A source's labels partition the classes into groups: every annotated class alone, every merged label
with its members, and the background with all that the source does not annotate. Softmax over
``logsumexp(group)`` equals the summed probabilities of each group exactly, so the logits are merged
and ordinary losses follow. Probabilities are never merged, and classes without a label get no term.
"""

import torch
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from torch import Tensor, nn
from torch.nn import functional

from nnmosaic.trainers.averaging import average

SMOOTH = 1e-5
"""Of nnU-Net's Dice loss."""
NO_LABEL = -100
"""A value that no label map holds: torch's default for voxels without a label."""


def group_log_probabilities(logits: Tensor, representatives: Tensor) -> Tensor:
    """Return the log-probability of every group of classes, in the channel that stands for it.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *spatial), float
        Network output before softmax; channel 0 is the background.
    representatives : Tensor, shape (B, C), integer
        For each sample and class the channel that stands for its group.

    Returns
    -------
    Tensor, shape (B, C, *spatial), float32 or float64
        Sums to 1 over channels after exp. Channels that stand for no group are ``-inf``:
        probability and gradient 0.

    Raises
    ------
    ValueError
        If the table does not fit the logits.
    """
    return torch.log_softmax(merge_logits(logits, representatives), 1)


def merge_logits(logits: Tensor, representatives: Tensor) -> Tensor:
    """Return logits in which every group of classes has one channel: logsumexp of its members.

    Parameters and shapes are those of `group_log_probabilities`. Classes that are alone in their
    group pass through unchanged, bit for bit.
    """
    if representatives.shape != logits.shape[:2]:
        raise ValueError(
            f"representatives must have shape {tuple(logits.shape[:2])}, "
            f"got {tuple(representatives.shape)}"
        )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nothing = torch.full_like(logits[0, 0], -torch.inf)
    channels = []
    for sample, table in zip(logits, representatives.tolist(), strict=True):
        classes = sample.unbind(0)
        for c in range(len(table)):
            members = [classes[k] for k, stands_for in enumerate(table) if stands_for == c]
            if not members:
                channels.append(nothing)
            else:
                channels.append(members[0] if len(members) == 1 else _logsumexp(members))
    return torch.stack(channels).view_as(logits)


def _logsumexp(members: list[Tensor]) -> Tensor:
    if len(members) == 2:
        return torch.logaddexp(*members)
    return torch.logsumexp(torch.stack(members), 0)


def grouped_cross_entropy(
    log_probabilities: Tensor,
    target: Tensor,
    *,
    ignore_label: int | None = None,
    gamma: float = 0.0,
    ddp: bool = False,
) -> Tensor:
    """Return the mean of ``-(1 - P)^gamma log P`` over annotated voxels, P of their group (2.2).

    Parameters
    ----------
    log_probabilities : Tensor, shape (B, C, *spatial)
        As returned by `group_log_probabilities`.
    target : Tensor, shape (B, 1, *spatial)
        Stored labels; each is the representative of its group.
    ignore_label : int, optional
        Value of voxels that carry no information.
    gamma : float
        Focal exponent; 0 is the cross-entropy.
    ddp : bool
        Count the annotated voxels of all processes, see `average`.

    Returns
    -------
    Tensor, shape ()
        In nats; 0 and connected to the graph if no voxel is annotated.
    """
    labels = target[:, 0].long()
    none = NO_LABEL if ignore_label is None else ignore_label
    if gamma == 0:
        total = functional.nll_loss(log_probabilities, labels, ignore_index=none, reduction="sum")
    else:
        nll = functional.nll_loss(log_probabilities, labels, ignore_index=none, reduction="none")
        # An ignored voxel has nll 0; the clamp keeps the gradient of the power finite at P = 1.
        total = ((-torch.expm1(-nll)).clamp_min(1e-12) ** gamma * nll).sum()
    if ignore_label is None:
        return total / labels.numel()
    return average(total, (labels != ignore_label).sum(), ddp=ddp)


def grouped_dice(
    log_probabilities: Tensor,
    target: Tensor,
    *,
    scored: Tensor,
    batch_dice: bool,
    ignore_label: int | None = None,
    count_ignored: bool = False,
    ddp: bool = False,
) -> Tensor:
    """Return minus the soft Dice over the (sample, class) pairs that have a label (2.8).

    Parameters
    ----------
    log_probabilities, target, ignore_label
        As in `grouped_cross_entropy`.
    scored : Tensor, shape (B, C), bool
        Whether class ``c`` has a label of its own, or represents a merged one, in the sample's
        source.
    batch_dice : bool
        Sum over the batch before dividing, as nnU-Net's plans say.
    count_ignored : bool
        Count samples that are ignored as a whole with Dice 1, as nnU-Net does.
    ddp : bool
        Sum over all processes (``batch_dice``), or count the pairs of all, see `average`.

    Returns
    -------
    Tensor, shape ()
        Between -1 and 0; 0 and connected to the graph if nothing is scored.
    """
    axes = tuple(range(2, log_probabilities.ndim))
    probabilities = log_probabilities[:, 1:].exp()
    with torch.no_grad():
        weight = scored[:, 1:].to(probabilities.dtype)
        labels, mask = target, None
        if ignore_label is not None:
            mask = (target != ignore_label).to(probabilities.dtype)
            labels = torch.where(target != ignore_label, target, 0)
            if not count_ignored:  # a sample without an annotated voxel says nothing
                weight = weight * (mask.sum(axes) > 0)
        one_hot = torch.zeros_like(log_probabilities).scatter_(1, labels.long(), 1)[:, 1:]
        if mask is not None:
            one_hot = one_hot * mask
        sum_target = one_hot.sum(axes) * weight
    intersection = (probabilities * one_hot).sum(axes) * weight
    predicted = probabilities if mask is None else probabilities * mask
    sum_predicted = predicted.sum(axes) * weight
    if batch_dice:
        intersection, sum_predicted, sum_target, weight = (
            _sum_over_batch(part, ddp=ddp)
            for part in (intersection, sum_predicted, sum_target, weight)
        )
    dice = (2 * intersection + SMOOTH) / (sum_target + sum_predicted + SMOOTH).clamp_min(1e-8)
    pairs = (weight > 0).to(dice.dtype)
    # With batch Dice every process has the sums of all.
    return average(-(dice * pairs).sum(), pairs.sum(), ddp=ddp and not batch_dice)


def hard_counts(
    log_probabilities: Tensor,
    target: Tensor,
    *,
    scored: Tensor,
    ignore_label: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Count true positive, false positive and false negative voxels of annotated classes (6.4).

    The prediction is the most probable group, so a class that a source does not annotate is no
    false positive on its background.

    Parameters
    ----------
    log_probabilities, target, scored, ignore_label
        As in `grouped_dice`.

    Returns
    -------
    tuple of three Tensor, shape (C - 1,), float32
        Summed over the batch, without the background.
    """
    prediction = log_probabilities.argmax(1, keepdim=True)
    axes = tuple(range(2, log_probabilities.ndim))
    annotated = torch.ones_like(target, dtype=torch.bool)
    if ignore_label is not None:
        annotated = target != ignore_label
    counts = []
    for c in range(1, log_probabilities.shape[1]):
        predicted, true = (prediction == c) & annotated, (target == c) & annotated
        for hits in (predicted & true, predicted & ~true, ~predicted & true):
            counts.append((hits.sum(axes).sum(1) * scored[:, c]).sum().float())
    tp, fp, fn = (torch.stack(counts[k::3]) for k in range(3))
    return tp, fp, fn


class GroupedDiceCELoss(nn.Module):
    """nnU-Net's Dice + cross-entropy, on groups of classes.

    Parameters
    ----------
    complete_loss : nn.Module
        nnU-Net's own loss. It is called, unchanged, for a batch in which every class is annotated,
        without DDP and with ``gamma`` 0. So where all voxels of such a batch are ignored, Dice is
        nnU-Net's constant -1; with any other batch it is 0.
    batch_dice, ddp, ignore_label
        As in `grouped_dice`.
    gamma : float
        Focal exponent of the cross-entropy.
    """

    def __init__(
        self,
        complete_loss: nn.Module,
        *,
        batch_dice: bool,
        ddp: bool = False,
        ignore_label: int | None = None,
        gamma: float = 0.0,
    ) -> None:
        super().__init__()
        self.complete_loss = complete_loss
        self.batch_dice, self.ddp = batch_dice, ddp
        self.ignore_label, self.gamma = ignore_label, gamma

    def forward(self, logits: Tensor, target: Tensor, representatives: Tensor) -> Tensor:
        """Return the loss of one resolution.

        Parameters
        ----------
        logits : Tensor, shape (B, C, *spatial)
        target : Tensor, shape (B, 1, *spatial)
        representatives : Tensor, shape (B, C), integer
            On the CPU, so that looking at it does not wait for the GPU.
        """
        identity = torch.arange(representatives.shape[1])
        complete = bool((representatives == identity).all())
        # Under DDP all processes must take the same branch, because sums go over them.
        if complete and self.gamma == 0 and not self.ddp:
            return self.complete_loss(logits, target)
        if self.ddp and self.ignore_label is not None:
            everywhere = torch.tensor(float(complete), device=logits.device)
            torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
            complete = bool(everywhere)
        log_p = group_log_probabilities(logits, representatives)
        scored = (representatives == identity).to(logits.device)
        ce = grouped_cross_entropy(
            log_p, target, ignore_label=self.ignore_label, gamma=self.gamma, ddp=self.ddp
        )
        dice = grouped_dice(
            log_p,
            target,
            scored=scored,
            batch_dice=self.batch_dice,
            ignore_label=self.ignore_label,
            count_ignored=complete,
            ddp=self.ddp,
        )
        return ce + dice


def _sum_over_batch(part: Tensor, *, ddp: bool) -> Tensor:
    if ddp:
        part = AllGatherGrad.apply(part).sum(0)
    return part.sum(0)
