"""Simulated users (spec 4 and 5.5): what they click on, and what they never do."""

import numpy as np
import pytest

from nnmosaic.data_conversion.prompts import Point
from nnmosaic.trainers.clustering_propagation.oracle_user import OracleUser

SHAPE = (6, 16, 18)


def empty() -> np.ndarray:
    return np.zeros(SHAPE, np.uint8)


def test_round_one_shows_the_middle_of_the_largest_part_on_the_largest_slice() -> None:
    reference = empty()
    reference[1, 2:7, 2:7] = 1
    reference[3, 2:7, 2:7] = 1  # 25 pixels and 9 others: the largest slice
    reference[3, 10:13, 10:13] = 1
    expected = Point(1, (3.0, 4.0, 4.0), positive=True, round=1)
    for current in (empty(), reference):  # also what was found already
        assert OracleUser().click(reference, current, 1, round=1) == expected


def test_later_rounds_correct_the_deepest_point_of_the_worst_slice() -> None:
    reference, current = empty(), empty()
    reference[1:5, 2:14, 2:14] = 1  # 144 pixels a slice
    current[:] = reference
    current[2, 2:14, 2:5] = 0  # missed: 36
    current[3, 2:14, 2:7] = 0  # missed: 60, in a block of 12 x 5, and
    current[3, 6:9, 14:17] = 1  # found wrongly: 9
    point = OracleUser().click(reference, current, 1, round=2)
    assert point == Point(1, (3.0, 4.0, 4.0), positive=True, round=2)


def test_what_is_found_wrongly_gets_a_negative_click_also_on_a_slice_without_the_object() -> None:
    reference, current = empty(), empty()
    reference[1:3, 2:14, 2:14] = 1
    current[:] = reference
    current[5, 4:9, 4:9] = 1
    point = OracleUser().click(reference, current, 1, round=2)
    assert point == Point(1, (5.0, 6.0, 6.0), positive=False, round=2)
    # An object that is in the reference nowhere cannot be shown: round 1 corrects as well.
    assert OracleUser().click(empty(), current * 2, 2, round=1) is not None


def test_slices_with_few_pixels_are_left_for_the_end() -> None:
    reference, current = empty(), empty()
    reference[1:4, 2:14, 2:14] = 1
    current[:] = reference
    reference[5, 3:6, 3:6] = 1  # 9 of at most 144 pixels, all missed: less than a tenth
    current[2, 4, 4] = 0  # a small error on a large slice
    first = OracleUser().click(reference, current, 1, round=2)
    assert first == Point(1, (2.0, 4.0, 4.0), round=2)
    current[2, 4, 4] = 1
    assert OracleUser().click(reference, current, 1, round=3) == Point(1, (5, 4, 4), round=3)
    # A small structure has small slices: the limit is a tenth of its own largest slice.
    small, nothing = empty(), empty()
    small[1, 2:8, 2:7] = nothing[1, 2:8, 2:6] = 1  # 30 pixels, overlap 24 / 30
    small[4, 2:4, 2:4] = 1  # 4 pixels, overlap 0
    assert OracleUser().click(small, nothing, 1, round=2) == Point(1, (4, 2, 2), round=2)
    small[4, 2:4, 3:4] = 0  # 2 pixels are less than a tenth
    assert OracleUser().click(small, nothing, 1, round=2) == Point(1, (1, 2, 6), round=2)


def test_errors_of_both_kinds_are_not_taken_for_one() -> None:
    reference, current = empty(), empty()
    reference[2, 4:9, 2:7] = 1
    current[2, 4:9, 7:13] = 1  # beside it, and larger
    assert OracleUser().click(reference, current, 1, round=2) == Point(1, (2, 6, 9), False, 2)


def test_the_rim_of_the_image_and_the_size_of_pixels_count() -> None:
    reference = empty()
    reference[0, :5, :9] = 1  # the middle, not the corner
    assert OracleUser().click(reference, empty(), 1, round=1) == Point(1, (0, 2, 2), round=1)
    narrow = empty()
    narrow[0, 2:9, 2:7] = 1  # 7 rows of 1 mm, 5 columns of 3 mm: only the rows are near the edge
    point = OracleUser(spacing=(1.0, 3.0)).click(narrow, empty(), 1, round=1)
    assert point is not None
    assert point.coordinates[1] == 5


def slow_correction(reference: np.ndarray, current: np.ndarray, ignore: int) -> set[tuple]:
    """Return the pixels that are farthest from the edge of the largest error of the worst slice."""
    masks = []
    for z in range(len(reference)):
        seen = reference[z] != ignore
        masks.append(((reference[z] == 1) & seen, (current[z] == 1) & seen))
    areas = [(a | b).sum() for a, b in masks]
    limit = min(100, 0.1 * max(areas))
    rank = []
    for z, (a, b) in enumerate(masks):
        if (a ^ b).any() and areas[z] >= limit:
            rank.append(((a & b).sum() / areas[z], -(a ^ b).sum(), z))
    z = min(rank)[2]
    a, b = masks[z]
    best: set[tuple] = set()
    size = 0
    for error in (a & ~b, b & ~a):
        left = {tuple(p) for p in np.argwhere(error).tolist()}
        while left:
            part, front = set(), [min(left)]
            while front:
                p = front.pop()
                if p in left:
                    left.remove(p)
                    part.add(p)
                    front += [(p[0] + i, p[1] + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            if len(part) > size:
                size, best = len(part), part

    def depth(p: tuple) -> float:
        rim = min(p[0] + 1, p[1] + 1, a.shape[0] - p[0], a.shape[1] - p[1])
        outside = [
            (p[0] - i) ** 2 + (p[1] - j) ** 2
            for i in range(a.shape[0])
            for j in range(a.shape[1])
            if (i, j) not in best
        ]
        return min(rim**2, *outside)

    deepest = max(map(depth, best))
    return {(z, *p) for p in best if depth(p) == deepest}


@pytest.mark.parametrize("seed", range(10))
def test_the_correction_equals_a_slow_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, current = ((rng.random((4, 9, 10)) < 0.55).astype(int) for _ in range(2))
    reference[rng.random(reference.shape) < 0.1] = 2
    point = OracleUser(ignore_label=2).click(reference, current, 1, round=2)
    assert point is not None
    voxel = tuple(int(c) for c in point.coordinates)
    assert voxel in slow_correction(reference, current, ignore=2)
    assert point.positive == (reference[voxel] == 1)


def test_a_click_is_on_an_error_never_ignored_and_never_repeated() -> None:
    user = OracleUser(ignore_label=3)
    rng = np.random.default_rng(1)
    reference = rng.integers(0, 4, (3, 5, 6))
    current = rng.integers(0, 3, reference.shape)
    wrong = ((reference == 1) != (current == 1)) & (reference != 3)
    clicks: list[Point] = []
    for number in range(2, 200):  # the model never reacts
        point = user.click(reference, current, 1, round=number, previous=clicks)
        if point is None:
            break
        clicks.append(point)
    voxels = [tuple(int(c) for c in p.coordinates) for p in clicks]
    assert sorted(voxels) == sorted(map(tuple, np.argwhere(wrong).tolist()))
    assert [p.positive for p in clicks] == [bool(reference[v] == 1) for v in voxels]
    assert user.click(reference, current, 1, round=1, previous=clicks) != clicks[0]


def test_nothing_is_clicked_when_nothing_is_wrong() -> None:
    reference = np.random.default_rng(0).integers(0, 4, SHAPE)
    current = np.where(reference == 3, 1, reference)  # wrong only where it is ignored
    user = OracleUser(ignore_label=3)
    assert user.click(reference, current, 1, round=2) is None
    assert user.clicks(reference, current, (1, 2), round=2) == ()
    assert OracleUser(ignore_label=1).click(reference, reference, 1, round=1) is None


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_may_run_along_any_axis(axis: int) -> None:
    rng = np.random.default_rng(2)
    reference, current = (rng.integers(0, 2, SHAPE) for _ in range(2))
    plain = OracleUser().click(reference, current, 1, round=2)
    turned = OracleUser(slice_axis=axis).click(
        np.moveaxis(reference, 0, axis), np.moveaxis(current, 0, axis), 1, round=2
    )
    assert plain is not None
    assert turned is not None
    z, y, x = plain.coordinates
    assert turned.coordinates == ((z, y, x), (y, z, x), (y, x, z))[axis]


def test_all_objects_at_once_say_what_is_there_instead() -> None:
    reference, current = empty(), empty()
    reference[2, 2:9, 2:9], reference[3, 2:9, 2:9] = 1, 2
    current[2, 2:9, 2:9] = 2  # object 2 where 1 is: both ask for the same click
    current[3, 2:9, 2:9] = 2
    current[4, 3:6, 3:6] = 1  # object 1 where nothing is
    user = OracleUser()
    assert user.clicks(reference, current, (1, 2), round=2) == (Point(1, (2, 5, 5), round=2),)
    reference[2] = current[2] = 0
    assert user.clicks(reference, current, (1, 2), round=3) == (Point(0, (4, 4, 4), round=3),)
    shown = user.clicks(reference, empty(), (1, 2), round=1)
    assert shown == (Point(2, (3, 5, 5), round=1),)


def test_an_object_may_be_a_region() -> None:
    reference, current = empty(), empty()
    reference[2, 2:9, 2:9], reference[2, 4:7, 4:7] = 1, 2
    current[2, 4:7, 4:7] = 1  # in the region, though not of the right label
    point = OracleUser().click(reference, current, (1, 2), round=2)
    assert point is not None
    assert point.label == (1, 2)
    assert current[tuple(int(c) for c in point.coordinates)] == 0
    assert OracleUser().click(reference, np.minimum(reference, 1), (1, 2), round=2) is None


def test_arrays_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"volumes of one shape, got \(6, 16, 18\) and \(6, 16"):
        OracleUser().click(empty(), empty()[:, :, 1:], 1, round=1)
