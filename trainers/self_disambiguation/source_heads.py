"""One light head per source, for training only, that ties the sources to each other.

A head predicts the label space of its own source from that source's labels alone. On images of the
other sources the main head, summed to the groups of that label space, must agree with it (the idea
of task consistency training, self_disambiguation.md, 7.1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnmosaic.trainers.averaging import average, inner_product
from nnmosaic.trainers.self_disambiguation.ambiguity import ambiguous_groups, class_channels


class SourceHeads(nn.Module):
    """A 1x1 convolution per source on the last features of the decoder.

    Parameters
    ----------
    features : int
        Channels of these features.
    tables : sequence of sequence of int
        For each source and class the integer that the source stores for it.
    """

    def __init__(self, features: int, tables: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.groups = [sorted(set(table)) for table in tables]
        # As a matrix product it takes a tenth of the time of a convolution on a CPU.
        self.linear = nn.Linear(features, sum(map(len, self.groups)))

    def forward(
        self, features: Tensor, own: Sequence[int | None], others: Sequence[int | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the logits of two heads for every sample, each (groups, *spatial).

        Parameters
        ----------
        features : Tensor, shape (B, features, *spatial)
        own, others : sequence of int or None
            The head of the sample's source, and the head that is asked for agreement, through
            which no gradient goes. None: any.
        """
        weights = self.linear.weight.split([len(groups) for groups in self.groups])
        biases = self.linear.bias.split([len(groups) for groups in self.groups])

        def logits(sample: Tensor, s: int) -> Tensor:
            flat = torch.addmm(biases[s][:, None], weights[s], sample.flatten(1))
            return flat.unflatten(1, sample.shape[1:]).float()

        labelled = [logits(x, s or 0) for x, s in zip(features, own, strict=True)]
        with torch.no_grad():
            asked = [logits(x, s or 0) for x, s in zip(features, others, strict=True)]
        return labelled, asked


def own_label_loss(
    heads: Sequence[Tensor],
    groups: Sequence[Sequence[int]],
    target: Tensor,
    own: Sequence[int | None],
    *,
    ddp: bool = False,
) -> Tensor:
    """Return the cross-entropy of every sample's own head with its labels.

    Parameters
    ----------
    heads : sequence of Tensor, each (groups, *spatial)
        Logits of every sample's own head, the first that `SourceHeads` returns.
    groups : sequence of sequence of int
        The stored label of each channel of a head, in ascending order.
    target : Tensor, shape (B, 1, *spatial)
    own : sequence of int or None
        The head of each sample; None: it has none.
    ddp : bool
        See `average`.

    Returns
    -------
    Tensor, shape ()
        In nats, mean over annotated voxels; connected to the heads in any case, as DDP needs.
    """
    total = heads[0].new_zeros(())
    count = heads[0].new_zeros(())
    for logits, labels, s in zip(heads, target, own, strict=True):
        annotated = torch.stack([labels[0] == value for value in groups[s or 0]]) & (s is not None)
        one_hot = annotated.to(logits.dtype)
        total = total - inner_product(one_hot, torch.log_softmax(logits, 0))
        count = count + one_hot.sum()
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
    heads : sequence of Tensor, each (groups, *spatial)
        Logits of the head that is asked for each sample, the second that `SourceHeads` returns.
    logits : Tensor, shape (B, C, *spatial)
        Of the main head.
    tables : Tensor, shape (S, C), integer
        For each source and class the integer that the source stores for it.
    target, representatives, ignore_label
        Labels of the samples, and what they stand for.
    others : sequence of int or None
        For each sample, a source that is not its own, whose head is asked.
    ddp : bool
        See `average`.

    Returns
    -------
    Tensor, shape ()
        Kullback-Leibler divergence in nats, mean over the voxels whose open classes are in more
        than one group of the other source.
    """
    total = 0 * logits.float().sum()
    count = heads[0].new_zeros(())
    channels = class_channels(logits)
    for b, classes, voxels in ambiguous_groups(target, representatives, ignore_label):
        other = others[b]
        if other is None:
            continue
        table = tables[other].tolist()
        shared = {
            k: [channels[b][c] for c in classes if table[c] == value]
            for k, value in enumerate(sorted(set(table)))
            if any(table[c] == value for c in classes)
        }
        if len(shared) < 2:
            continue
        sums = [z[0] if len(z) == 1 else torch.stack(z).logsumexp(0) for z in shared.values()]
        log_q = torch.log_softmax(torch.stack(sums), 0)
        log_h = torch.log_softmax(torch.stack([heads[b][k] for k in shared]).detach(), 0)
        asked = log_h.exp() * voxels
        total = total + inner_product(asked, log_h - log_q)
        count = count + voxels.sum()
    return average(total, count, ddp=ddp)
