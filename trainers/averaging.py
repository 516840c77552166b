"""Sums, and means whose gradients are the same in one process and in several."""

import torch
from torch import Tensor


def average(total: Tensor, count: Tensor, *, ddp: bool) -> Tensor:
    """Return ``total / count``; 0, connected to the graph, where nothing was counted.

    With ``ddp`` the count is the mean over processes, so that the gradients, which DDP averages,
    are those of one process with the whole batch.
    """
    if ddp:
        count = count.clone().float()
        torch.distributed.all_reduce(count)
        return total / (count.clamp_min(1) / torch.distributed.get_world_size())
    return total / count.clamp_min(1)


def inner_product(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of the products of two tensors of one shape, without keeping the products.

    The dtype is that of ``other``. In single precision on a CPU the value of 10^7 products may be
    off by 1e-4 of itself; the gradients, which are the factors, are exact.
    """
    return torch.dot(one.flatten().to(other.dtype), other.flatten())
