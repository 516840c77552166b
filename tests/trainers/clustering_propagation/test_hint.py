"""What the slice before says of the pixels of a slice."""

import pytest
import torch
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.hint import SliceHint


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    now, before = (3 * torch.randn(2, 3, 9, 8, generator=generator) for _ in range(2))
    return now, before


def test_it_begins_as_nothing_and_learns(logits: tuple[Tensor, Tensor]) -> None:
    now, before = logits
    hint = SliceHint(3)
    distance = torch.tensor([1.0, 5.0])
    assert torch.equal(hint(now, before, distance), now)
    optimizer = torch.optim.Adam(hint.parameters(), 1e-2)
    losses = []
    for _ in range(80):
        loss = (hint(now, before, distance) - before).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_it_counts_less_from_afar_and_only_near_by_in_the_slice(
    logits: tuple[Tensor, Tensor],
) -> None:
    now, before = logits
    hint = SliceHint(3)
    torch.nn.init.normal_(hint.change.weight)
    with torch.no_grad():
        near = hint(now, before, torch.tensor([0.0, 0.0])) - now
        far = hint(now, before, torch.tensor([10.0, 30.0])) - now
        torch.testing.assert_close(far[0], near[0] * torch.exp(torch.tensor(-1.0)))
        torch.testing.assert_close(far[1], near[1] * torch.exp(torch.tensor(-3.0)))
        other = before.clone()
        other[:, :, 4, 4] += 5
        moved = (hint(now, other, torch.zeros(2)) - now != near).any(1).any(0)
    rows, columns = moved.nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 6, 2, 6)
