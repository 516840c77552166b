"""Point lists of 3D Slicer (``.mrk.json``, schema 1.0.0 to 1.0.4) as clicks.

Only what decides where a point is and what it shows is read. The class is the point's own name,
with or without the number that Slicer appends (``liver-2``), or else the name of the list. All
points are positive: "not here" is a point of the background.
"""

import re
from typing import Any

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.interactions import (
    CONVENTIONS,
    Label,
    Labels,
    Point,
    Prompts,
    parse_coordinates,
    parse_label,
)

SLICER_ENDING = ".mrk.json"
POINT_LIST = "Fiducial"
MM_PER_UNIT = {"mm": 1.0, "um": 1e-3}


def parse_markups(content: Any, labels: Labels, *, where: str) -> Prompts:
    """Return the points of all lists of a file, in LPS, in mm.

    Parameters
    ----------
    where : str
        What error messages call the file.

    Raises
    ------
    InputError
        If the file holds other markups than point lists, or a point has no known class.
    """
    lists = content.get("markups") if isinstance(content, dict) else None
    if not isinstance(lists, list):
        raise InputError(
            f'{where} has no list "markups": 3D Slicer did not write it. Save the points there as '
            '"Markups JSON", or give another prompts file the ending .json.'
        )
    points = [
        point
        for i, markup in enumerate(lists)
        for point in _points(markup, labels, f"{where}: markups[{i}]")
    ]
    return Prompts("world", "LPS", "xyz", tuple(points))


def _points(markup: Any, labels: Labels, where: str) -> list[Point]:
    if not isinstance(markup, dict) or markup.get("type") != POINT_LIST:
        kind = markup.get("type") if isinstance(markup, dict) else markup
        raise InputError(
            f"{where}: only point lists ({POINT_LIST}) are read, got {kind!r}. Mark the class "
            "with points, or write a scribble or a box in the JSON of nnMosaic."
        )
    convention = markup.get("coordinateSystem", CONVENTIONS[0])
    if convention not in CONVENTIONS:
        raise InputError(f'{where}: "coordinateSystem" must be LPS or RAS, got {convention!r}.')
    control_points = markup.get("controlPoints", [])
    if not isinstance(control_points, list):
        raise InputError(f'{where}: "controlPoints" must be a list, got {control_points!r}.')
    in_plane = _mm_per_unit(markup, where) * (-1 if convention == "RAS" else 1)
    points = []
    for i, point in enumerate(control_points):
        place = f"{where}: controlPoints[{i}]"
        if not isinstance(point, dict):
            raise InputError(f"{place} must be an object, got {point!r}.")
        if point.get("positionStatus", "defined") != "defined":
            continue  # listed in Slicer, but never placed
        label = _label(point.get("label", ""), markup.get("name", ""), labels, place)
        x, y, z = parse_coordinates(point.get("position"), f"{place}: position")
        points.append(Point(label, (in_plane * x, in_plane * y, abs(in_plane) * z)))
    return points


def _mm_per_unit(markup: dict[str, Any], where: str) -> float:
    unit = markup.get("coordinateUnits", "mm")
    if isinstance(unit, list) and unit:  # a DICOM code: value, scheme, meaning
        unit = unit[0]
    if not isinstance(unit, str) or unit not in MM_PER_UNIT:
        raise InputError(f'{where}: "coordinateUnits" must be mm or um, got {unit!r}.')
    return MM_PER_UNIT[unit]


def _label(own: Any, of_list: Any, labels: Labels, where: str) -> Label:
    for name in (own, re.sub(r"[-_]\d+$", "", own) if isinstance(own, str) else own):
        if isinstance(name, str) and name in labels:
            return parse_label(name, labels, where)
    return parse_label(of_list or own, labels, where)
