"""Averaging across slices after the sweeps: a design of ours, beside clustering_propagation.md, 3.

What looks at other slices is trained on cases that a network knows by heart, where no slice needs
its neighbours: how much they are worth on new cases is a number, and not learnt.
"""

from collections.abc import Sequence

from torch import Tensor

BESIDE = 1 / 3
"""What the logits of a slice count for in those of its neighbour, where its own count for 1."""


def smoothed(own: Tensor, beside: Sequence[Tensor]) -> Tensor:
    """Return the logits of a slice, averaged with those of the slices beside it, half precision.

    Parameters
    ----------
    own : Tensor, shape (K, H, W)
    beside : sequence of Tensor, each (K, H, W)
        Of at most two slices.
    """
    total = own.float()
    for logits in beside:
        total = total + BESIDE * logits.float()
    return (total / (1 + BESIDE * len(beside))).half()


def smooth_(logits: Tensor) -> None:
    """Average each slice of logits (K, Z, H, W), half precision, with those beside it, in place."""
    before: list[Tensor] = []
    for z, own in enumerate(logits.unbind(1)):
        after = [logits[:, z + 1]] if z + 1 < logits.shape[1] else []
        own = own.clone()
        logits[:, z] = smoothed(own, before + after)
        before = [own]
