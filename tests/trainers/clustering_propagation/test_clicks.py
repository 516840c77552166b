"""A simulated user (spec 2 and 5.5, invariant 13)."""

from typing import Any

import numpy as np
import pytest
import torch

from nnmosaic.trainers.clustering_propagation import clicks
from nnmosaic.trainers.clustering_propagation.clicks import (
    Pixels,
    SliceView,
    add_to,
    click_per_class,
    component,
    correction,
    draw_pixel,
    errors,
    first_round,
    largest_component,
    splat,
)

SHAPE = (20, 16)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def square(top: int, left: int, size: int) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[top : top + size, left : left + size] = True
    return mask


def labels_view(**changes: Any) -> SliceView:
    """Return a slice with class 1 in two parts, class 2, and some ignored background."""
    one, two = square(1, 1, 5) | square(12, 12, 2), square(8, 5, 4)
    annotated = ~square(16, 0, 4)
    view = SliceView(
        np.stack((~one & ~two & annotated, one, two)), annotated, predicted=None, regions=False
    )
    return view._replace(**changes)


def regions_view(**changes: Any) -> SliceView:
    """Return a slice with a region inside another one."""
    masks = np.stack((square(4, 4, 8), square(6, 6, 3)))
    view = SliceView(masks, np.ones(SHAPE, bool), predicted=None, regions=True)
    return view._replace(**changes)


def test_parts_are_drawn_by_their_area(generator: np.random.Generator) -> None:
    mask = labels_view().masks[1]
    sizes = [component(mask, generator).sum() for _ in range(300)]
    assert set(sizes) == {4, 25}
    assert np.mean(np.array(sizes) == 25) == pytest.approx(25 / 29, abs=0.06)
    assert largest_component(mask).sum() == 25


def test_pixels_like_the_middle_and_are_never_outside(generator: np.random.Generator) -> None:
    mask = square(5, 5, 7)
    found = np.zeros(SHAPE)
    for _ in range(1500):
        found[draw_pixel(mask, generator)] += 1 / 1500
    assert not found[~mask].any()
    assert (found[mask] > 0).all()
    # Half of them anywhere, 0.4 by e^depth - 1 (0.267 at the middle), 0.1 in a band of 40 pixels.
    depth = np.minimum.reduce([np.abs(np.arange(7) - e) for e in (-1, 7)])
    weights = np.expm1(np.minimum.outer(depth, depth))
    middle = 0.5 / 49 + 0.4 * weights.max() / weights.sum()
    assert found[8, 8] == pytest.approx(middle, abs=0.03)


@pytest.mark.parametrize("draw", ["_point", "_scribble", "_box", "_mask"])
def test_prompts_are_of_the_class_and_never_on_ignored_pixels(
    draw: str, generator: np.random.Generator
) -> None:
    view = labels_view(annotated=~square(8, 9, 4))  # beside class 2
    for _ in range(60):
        for found in getattr(clicks, draw)(view.masks[2], view, generator):
            assert found.slots in ((2,), (0,))
            weights = splat(found.pixels, SHAPE).numpy()
            assert weights.min() >= 0
            assert weights.sum() > 0
            assert not weights[~view.annotated].any()
            if draw in ("_scribble", "_mask"):
                assert not weights[~view.masks[2]].any()
            if found.slots == (0,):
                assert draw == "_box"
                assert not weights[~view.masks[0]].any()
        if draw == "_box":
            assert weights.shape == SHAPE


def test_clicks_tremble_but_little(generator: np.random.Generator) -> None:
    view = labels_view()
    places = []
    for _ in range(400):
        (found,) = clicks._point(view.masks[2], view, generator)
        places.append((found.pixels.rows[0], found.pixels.columns[0]))
    inside = [view.masks[2][round(r), round(c)] for r, c in places]
    assert 0.6 < np.mean(inside) < 0.95
    assert len({place[0] % 1 for place in places}) > 300


def test_some_classes_are_clicked_at_first_and_at_least_one(
    generator: np.random.Generator,
) -> None:
    view = labels_view()
    clicked = [{s for i in first_round(view, generator) for s in i.slots} for _ in range(200)]
    assert all(found & {1, 2} for found in clicked)
    assert 0.3 < np.mean([found >= {1} for found in clicked]) < 0.8
    assert 0.3 < np.mean([found >= {2} for found in clicked]) < 0.8
    nothing = view._replace(masks=np.stack((view.annotated, *np.zeros((2, *SHAPE), bool))))
    found = [first_round(nothing, generator) for _ in range(100)]
    assert {i.slots for interactions in found for i in interactions} == {(0,)}
    assert sum(map(bool, found)) < 40


def test_a_click_per_class_is_exact(generator: np.random.Generator) -> None:
    view = labels_view()
    found = click_per_class(view, generator)
    assert [i.slots for i in found] == [(1,), (2,)]
    for k, interaction in enumerate(found, 1):
        assert view.masks[k][int(interaction.pixels.rows[0]), int(interaction.pixels.columns[0])]


def test_the_largest_error_is_corrected_by_the_true_class(
    generator: np.random.Generator,
) -> None:
    view = labels_view()
    predicted = view.masks.copy()
    predicted[0] |= square(12, 12, 2)  # 4 pixels of class 1 missed
    predicted[1] &= ~square(12, 12, 2)
    predicted[0] &= ~square(0, 8, 6)  # 36 pixels of class 2 too many
    predicted[2] |= square(0, 8, 6)
    wrong = view._replace(predicted=predicted)
    assert [mask.sum() for mask in errors(wrong)] == [36, 4, 0]
    for _ in range(20):
        (found,) = correction(wrong, generator)
        assert found.slots == (0,)
    assert correction(view._replace(predicted=view.masks), generator) == []
    ignored = view.masks.copy()
    ignored[1] |= ~view.annotated
    assert correction(view._replace(predicted=ignored), generator) == []


def test_a_click_on_a_label_is_positive_for_all_regions_that_hold_it() -> None:
    view = regions_view()
    assert view.slots(square(7, 7, 1)) == (0, 1)
    assert view.slots(square(4, 4, 1)) == (0,)


def test_a_click_is_negative_for_other_regions_that_are_predicted_there() -> None:
    view = regions_view(predicted=np.stack((square(4, 4, 8), square(4, 4, 4))))
    assert view.slots(square(7, 7, 1)) == (0, 1)
    assert view.slots(square(4, 4, 1)) == (0, 3)  # outside of region 1, which covers it
    assert view.slots(square(11, 11, 1)) == (0,)
    assert view.slots(square(0, 0, 1)) == ()
    assert regions_view().slots(square(0, 0, 1)) == (2, 3)  # background, before any prediction


def test_extra_pixels_of_a_region_are_corrected_as_negative(
    generator: np.random.Generator,
) -> None:
    view = regions_view(predicted=np.stack((square(4, 4, 12), square(6, 6, 3))))
    assert [mask.sum() for mask in errors(view)] == [0, 0, 80, 0]
    (found,) = correction(view, generator)
    assert found.slots == (2,)


def test_points_share_their_weight_among_the_pixels_around() -> None:
    pixels = Pixels(np.array([3.25, 0.0]), np.array([4.5, 15.0]), np.array([1.0, 2.0]))
    weights = splat(pixels, SHAPE)
    expected = torch.zeros(SHAPE)
    expected[3, 4] = expected[3, 5] = 0.75 * 0.5
    expected[4, 4] = expected[4, 5] = 0.25 * 0.5
    expected[0, 15] = 2
    torch.testing.assert_close(weights, expected)
    total = torch.zeros(3, *SHAPE)
    add_to(total, [clicks.Interaction(pixels, (0, 2))] * 2)
    each = 2 * expected / expected.sum()  # whatever covers more pixels weighs no more
    torch.testing.assert_close(total, torch.stack((each, 0 * expected, each)))
