"""AdamW with a warm-up, and weights that decay by their role (clustering_propagation.md, 2)."""

from typing import Any

from torch import nn

from nnmosaic.trainers.resumable import BudgetedPolyLRScheduler

NEW_WEIGHT_DECAY = 0.05
"""Of matrices that are not the U-Net's."""
WARM_UP_EPOCHS, WARM_UP_SHARE = 10, 0.1
"""Epochs of rising rate: so many, or this share of a shorter training or of its time budget."""


class WarmUpPolyScheduler(BudgetedPolyLRScheduler):
    """nnU-Net's polynomial schedule after a linear rise, times the "factor" of each group."""

    def step(self, current_step: float | None = None) -> None:
        """Set the learning rate of an epoch."""
        super().step(current_step)
        epoch = max(current_step or 0, 0)
        rising = min(WARM_UP_EPOCHS, WARM_UP_SHARE * self.max_steps)
        share = min(1.0, max((epoch + 1) / (rising + 1), self.progress() / WARM_UP_SHARE))
        for group in self.optimizer.param_groups:
            group["lr"] *= share * group["factor"]


def parameter_groups(
    network: nn.Module, *, new: str, factor: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return AdamW's groups: new parts and U-Net, each with and without decay.

    Parameters
    ----------
    network : nn.Module
    new : str
        What the names of the new parts begin with. What they learn as such, vectors that are no
        matrix's, does not decay; "queries" are such vectors, though they are stored as a matrix.
    factor : float
        Learning rate of the U-Net relative to the new parts.
    weight_decay : float
        Of the U-Net's matrices.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.dim() > 1 and not name.endswith("queries")
        groups.setdefault((name.startswith(new), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "factor": 1.0 if is_new else factor,
            "weight_decay": (NEW_WEIGHT_DECAY if is_new else weight_decay) if decays else 0.0,
        }
        for (is_new, decays), parameters in sorted(groups.items(), reverse=True, key=lambda g: g[0])
    ]
