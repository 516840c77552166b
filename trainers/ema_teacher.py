"""A copy of the network whose weights are a moving average of the student's."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule


def plain_network(network: Any) -> Any:
    """Return the network inside DDP and ``torch.compile``."""
    network = getattr(network, "module", network)
    return network._orig_mod if isinstance(network, OptimizedModule) else network


class EMATeacher:
    """Exponential moving average of a network (Tarvainen and Valpola, NeurIPS 2017).

    After update ``n`` (from 0) the weights are ``m * teacher + (1 - m) * student`` with
    ``m = min(decay, n / (n + 1))``, so that the random first weights are forgotten.

    Parameters
    ----------
    network : nn.Module
        The student; may be wrapped by DDP or ``torch.compile``. The copy is neither, is in
        evaluation mode, has no deep supervision and needs no gradient.
    decay : float
        In [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.network = deepcopy(plain_network(network)).requires_grad_(False).eval()
        self.network.decoder.deep_supervision = False

    def __call__(self, data: Tensor) -> Tensor:
        """Return the logits, shape (B, C, *spatial), of images of shape (B, channels, *spatial)."""
        with torch.no_grad():
            logits: Tensor = self.network(data)
        return logits

    def update(self, network: nn.Module) -> None:
        """Move the weights towards the student's."""
        momentum = min(self.decay, self.updates / (self.updates + 1))
        student = plain_network(network)
        with torch.no_grad():
            weights = list(self.network.parameters()), list(student.parameters())
            torch._foreach_lerp_(*weights, 1 - momentum)
            for mine, theirs in zip(self.network.buffers(), student.buffers(), strict=True):
                mine.copy_(theirs)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"weights": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the teacher from `state_dict`."""
        self.network.load_state_dict(state["weights"])
        self.updates = int(state["updates"])
