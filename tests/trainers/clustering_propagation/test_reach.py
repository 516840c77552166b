"""How far a click counts, measured on training cases."""

from typing import Any

import numpy as np
import pytest

from nnmosaic.trainers.clustering_propagation.nearby import ALIKE
from nnmosaic.trainers.clustering_propagation.reach import (
    CASES,
    LENGTHS,
    SLICES,
    ClickedSlice,
    clicked_slices,
    reaches,
)

ROWS, COLUMNS = np.mgrid[:64, :60]
DISC = (ROWS - 30) ** 2 + (COLUMNS - 28) ** 2 <= 8.2**2
EVERYWHERE = np.ones(DISC.shape, bool)
FLAT = np.zeros((1, 64, 60), np.float32)


def test_an_organ_that_stands_out_is_reached_as_far_as_any() -> None:
    image = np.where(DISC, 20.0, 0.0)[None].repeat(2, 0)
    found = reaches([ClickedSlice(1, image, DISC, EVERYWHERE)], 2)
    assert found.tolist() == pytest.approx([LENGTHS[-1]] * 2)


def test_one_that_looks_like_all_around_is_reached_up_to_its_edge() -> None:
    found = float(reaches([ClickedSlice(1, FLAT, DISC, EVERYWHERE)], 2)[1])
    step = LENGTHS[1] / LENGTHS[0]
    # A way along rows, columns and diagonals is up to 8 % longer than the straight one.
    assert 8 * ALIKE / step < found < 8.2 * ALIKE * 1.1 * step


def test_ignored_pixels_are_not_counted() -> None:
    sliver = DISC.copy()
    sliver[:, 40:] = True
    found = reaches([ClickedSlice(1, FLAT, DISC, sliver), ClickedSlice(1, FLAT, DISC, DISC)], 2)
    less = reaches([ClickedSlice(1, FLAT, DISC, sliver)], 2)
    assert float(reaches([ClickedSlice(1, FLAT, DISC, DISC)], 2)[1]) == pytest.approx(LENGTHS[-1])
    assert 12 * ALIKE * 0.8 < float(less[1]) < 12 * ALIKE * 1.3  # up to the other annotated part
    assert found.equal(less)


def test_all_slices_of_a_class_are_counted_together() -> None:
    small = (ROWS - 30) ** 2 + (COLUMNS - 28) ** 2 <= 2
    slices = [ClickedSlice(2, FLAT, DISC, EVERYWHERE)] * 9
    alone = reaches(slices, 3)[2]
    # One in ten with a smaller organ still leaves more than 85 % of the pixels.
    assert reaches([*slices, ClickedSlice(2, FLAT, small, EVERYWHERE)], 3)[2] == alone
    assert reaches([*slices, *[ClickedSlice(2, FLAT, small, EVERYWHERE)] * 2], 3)[2] < alone


def test_the_largest_part_is_clicked_on() -> None:
    image = np.where(DISC, 20.0, 0.0)[None]
    mask = DISC.copy()
    mask[5, 5] = True  # looks like what is around it
    assert reaches([ClickedSlice(1, image, mask, EVERYWHERE)], 2)[1] == pytest.approx(LENGTHS[-1])


def test_classes_that_were_not_seen_get_the_least() -> None:
    stands_out = ClickedSlice(3, np.where(DISC, 20.0, 0.0)[None], DISC, EVERYWHERE)
    found = reaches([stands_out, ClickedSlice(1, FLAT, DISC, EVERYWHERE)], 5).tolist()
    assert found[0] == found[1] == found[2] == found[4] < found[3]
    assert reaches([], 2).tolist() == pytest.approx([ALIKE] * 2)


class _Cases:
    """As nnU-Net's datasets, with labels 1, 2 and 3 (to be ignored), and 20 cases."""

    identifiers = tuple(f"case{i:02}" for i in range(20))

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        labels = np.zeros((1, 30, 8, 8), np.int8)
        labels[0, 2:22, :4] = 1
        labels[0, 21, 4:, :2] = 2
        labels[0, :, 7, 7] = 3
        places = {key: np.argwhere(np.isin(labels, key)) for key in (1, 2, 3, (1, 2), (2,))} | {
            4: []
        }
        image = np.full((2, 30, 8, 8), int(identifier[-2:]))
        return image, labels, None, {"class_locations": places}


def test_slices_are_spread_over_cases_and_classes() -> None:
    found = list(clicked_slices(_Cases(), {1: 1, 2: 2, 4: 4}, 3))  # type: ignore[arg-type]
    of_first = [s for s in found if s.output == 1]
    assert len(of_first) == CASES * SLICES
    assert len(found) - len(of_first) == CASES  # class 2 is on one slice of each, class 4 nowhere
    assert {s.image[0, 0, 0] for s in found} >= {0, 19}
    one = of_first[0]
    assert one.image.shape == (2, 8, 8)
    assert one.mask.sum() == 32
    assert not one.annotated[7, 7]
    assert one.annotated.sum() == 63


def test_regions_are_clicked_on_as_a_whole() -> None:
    found = list(clicked_slices(_Cases(), {(1, 2): 0, (2,): 1}, None))  # type: ignore[arg-type]
    assert {s.output for s in found} == {0, 1}
    assert max(s.mask.sum() for s in found if s.output == 0) == 32 + 8
    assert {s.mask.sum() for s in found if s.output == 1} == {8}
    assert all(s.annotated.all() for s in found)
