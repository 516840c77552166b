"""Points, scribbles, boxes and masks of a label, and what may stand for a label or a position.

methods/clustering_propagation.md, 5.4 and 5.5. Coordinates are kept as they were written.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.dataset_json import IGNORE
from nnmosaic.data_conversion.errors import InputError

Label = int | tuple[int, ...]
"""Integer of the label map; or, of a dataset with overlapping regions, the integers of a region."""
Labels = Mapping[str, int | Sequence[int]]
"""The labels of ``dataset.json``: name -> integer, or integers of a region."""
Coordinates = tuple[float, float, float]

SPACES = ("world", "voxel")
CONVENTIONS = ("LPS", "RAS")
ORDERS = ("xyz", "zyx")


@dataclass(frozen=True)
class Point:
    """A click. ``positive``: the label is there; if not, it is not there.

    Attributes
    ----------
    round : int
        0 for what was known at the start, then counting the corrections.
    """

    label: Label
    coordinates: Coordinates
    positive: bool = True
    round: int = 0


@dataclass(frozen=True)
class Scribble:
    """A line through ``coordinates``.

    Attributes
    ----------
    radius : float
        Half of the width of the line, within the slice, in voxels of the image; 0: one voxel wide.
    """

    label: Label
    coordinates: tuple[Coordinates, ...]
    radius: float = 1.0
    positive: bool = True
    round: int = 0


@dataclass(frozen=True)
class Box:
    """A box around an object, between two outermost voxels, both of which belong to it."""

    label: Label
    lower: Coordinates
    upper: Coordinates
    positive: bool = True
    round: int = 0


@dataclass(frozen=True)
class Mask:
    """An image file whose voxels above 0 show the label."""

    label: Label
    file: Path
    positive: bool = True
    round: int = 0


Interaction = Point | Scribble | Box | Mask


@dataclass(frozen=True)
class Prompts:
    """All that was marked in one image.

    Attributes
    ----------
    space : str
        "world": mm; "voxel": index of the image file, 0 = centre of the first voxel.
    convention : str
        Of world coordinates: "LPS" (DICOM, ITK) or "RAS" (NIfTI, nibabel).
    order : str
        "xyz", or "zyx" as an array that SimpleITK returns.
    """

    space: str
    convention: str = "LPS"
    order: str = "xyz"
    interactions: tuple[Interaction, ...] = ()


def parse_label(value: Any, labels: Labels, where: str) -> Label:
    """Return the integer, or the integers of the region, that a name or an integer stands for."""
    known = {name: label for name, label in named_labels(labels).items() if name != IGNORE}
    if isinstance(value, str) and value in known:
        return known[value]
    members = {
        m for label in known.values() for m in (label if isinstance(label, tuple) else (label,))
    }
    if type(value) is int and value in members:
        return value
    names = ", ".join(f"{name} ({label})" for name, label in known.items())
    raise InputError(f"{where}: unknown label {value!r}. The labels are {names}.")


def named_labels(labels: Labels) -> dict[str, Label]:
    """Return what the names of ``dataset.json`` stand for.

    Where some label is a region, all names but background and ignore are, those of a single
    integer, too: its name says less of a pixel than the integer, see `region_classes`.
    """
    members = {name: (v,) if isinstance(v, int) else tuple(v) for name, v in labels.items()}
    regions = any(len(several) > 1 for several in members.values())
    return {
        name: several if regions and several != (0,) and name != IGNORE else several[0]
        for name, several in members.items()
    }


def parse_coordinates(value: Any, where: str) -> Coordinates:
    """Return three finite numbers."""
    if not isinstance(value, list) or len(value) != 3:
        raise InputError(f"{where} must be a list of three numbers, got {value!r}.")
    x, y, z = (parse_number(number, where) for number in value)
    return x, y, z


def parse_number(value: Any, where: str) -> float:
    """Return a finite number."""
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{where}: {str(value)[:50]!r} is not a finite number. Correct it.")
    return number
