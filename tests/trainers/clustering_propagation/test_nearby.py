"""What a click says of the pixels around it."""

import heapq
import math
from itertools import product

import pytest
import torch
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.nearby import (
    ALIKE,
    FARTHEST,
    HONOURED,
    LOOKS,
    UNLIKE,
    share_of_clicks,
    told,
)

REACH = 4.0


def clicked_at(*places: tuple[int, int], shape: tuple[int, int] = (24, 19)) -> Tensor:
    clicked = torch.zeros(*shape, dtype=torch.bool)
    for row, column in places:
        clicked[row, column] = True
    return clicked


def lengths_of_ways(costs: list[list[float]], starts: list[tuple[int, int]]) -> list[list[float]]:
    """Dijkstra's algorithm: a step costs the mean of its two pixels, times its length."""
    rows, columns = len(costs), len(costs[0])
    lengths = [[math.inf] * columns for _ in range(rows)]
    heap = [(0.0, row, column) for row, column in starts]
    while heap:
        length, row, column = heapq.heappop(heap)
        if length >= lengths[row][column]:
            continue
        lengths[row][column] = length
        for down, right in product((-1, 0, 1), repeat=2):
            r, c = row + down, column + right
            if (down or right) and 0 <= r < rows and 0 <= c < columns:
                step = (costs[row][column] + costs[r][c]) / 2 * math.hypot(down, right)
                heapq.heappush(heap, (length + step, r, c))
    return lengths


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("across", "reach"), [(0.0, 4.0), (2.5, 4.0), (11.0, 4.0), (0.2, 0.5)])
def test_a_click_counts_by_the_shortest_way(across: float, reach: float, channels: int) -> None:
    places = [(2, 3), (3, 3), (20, 11)]
    clicked = clicked_at(*places)
    there, here = torch.randn(2, channels, 24, 19, generator=torch.Generator().manual_seed(0))
    looks = [there[:, row, column] for row, column in places]
    costs = [
        [
            ALIKE + UNLIKE * min(float((look - here[:, r, c]).square().mean().sqrt())
                                 for look in looks)
            for c in range(19)
        ]
        for r in range(24)
    ]  # fmt: skip
    lengths = lengths_of_ways(costs, places)
    found = share_of_clicks(clicked, there, here, across=across, reach=reach)
    for row, column in product(range(24), range(19)):
        far = math.hypot(lengths[row][column], across)
        expected = math.exp(-(far**2) / (2 * reach**2)) if far <= FARTHEST * reach else 0
        assert found[row, column] == pytest.approx(expected, abs=1e-5)


def test_a_click_fills_an_organ_and_ends_at_its_edge() -> None:
    rows, columns = torch.meshgrid(torch.arange(60), torch.arange(60), indexing="ij")
    organ = (rows - 30) ** 2 + (columns - 30) ** 2 <= 15**2
    image = torch.where(organ, 2.0, 0.0)[None]
    clicked = clicked_at((30, 22), shape=(60, 60))
    found = share_of_clicks(clicked, image, image, across=0, reach=REACH)
    assert found[30, 22] == pytest.approx(1)
    assert found.max() <= 1
    assert found[30, 44] > 0.8  # the far end of the organ
    assert found[30, 5] < 0.1  # nearer, but outside
    assert found[~organ].mean() < 0.1


def test_many_clicked_pixels_are_looked_at_in_part() -> None:
    clicked = clicked_at(*((5, column) for column in range(19)))
    assert clicked.sum() > LOOKS
    image = torch.arange(19.0).expand(1, 24, 19)
    found = share_of_clicks(clicked, image, image, across=0, reach=REACH)
    assert (found[5] == 1).all()
    # The first and the last are looked at.
    assert found[8, 0] == found[8, 18] == pytest.approx(math.exp(-((3 * ALIKE / REACH) ** 2) / 2))


def test_plain_labels_follow_what_is_known() -> None:
    logits = 3 * torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    on = torch.zeros(3, 6, 5)
    off = torch.zeros_like(on)
    assert torch.equal(told(logits, on, off, regions=False), logits.half())
    on[1, 2, 2] = 1
    on[2, 3, 3], on[1, 3, 3] = 0.75, 0.25
    found = told(logits, on, off, regions=False)
    others = logits[[0, 2], 2, 2]
    assert found[1, 2, 2] >= others.max() + 0.99 * HONOURED
    goal = logits[:, 3, 3].max() + HONOURED
    assert found[2, 3, 3] == pytest.approx(float(0.25 * logits[2, 3, 3] + 0.75 * goal), abs=2e-3)
    changed = (found != logits.half()).nonzero().tolist()
    assert changed == [[1, 2, 2], [2, 3, 3]]


def test_regions_may_be_known_to_be_there_and_not_to_be_there() -> None:
    sure = 2 * HONOURED
    logits = torch.tensor([-sure, 0.2, 3.0, -0.5])[:, None, None]
    on = torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None, None]
    off = torch.tensor([0.5, 0.0, 1.0, 0.5])[:, None, None]
    found = told(logits, on, off, regions=True).flatten().tolist()
    half_way = (-0.5 - HONOURED) / 2
    assert found == pytest.approx([sure, HONOURED, -HONOURED, half_way], abs=4e-3)
