"""Metrics of interaction against numbers by hand and slow loops (spec 4)."""

import json
from typing import Any

import numpy as np
import pytest

from nnmosaic.data_conversion.prompts import Point
from nnmosaic.trainers.clustering_propagation.interactive_metrics import (
    InteractionCurve,
    annotated_slices,
    dice_after,
    interactions_until,
    interactive_report,
    normalised_auc,
)


def curve(*dice: float, **other: Any) -> InteractionCurve:
    return InteractionCurve(dice, **other)


def test_the_last_value_holds_when_the_user_stops() -> None:
    assert [dice_after(curve(0.5, 0.75, 1.0), n) for n in range(5)] == [0.5, 0.75, 1, 1, 1]


def test_the_area_is_the_mean_height_of_the_trapezoids() -> None:
    # From 1 to 3: (0.6 + 0.8) / 2 and (0.8 + 1.0) / 2; the automatic result does not count.
    assert normalised_auc(curve(0.1, 0.6, 0.8, 1.0), 3) == pytest.approx((0.7 + 0.9) / 2)
    assert normalised_auc(curve(0.1, 0.6, 0.8), 1) == 0.6
    assert normalised_auc(curve(1.0), 5) == 1
    assert normalised_auc(curve(0.0), 5) == 0
    rng = np.random.default_rng(0)
    for _ in range(20):
        one = curve(*rng.random(rng.integers(1, 12)))
        x = np.linspace(1, 10, 9001)  # every corner is a sample
        height = np.interp(x, range(1, 11), [dice_after(one, n) for n in range(1, 11)])
        slow = ((height[1:] + height[:-1]) / 2).mean()
        assert normalised_auc(one, 10) == pytest.approx(slow, abs=1e-9)


def test_interactions_until_a_target() -> None:
    assert interactions_until(curve(0.85, 0.2), 0.85) == 0
    assert interactions_until(curve(0.5, 0.84, 0.9, 0.1), 0.85) == 2
    assert interactions_until(curve(0.5, 0.84), 0.85) is None
    assert interactions_until(curve(*[0.1] * 20, 0.9), 0.85) == 20
    assert interactions_until(curve(*[0.1] * 21, 0.9), 0.85) is None


def test_slices_are_counted_once() -> None:
    points = [Point(1, (z, 5.0, x)) for z, x in ((3.0, 1.0), (3.0, 2.0), (7.0, 2.0))]
    assert annotated_slices(points) == 2
    assert annotated_slices(points, slice_axis=1) == 1
    assert annotated_slices([]) == 0


def test_the_report_by_hand() -> None:
    curves = [
        curve(0.2, 0.6, 0.9, seconds=(1.0, 2.0), slices=2),
        curve(0.8, 0.8, 0.8, seconds=(4.0, 3.0), slices=1),
        curve(0.7, 0.9, seconds=(9.0,), slices=1),
        curve(0.95),
    ]
    report = interactive_report(curves, interactions=2)
    assert report["dice"] == pytest.approx([2.65 / 4, 3.25 / 4, 3.55 / 4])
    assert report["dice_at"] == {
        0: pytest.approx(2.65 / 4), 1: pytest.approx(3.25 / 4), 3: None, 5: None, 10: None,
    }  # fmt: skip
    assert report["never_falls"] is True
    assert report["largest_fall"] == 0
    assert report["auc"] == pytest.approx((0.75 + 0.8 + 0.9 + 0.95) / 4)
    assert report["noc"][0.85] == {"mean": (2 + 20 + 1 + 0) / 4, "failures": 0.25}
    assert report["first_click"] == pytest.approx({"gain": 0.6 / 4, "worst_quarter_gain": 0.4})
    assert report["seconds"] == {"median": 3.0, "largest": 9.0}
    assert report["slices"] == 1
    assert json.loads(json.dumps(report))["dice_at"]["3"] is None


def test_a_fall_of_the_mean_is_seen_though_single_curves_may_fall() -> None:
    report = interactive_report([curve(0.5, 0.4, 0.4), curve(0.5, 0.7, 0.7)], interactions=2)
    assert report["never_falls"] is True
    rounding = [curve(0.1, 0.3), curve(0.2, 0.2), curve(0.3, 0.1)]  # the same mean but for a bit
    assert interactive_report(rounding, interactions=1)["never_falls"] is True
    report = interactive_report([curve(0.5, 0.9, 0.4), curve(0.5, 0.9, 0.8)], interactions=2)
    assert report["never_falls"] is False
    assert report["largest_fall"] == pytest.approx(0.3)


def test_the_worst_quarter_is_rounded_up() -> None:
    curves = [curve(0.1 * n, 0.1 * n + 0.05 * (5 - n)) for n in range(5)]
    report = interactive_report(curves, interactions=1)  # 2 of 5: gains 0.25 and 0.2
    assert report["first_click"]["worst_quarter_gain"] == pytest.approx(0.225)
    assert report["seconds"] == {"median": None, "largest": None}


def test_bad_curves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1, got \(\)"):
        curve()
    with pytest.raises(ValueError, match="between 0 and 1"):
        curve(float("nan"))
    with pytest.raises(ValueError, match=r"one entry per interaction \(1\), got 2"):
        curve(0.5, 0.6, seconds=(1.0, 1.0))
    with pytest.raises(ValueError, match="got 0 curves"):
        interactive_report([], interactions=1)
    with pytest.raises(ValueError, match="up to 2 interactions, 1 allowed"):
        interactive_report([curve(0.5, 0.6, 0.7)], interactions=1)
