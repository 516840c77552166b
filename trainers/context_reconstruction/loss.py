"""Agreement of the masked student with its teacher (context_reconstruction.md, 5.3)."""

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from nnmosaic.trainers.averaging import average

ReconstructionForm: TypeAlias = Literal["kl", "mse_prob", "rel_mse", "mse_over_norm"]


def reconstruction_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    form: ReconstructionForm,
    temperature: float = 1.0,
    regions: bool = False,
    where: Tensor | None = None,
    ddp: bool = False,
) -> Tensor:
    """Return how far the student's logits are from the teacher's, in single precision.

    Parameters
    ----------
    student, teacher : Tensor, shape (B, C, *spatial)
        No gradient goes to the teacher.
    form : {"kl", "mse_prob", "rel_mse", "mse_over_norm"}
        Divergence of the student's probabilities from the teacher's, times the squared temperature;
        squared difference of probabilities; squared difference of logits over the teacher's mean
        square (1.4, well scaled), or over its norm (1.4, as released: about a thousandth of it).
    temperature : float
        Of the probabilities.
    regions : bool
        Whether channels are regions that overlap: a sigmoid each instead of a softmax.
    where : Tensor, optional, bool, shape (B, 1, *spatial)
        Voxels that count; by default all.
    ddp : bool
        Take the teacher's size, and count voxels, over all processes; see `average`.
    """
    student, teacher = student.float(), teacher.detach().float()
    if form in ("kl", "mse_prob"):
        differences = _of_probabilities(
            student / temperature, teacher / temperature, form, regions=regions
        )
        factor: Any = temperature**2 if form == "kl" else 1
    else:
        differences = (student - teacher).square()
        factor = 1 / _teacher_size(teacher, form, ddp=ddp)
    channels = differences.shape[1]
    if where is None:
        return factor * differences.mean()
    return factor * average((differences * where).sum() / channels, where.sum(), ddp=ddp)


def _of_probabilities(
    student: Tensor, teacher: Tensor, form: ReconstructionForm, *, regions: bool
) -> Tensor:
    """Return a value per voxel, (B, 1, *spatial), or for each channel."""
    if regions:  # each channel is a choice between inside and outside
        student, teacher = (torch.stack([z, -z], 2) for z in (student, teacher))
        ours, theirs = functional.logsigmoid(student), functional.logsigmoid(teacher)
    else:
        ours, theirs = torch.log_softmax(student, 1), torch.log_softmax(teacher, 1)
    if form == "mse_prob":
        squares = (ours.exp() - theirs.exp()).square()
        return squares[:, :, 0] if regions else squares
    return (theirs.exp() * (theirs - ours)).sum(2 if regions else 1, keepdim=not regions)


def _teacher_size(teacher: Tensor, form: ReconstructionForm, *, ddp: bool) -> Tensor:
    sums = torch.stack(
        [teacher.square().sum(), torch.tensor(float(teacher.numel()), device=teacher.device)]
    )
    if ddp:
        torch.distributed.all_reduce(sums)
    squares, number = sums
    return squares.sqrt() if form == "mse_over_norm" else squares / number + 1e-8
