"""Terms that act where a label leaves several classes open (self_disambiguation.md, 2.9 and 7.3).

They see the softmax over the classes that are possible at a voxel, so they can never contradict a
label, and they are 0 where every class is annotated.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nnmosaic.trainers.averaging import average, inner_product


def ambiguous_groups(
    target: Tensor, representatives: Tensor, ignore_label: int | None = None
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Yield the sets of more than one class that labels stand for, and where.

    Parameters
    ----------
    target : Tensor, shape (B, 1, *spatial)
        Stored labels; each is the representative of its group.
    representatives : Tensor, shape (B, C), integer
        For each sample and class the channel that stands for its group. On the CPU, so that looking
        at it does not wait for the GPU.
    ignore_label : int, optional
        Value of voxels at which every class is possible.

    Yields
    ------
    sample : int
    classes : list of int
    voxels : Tensor, shape (*spatial), bool
    """
    for b, table in enumerate(representatives.tolist()):
        for c in sorted(set(table)):
            classes = [k for k, stands_for in enumerate(table) if stands_for == c]
            if len(classes) > 1:
                yield b, classes, target[b, 0] == c
        if ignore_label is not None:
            yield b, list(range(len(table))), target[b, 0] == ignore_label


class OpenVoxels:
    """Softmax over the classes that labels leave open, shared by the terms on it.

    Parameters
    ----------
    logits : Tensor, shape (B, C, *spatial)
        Network output before softmax.
    target, representatives, ignore_label
        As in `ambiguous_groups`.
    ddp : bool
        See `average`.
    """

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        representatives: Tensor,
        *,
        ignore_label: int | None = None,
        ddp: bool = False,
    ) -> None:
        channels = class_channels(logits)
        self._groups = [
            (b, classes, voxels, torch.log_softmax(_stacked(channels[b], classes), 0))
            for b, classes, voxels in ambiguous_groups(target, representatives, ignore_label)
        ]
        self._none = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        self._count = sum((voxels.sum() for _, _, voxels, _ in self._groups), self._none)
        self._ddp = ddp

    def conditional_entropy(self) -> Tensor:
        """Return the mean entropy inside the possible classes, over ambiguous voxels (2.9).

        Its chain rule: entropy of softmax = entropy of the group probabilities + P(group) times
        this. It is a softmax restricted to the set, so it cannot fall by moving probability out of
        it.

        Returns
        -------
        Tensor, shape ()
            In nats; exactly 0 if no voxel is ambiguous.
        """
        total = self._none
        for _, _, voxels, log_p in self._groups:
            total = total - (log_p.exp() * log_p * voxels).sum()
        return average(total, self._count, ddp=self._ddp)

    def teacher_cross_entropy(
        self, teacher_logits: Tensor, *, threshold: float, foreground_threshold: float
    ) -> Tensor:
        """Return the cross-entropy with a teacher, both restricted to the possible classes (7.3.2).

        Parameters
        ----------
        teacher_logits : Tensor, shape (B, C, *spatial)
            No gradient goes to the teacher.
        threshold, foreground_threshold : float
            A voxel counts by the class that the teacher thinks most probable among the possible
            ones: where its probability among these is above the first if it is the background,
            above the second if it is another class.

        Returns
        -------
        Tensor, shape ()
            Sum over voxels with a sure teacher, divided by the number of ambiguous voxels: small
            while the teacher is unsure. Exactly 0 if no voxel is ambiguous.
        """
        total = self._none
        channels = class_channels(teacher_logits.detach())
        for b, classes, voxels, log_p in self._groups:
            goal = torch.softmax(_stacked(channels[b], classes), 0)
            # Neither argmax nor where: on a CPU they take longer than the softmax.
            best = goal.amax(0)
            sure = best > foreground_threshold
            if classes[0] == 0:  # they ascend
                background = goal[0] == best
                sure = (sure & ~background) | ((best > threshold) & background)
            total = total - inner_product(goal * (sure & voxels), log_p)
        return average(total, self._count, ddp=self._ddp)


def class_channels(logits: Tensor) -> list[tuple[Tensor, ...]]:
    """Return the channels of every sample, each (*spatial), in float32 at least.

    Choosing among these costs less in the backward pass than indexing.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return [sample.unbind(0) for sample in logits.unbind(0)]


def _stacked(channels: Sequence[Tensor], classes: list[int]) -> Tensor:
    return torch.stack([channels[c] for c in classes])
