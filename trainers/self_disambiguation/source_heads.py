"""One light head per source, for training only, that ties the sources to each other.

A head predicts the label space of its own source from that source's labels alone. On images of the
other sources the main head, summed to the groups of that label space, must agree with it (the idea
of task consistency training, self_disambiguation.md, 7.1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnmosaic.trainers.self_disambiguation.loss import NO_LABEL, average, group_log_probabilities


class SourceHeads(nn.Module):
    """A 1x1 convolution per source on the last features of the decoder.

    Parameters
    ----------
    features : int
        Channels of these features.
    tables : sequence of sequence of int
        For each source and class the integer that the source stores for it.
    dimensions : int
        2 or 3 spatial axes.
    """

    def __init__(self, features: int, tables: Sequence[Sequence[int]], *, dimensions: int) -> None:
        super().__init__()
        self.groups = [sorted(set(table)) for table in tables]
        convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
        self.convolution = convolution(features, sum(map(len, self.groups)), 1)

    def forward(self, features: Tensor) -> list[Tensor]:
        """Return log-probabilities of the groups of every source, each (B, groups, *spatial)."""
        logits = self.convolution(features).float()
        parts = logits.split([len(groups) for groups in self.groups], 1)
        return [torch.log_softmax(part, 1) for part in parts]


def own_label_loss(
    heads: Sequence[Tensor],
    groups: Sequence[Sequence[int]],
    target: Tensor,
    sources: Sequence[int | None],
    *,
    ignore_label: int | None = None,
    ddp: bool = False,
) -> Tensor:
    """Return the cross-entropy of every sample's own head with its labels.

    Parameters
    ----------
    heads : sequence of Tensor, each (B, groups, *spatial)
        As returned by `SourceHeads`.
    groups : sequence of sequence of int
        The stored label of each channel of a head, in ascending order.
    target : Tensor, shape (B, 1, *spatial)
    sources : sequence of int or None
        The head of each sample; None: it has none.
    ignore_label, ddp
        As in `nnmosaic.trainers.self_disambiguation.loss.grouped_cross_entropy`.

    Returns
    -------
    Tensor, shape ()
        In nats, mean over annotated voxels.
    """
    total = heads[0].new_zeros(())
    count = heads[0].new_zeros(())
    for b, s in enumerate(sources):
        if s is None:
            continue
        labels = target[b].long()
        channel = torch.full_like(labels, NO_LABEL)
        for k, value in enumerate(groups[s]):
            channel[labels == value] = k
        if ignore_label is not None:
            channel[labels == ignore_label] = NO_LABEL
        own = heads[s][b : b + 1]
        total = total + functional.nll_loss(own, channel, ignore_index=NO_LABEL, reduction="sum")
        count = count + (channel != NO_LABEL).sum()
    return average(total, count, ddp=ddp)


def consistency_loss(
    heads: Sequence[Tensor],
    logits: Tensor,
    tables: Tensor,
    target: Tensor,
    representatives: Tensor,
    others: Sequence[int | None],
    *,
    ignore_label: int | None = None,
    ddp: bool = False,
) -> Tensor:
    """Return how far the main head is from another source's head where labels leave it open.

    Parameters
    ----------
    heads : sequence of Tensor
        As returned by `SourceHeads`; no gradient goes to them.
    logits : Tensor, shape (B, C, *spatial)
        Of the main head.
    tables : Tensor, shape (S, C), integer
        For each source and class the integer that the source stores for it.
    target, representatives, ignore_label
        Labels of the samples, and what they stand for.
    others : sequence of int or None
        For each sample, a source that is not its own, whose head is asked.
    ddp : bool
        See `nnmosaic.trainers.self_disambiguation.loss.average`.

    Returns
    -------
    Tensor, shape ()
        Kullback-Leibler divergence in nats, mean over the voxels of more than one possible class
        at which the head does not contradict the label.
    """
    total = heads[0].new_zeros(())
    count = heads[0].new_zeros(())
    for b, other in enumerate(others):
        if other is None:
            continue
        log_q = group_log_probabilities(logits[b : b + 1], tables[other : other + 1])[0]
        stored = sorted(set(tables[other].tolist()))
        log_q, log_h = log_q[stored], heads[other][b].detach()
        found = (log_h.argmax(0), stored, tables[other])
        agrees = _agreement(*found, target[b, 0], representatives[b], ignore_label)
        total = total + ((log_h.exp() * (log_h - log_q)).sum(0) * agrees).sum()
        count = count + agrees.sum()
    return average(total, count, ddp=ddp)


def _agreement(
    found: Tensor,
    stored: Sequence[int],
    other: Tensor,
    labels: Tensor,
    own: Tensor,
    ignore_label: int | None,
) -> Tensor:
    """Return where a label is ambiguous and shares a class with the group that a head found.

    ``found``: position in ``stored`` of the group; ``other``, ``own``: class -> stored integer.
    """
    agrees = torch.zeros_like(labels, dtype=torch.bool)
    for value in sorted(set(own.tolist())):
        classes = own == value
        if int(classes.sum()) > 1:
            shared = {int(integer) for integer in other[classes]}
            allowed = torch.tensor([integer in shared for integer in stored], device=found.device)
            agrees |= (labels == value) & allowed[found]
    if ignore_label is not None:
        agrees |= labels == ignore_label
    return agrees
