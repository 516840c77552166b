"""A moving average of the network's weights, and the trainers that may learn from it."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnmosaic.data_conversion.atomic_write import replacing
from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.checkpoint import EXTRA, read_checkpoint
from nnmosaic.trainers.resumable import plain_network

EXPORTED = "checkpoint_teacher_final.pth"


def forgetting_momentum(n: int, decay: float) -> float:
    """Return ``min(decay, n / (n + 1))``: the plain mean at first (Tarvainen and Valpola, 2017).

    Parameters
    ----------
    n : int
        Iteration, from 0. The random first weights are forgotten at once.
    decay : float
        In [0, 1).
    """
    return min(decay, n / (n + 1))


class EMATeacher:
    """Exponential moving average of a network (Tarvainen and Valpola, NeurIPS 2017).

    Parameters
    ----------
    network : nn.Module
        The student; may be wrapped by DDP or ``torch.compile``. The copy is in evaluation mode, has
        no deep supervision and needs no gradient.
    compiled : bool
        Whether to compile the copy.
    """

    def __init__(self, network: nn.Module, *, compiled: bool = False) -> None:
        self.network = deepcopy(plain_network(network)).requires_grad_(False).eval()
        self.network.decoder.deep_supervision = False
        self._forward = torch.compile(self.network) if compiled else self.network

    def __call__(self, data: Tensor) -> Tensor:
        """Return the logits, shape (B, C, *spatial), of images of shape (B, channels, *spatial)."""
        with torch.no_grad():
            logits: Tensor = self._forward(data)
        return logits

    def update(self, network: nn.Module, momentum: float) -> None:
        """Set the weights to ``momentum * teacher + (1 - momentum) * student``; copy buffers."""
        student = plain_network(network)
        with torch.no_grad():
            weights = list(self.network.parameters()), list(student.parameters())
            torch._foreach_lerp_(*weights, 1 - momentum)
            for mine, theirs in zip(self.network.buffers(), student.buffers(), strict=True):
                mine.copy_(theirs)


class TeacherTrainer(nnUNetTrainerMosaic):
    """Base of trainers that may learn from a moving average of their own weights.

    The teacher starts as the student, with pretrained weights if there are any, goes on from a
    checkpoint, and is left as ``checkpoint_teacher_final.pth``, which predicts like any other.
    """

    teacher: EMATeacher | None

    def initialize(self) -> None:
        """Initialise without a teacher: weights may still be loaded."""
        self.teacher = None
        super().initialize()

    def teacher_momentum(self) -> float | None:
        """Return how much the teacher keeps of itself at this iteration; None: there is none."""
        return None

    def _new_teacher(self) -> EMATeacher:
        return EMATeacher(self.network, compiled=self._do_i_compile())

    def on_train_start(self) -> None:
        """Make the teacher, unless a checkpoint held it."""
        super().on_train_start()
        if self.teacher is None and self.teacher_momentum() is not None:
            if self.current_epoch > 0:
                self.print_to_log_file("The checkpoint holds no teacher: it starts as the student.")
            self.teacher = self._new_teacher()

    def after_step(self) -> None:
        """Move the teacher towards the network."""
        super().after_step()
        momentum = self.teacher_momentum()
        if self.teacher is not None and momentum is not None:
            self.teacher.update(self.network, momentum)

    def method_state(self) -> dict[str, Any]:
        """Return also the teacher; it is not needed for prediction."""
        state = super().method_state()
        if self.teacher is not None:
            state["teacher"] = self.teacher.network.state_dict()
        return state

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore the teacher."""
        super().load_method_state(state)
        if "teacher" in state and self.teacher_momentum() is not None:
            self.teacher = self._new_teacher()
            self.teacher.network.load_state_dict(state["teacher"])

    def on_train_end(self) -> None:
        """Write the last checkpoint, and a second one with the teacher as the network."""
        super().on_train_end()
        if self.teacher is None or self.local_rank != 0 or self.disable_checkpointing:
            return
        folder = Path(self.output_folder)
        checkpoint = read_checkpoint(folder / "checkpoint_final.pth")
        checkpoint["network_weights"] = checkpoint[EXTRA].pop("teacher")
        checkpoint["optimizer_state"] = checkpoint["grad_scaler_state"] = (
            None  # for prediction only
        )
        with replacing(folder / EXPORTED) as temporary:
            torch.save(checkpoint, temporary)
