"""One light head per source, for training only, that ties the sources to each other.

A head predicts the label space of its own source from that source's labels alone. On images of the
other sources the main head, summed to the groups of that label space, must agree with it (the idea
of task consistency training, self_disambiguation.md, 7.1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnmosaic.trainers.self_disambiguation.ambiguity import ambiguous_groups
from nnmosaic.trainers.self_disambiguation.loss import NO_LABEL, average


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
    total = 0 * heads[0].sum()  # every process must reach the heads in the backward pass
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

    Both are restricted to the classes that the label leaves open, and the main head is summed to
    the groups of the other source, so agreement can never contradict a label.

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
        Kullback-Leibler divergence in nats, mean over the voxels whose open classes are in more
        than one group of the other source.
    """
    total = 0 * logits.float().sum()
    count = heads[0].new_zeros(())
    for b, classes, voxels in ambiguous_groups(target, representatives, ignore_label):
        other = others[b]
        if other is None:
            continue
        table = tables[other].tolist()
        stored = sorted(set(table))
        shared = {
            k: [c for c in classes if table[c] == value]
            for k, value in enumerate(stored)
            if any(table[c] == value for c in classes)
        }
        if len(shared) < 2:
            continue
        z = logits[b] if logits.dtype == torch.float64 else logits[b].float()
        log_q = torch.stack([torch.logsumexp(z[members], 0) for members in shared.values()])
        log_q = torch.log_softmax(log_q, 0)
        log_h = torch.log_softmax(heads[other][b].detach()[list(shared)], 0)
        total = total + ((log_h.exp() * (log_h - log_q)).sum(0) * voxels).sum()
        count = count + voxels.sum()
    return average(total, count, ddp=ddp)
