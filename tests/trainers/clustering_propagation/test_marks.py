"""What prompts mark on slices (spec 1.6 and 5.5)."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnmosaic.data_conversion.prompts import Box, Prompts
from nnmosaic.trainers.clustering_propagation.coordinates import CaseCoordinates
from nnmosaic.trainers.clustering_propagation.marks import marks_of
from nnmosaic.trainers.clustering_propagation.slice_prompts import SlicePrompt, slice_prompts

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


class Nested:
    """Regions: an organ (1, 2, 3), in it a lesion (2, 3) with a core (3)."""

    has_regions = True
    foreground_regions = ((1, 2, 3), (2, 3), 3)


def box(label: Any, *, positive: bool = True) -> list[SlicePrompt]:
    properties = {
        "shape_before_cropping": (6, 20, 24),
        "bbox_used_for_cropping": [[0, 6], [0, 20], [0, 24]],
    }
    case = CaseCoordinates.of_case(
        properties, transpose_forward=(0, 1, 2), network_shape=(6, 20, 24)
    )
    drawn = Box(label, (4, 8, 8), (4, 12, 13), positive)
    prompts = Prompts("voxel", order="zyx", interactions=(drawn,))
    return [*slice_prompts(prompts, case, read_mask=lambda path: (np.zeros(0), {}))]


@pytest.mark.parametrize(
    ("label", "inside", "outside"),
    [
        (3, [0, 1, 2], [2]),  # a core is in a lesion in an organ, which go on around it
        ((2, 3), [0, 1], [1, 2]),  # nor is there a core where there is no lesion
        (2, [0, 1], []),  # the rim of a lesion: around it there may be organ, and core
        (1, [0], []),
        (0, [], []),
        ((1, 2, 3), [0], [0, 1, 2]),
    ],
)
def test_the_ring_of_a_box_spares_regions_that_go_on_around_it(
    label: Any, inside: list[int], outside: list[int]
) -> None:
    everything = torch.ones(3, 20, 24)  # every region is found everywhere
    (marks,) = marks_of(box(label), Nested, lambda index: everything).values()
    assert marks.weights[:3, 10, 10].nonzero().flatten().tolist() == inside
    assert marks.weights[3:, 6, 8].nonzero().flatten().tolist() == outside


def test_a_box_where_a_label_is_not_is_background() -> None:
    everything = torch.ones(3, 20, 24)
    (marks,) = marks_of(box(3, positive=False), Nested, lambda index: everything).values()
    assert marks.weights.flatten(1).sum(1).tolist() == pytest.approx([0, 0, 0, 1, 1, 1])


def test_a_ring_speaks_against_what_is_found_there_only() -> None:
    nowhere = -torch.ones(3, 20, 24)
    (marks,) = marks_of(box(3), Nested, lambda index: nowhere).values()
    assert not marks.weights[3:].any()
