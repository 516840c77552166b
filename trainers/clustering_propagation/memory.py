"""What a centre remembers of earlier slices (clustering_propagation.md, 1.5).

The memory of a class changes only where the class is: one that is gone for some slices comes back
with the memory that it had (invariant 9). This also holds for `LastCentre`, which 1.5 lets fall
back to the query.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

WINDOW = 4
"""Centres that `WindowMemory` keeps."""


class State(NamedTuple):
    """The memory of B volumes between two slices.

    Attributes
    ----------
    kept : Tensor, shape (B, N, L, D)
        What the memory holds of each centre.
    written : Tensor, shape (B, N), integer
        How many of the L are in use.
    distance : Tensor, shape (B, N)
        Millimetres from the slice of the last writing to the slice seen last.
    """

    kept: Tensor
    written: Tensor
    distance: Tensor

    def where(self, condition: Tensor, other: "State") -> "State":
        """Return this state for volumes with ``condition``, shape (B,), and the other elsewhere."""
        return State(
            *(
                torch.where(condition.view(-1, *[1] * (mine.dim() - 1)), mine, others)
                for mine, others in zip(self, other, strict=True)
            )
        )


class Memory(nn.Module, ABC):
    """What all kinds share: an empty memory answers with the query.

    Parameters
    ----------
    width : int
        Of a centre.
    """

    length = 1
    """Vectors that are kept per centre."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def empty(self, batch: int, queries: Tensor) -> State:
        """Return the state before the first slice, for queries of shape (N, D)."""
        number = len(queries)
        return State(
            queries.new_zeros(batch, number, self.length, self.width),
            torch.zeros(batch, number, dtype=torch.long, device=queries.device),
            queries.new_zeros(batch, number),
        )

    def read(self, state: State, queries: Tensor) -> Tensor:
        """Return the centres to begin the next slice with, shape (B, N, D)."""
        written = (state.written > 0)[..., None]
        return torch.where(written, self._recall(state, queries), queries)

    def write(self, state: State, centres: Tensor, distance_mm: Tensor, gate: Tensor) -> State:
        """Return the state after a slice.

        Parameters
        ----------
        state : State
            Before the slice; not changed.
        centres : Tensor, shape (B, N, D)
            After clustering.
        distance_mm : Tensor, shape (B,)
            From the slice before to this one; of no matter for the first slice.
        gate : Tensor, shape (B, N), bool
            Centres that are written.
        """
        distance = (state.distance + distance_mm[:, None]) * (state.written > 0)
        kept = self._merge(state, centres, distance)
        return State(
            torch.where(gate[..., None, None], kept, state.kept),
            torch.where(gate, (state.written + 1).clamp_max(self.length), state.written),
            torch.where(gate, 0, distance),
        )

    @abstractmethod
    def _recall(self, state: State, queries: Tensor) -> Tensor:
        """Return centres (B, N, D); those of an empty memory are not used."""

    @abstractmethod
    def _merge(self, state: State, centres: Tensor, distance: Tensor) -> Tensor:
        """Return what is kept, (B, N, L, D), if all centres are written."""


class LastCentre(Memory):
    """The centre of the last slice that showed the class: the most literal propagation."""

    def _recall(self, state: State, queries: Tensor) -> Tensor:
        return state.kept[:, :, 0]

    def _merge(self, state: State, centres: Tensor, distance: Tensor) -> Tensor:
        return centres[:, :, None]


class _Offset(nn.Module):
    """What a memory adds to the query; nothing before training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        offset: Tensor = self.linear(self.norm(x))
        return offset


class RecurrentMemory(Memory):
    """A gated recurrent unit, shared by all centres, that is told how far back it last wrote."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        told = width // 4
        self.distance = nn.Sequential(nn.Linear(1, told), nn.GELU(), nn.Linear(told, told))
        self.cell = nn.GRUCell(width + told, width)
        self.offset = _Offset(width)

    def _recall(self, state: State, queries: Tensor) -> Tensor:
        centres: Tensor = queries + self.offset(state.kept[:, :, 0])
        return centres

    def _merge(self, state: State, centres: Tensor, distance: Tensor) -> Tensor:
        told = self.distance(distance.log1p()[..., None])
        seen = torch.cat((centres, told), 2).flatten(0, 1)
        hidden: Tensor = self.cell(seen, state.kept[:, :, 0].flatten(0, 1))
        return hidden.float().view_as(state.kept)


class WindowMemory(Memory):
    """The last `WINDOW` written centres, among which the query attends."""

    length = WINDOW

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.offset = _Offset(width)

    def _recall(self, state: State, queries: Tensor) -> Tensor:
        scores = torch.einsum("nd,bnld->bnl", self.query(queries), self.key(state.kept))
        used = torch.arange(self.length, device=queries.device) < state.written[..., None].clamp(1)
        weights = (scores.float() / self.width**0.5).masked_fill(~used, -torch.inf).softmax(2)
        pooled = torch.einsum("bnl,bnld->bnd", weights, state.kept)
        centres: Tensor = queries + self.offset(pooled)
        return centres

    def _merge(self, state: State, centres: Tensor, distance: Tensor) -> Tensor:
        return torch.cat((centres[:, :, None], state.kept[:, :, :-1]), 2)


MEMORIES: dict[str, type[Memory]] = {
    "gru": RecurrentMemory,
    "last": LastCentre,
    "window": WindowMemory,
}
"""Kinds by the name of the trainer's option."""
