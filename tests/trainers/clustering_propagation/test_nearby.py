"""What a click says of the pixels around it."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nnmosaic.trainers.clustering_propagation.nearby import (
    FARTHEST,
    HONOURED,
    REACH,
    share_of_clicks,
    told,
)


def unit_vectors(*shape: int, seed: int = 0) -> Tensor:
    random = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(random, dim=0)


@pytest.mark.parametrize("steps", [0.0, 2.5, 11.0])
def test_every_pixel_asks_the_nearest_click(steps: float) -> None:
    clicked = torch.zeros(40, 33, dtype=torch.bool)
    places = [(2, 3), (3, 3), (20, 30)]
    for row, column in places:
        clicked[row, column] = True
    there, here = unit_vectors(4, 40, 33), unit_vectors(4, 40, 33, seed=1)
    found = share_of_clicks(clicked, there[:, clicked].T, here, steps=steps)
    for row in range(40):
        for column in range(33):
            r, c = min(places, key=lambda p: math.dist(p, (row, column)))
            others = [math.dist(p, (row, column)) for p in places]
            if sorted(others)[0] == sorted(others)[1]:
                continue  # equally near: any of them
            far = math.hypot(min(others), steps)
            alike = max(0.0, float(there[:, r, c] @ here[:, row, column]))
            expected = alike * math.exp(-(far**2) / (2 * REACH**2)) if far <= FARTHEST else 0
            assert found[row, column] == pytest.approx(expected, abs=1e-6)


def test_it_is_all_of_the_clicked_pixel() -> None:
    clicked = torch.zeros(9, 9, dtype=torch.bool)
    clicked[0, 8] = True
    here = unit_vectors(4, 9, 9)
    share = share_of_clicks(clicked, here[:, clicked].T, here, steps=0)
    assert share[0, 8] == pytest.approx(1)
    assert share.max() <= 1


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
    logits = torch.tensor([-4.0, 0.2, 3.0, -0.5])[:, None, None]
    on = torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None, None]
    off = torch.tensor([0.5, 0.0, 1.0, 0.5])[:, None, None]
    found = told(logits, on, off, regions=True).flatten().tolist()
    assert found == pytest.approx([4.0, 1.0, -3.0, -0.75], abs=2e-3)
