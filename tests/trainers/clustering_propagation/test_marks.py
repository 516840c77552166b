"""What prompts mark on slices (spec 1.6 and 5.5)."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.marks import marks_of
from nnmosaic.trainers.clustering_propagation.slice_prompts import SlicePrompt

LABELS = SimpleNamespace(has_regions=False, all_labels=[0, 1, 2])


def point(label: int, *, positive: bool = True, clicked: bool = True) -> SlicePrompt:
    row, column, one = (np.array([value]) for value in (2.0, 3.0, 1.0))
    return SlicePrompt(label, 4, row, column, one, positive=positive, clicked=clicked)


def nothing_found(index: int) -> Tensor:
    return torch.zeros(3, 6, 7)


def test_the_last_label_of_a_pixel_counts() -> None:
    for prompts, expected in (
        ([point(1), point(2)], 2),
        ([point(2), point(1)], 1),
        ([point(2), point(2, positive=False)], 0),
        ([point(2, positive=False), point(2)], 2),
    ):
        (marks,) = marks_of(prompts, LABELS, nothing_found).values()
        assert marks.on[:, 2, 3].nonzero().flatten().tolist() == [expected]
        assert marks.on.sum() == 1
        assert not (marks.on & marks.off).any()


def test_only_clicks_speak_for_what_is_around_them() -> None:
    (clicked,) = marks_of([point(1)], LABELS, nothing_found).values()
    assert clicked.clicked.nonzero().tolist() == [[2, 3]]
    (drawn,) = marks_of([point(1, clicked=False)], LABELS, nothing_found).values()
    assert not drawn.clicked.any()


def test_every_prompt_weighs_the_same_and_a_ring_spares_other_objects() -> None:
    rows, columns = np.array([1, 2, 2]), np.array([3, 3, 4])
    ring = SlicePrompt(1, 4, rows, columns, np.ones(3), positive=False, exact=False)
    found = torch.zeros(3, 6, 7)
    found[2, 2, 4] = 5.0  # another object
    found[1, 2, 3] = 5.0  # the object itself, wrongly
    (marks,) = marks_of([ring, point(1)], LABELS, lambda index: found).values()
    assert marks.weights.flatten(1).sum(1).tolist() == [1, 1, 0]
    assert marks.weights[0].nonzero().tolist() == [[1, 3], [2, 3]]
