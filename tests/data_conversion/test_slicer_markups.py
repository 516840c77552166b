"""Point lists of 3D Slicer, in the form that its schemas 1.0.0 to 1.0.4 allow."""

import json
from pathlib import Path
from typing import Any

import pytest

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.prompts import Point, Prompts, read_prompts

LABELS = {"background": 0, "liver": 1, "lobe-2": 2, "ignore": 3}


def write(folder: Path, *markups: Any) -> Path:
    path = folder / "case.mrk.json"
    path.write_text(json.dumps({"@schema": "any", "markups": markups}), encoding="utf-8")
    return path


def markup(*points: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": list(points), **keys}


def test_points_take_the_class_of_their_own_name_or_of_the_list(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        markup(
            {"label": "liver-1", "position": [1, 2, 3]},
            {"label": "background", "position": [4, 5, 6]},
            {"label": "lobe-2", "position": [7, 8, 9.5]},  # the class itself ends like a number
            {"label": "F-9", "position": [0, 0, 1]},
            {"position": [0, 0, 2]},
            name="liver",
        ),
        markup({"label": "lobe-2-1", "position": [0, 0, 0]}, name="anything"),
    )
    labels = [1, 0, 2, 1, 1, 2]
    places = [(1, 2, 3), (4, 5, 6), (7, 8, 9.5), (0, 0, 1), (0, 0, 2), (0, 0, 0)]
    points = tuple(Point(lab, place) for lab, place in zip(labels, places, strict=True))
    assert read_prompts(path, LABELS) == Prompts("world", "LPS", "xyz", points)


def test_all_points_are_brought_to_lps_and_mm(tmp_path: Path) -> None:
    place = {"label": "liver", "position": [1000, -2000, 3000]}
    path = write(
        tmp_path,
        markup(place),
        markup(place, coordinateSystem="RAS"),
        markup(place, coordinateUnits="um"),
        markup(place, coordinateUnits=["um", "UCUM", "micrometer"], coordinateSystem="RAS"),
        {"type": "Fiducial", "controlPoints": [place]},  # LPS and mm if nothing is said
    )
    points = read_prompts(path, LABELS).interactions
    assert [p.coordinates for p in points if isinstance(p, Point)] == [
        (1000, -2000, 3000), (-1000, 2000, 3000), (1, -2, 3), (-1, 2, 3), (1000, -2000, 3000),
    ]  # fmt: skip


def test_points_that_were_never_placed_are_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        markup(
            {"label": "liver", "position": [0, 0, 0], "positionStatus": "undefined"},
            {"label": "liver", "positionStatus": "preview"},
            {"label": "liver", "position": [1, 1, 1], "positionStatus": "defined"},
        ),
    )
    assert read_prompts(path, LABELS).interactions == (Point(1, (1, 1, 1)),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"type": "Curve", "controlPoints": []}, r"markups\[0\]: only point lists .* got 'Curve'"),
        (3, "only point lists"),
        (markup(coordinateSystem="LAS"), "must be LPS or RAS, got 'LAS'"),
        (markup(coordinateSystem=[]), "must be LPS or RAS"),
        (markup(coordinateUnits="cm"), "must be mm or um, got 'cm'"),
        (markup(coordinateUnits=[]), "must be mm or um"),
        (markup(controlPoints={}), '"controlPoints" must be a list'),
        (markup({"label": "liver"}), r"controlPoints\[0\]: position must be a list of three num"),
        (markup({"label": "liver", "position": [0, 0, float("nan")]}), "not a finite number"),
        (markup({"label": "F-1", "position": [0, 0, 0]}, name="F"), "unknown label 'F'"),
        (markup({"label": "F-1", "position": [0, 0, 0]}), "unknown label 'F-1'"),
        (markup({"label": ["liver"], "position": [0, 0, 0]}), "unknown label"),
        (markup({"label": "ignore", "position": [0, 0, 0]}), "unknown label 'ignore'"),
        (markup(7), r"controlPoints\[0\] must be an object"),
    ],
)
def test_bad_markups_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=message) as error:
        read_prompts(path, LABELS)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["[]", '{"version": 1}', '{"markups": 1}'])
def test_a_file_that_is_not_slicers_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "case.mrk.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match='has no list "markups"'):
        read_prompts(path, LABELS)
