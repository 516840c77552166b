"""What a person marked in an image: the JSON of ``predict --prompts`` and 3D Slicer's point lists.

The format (methods/clustering_propagation.md, 5.4)::

    {"version": 1, "space": "world", "convention": "RAS", "interactions": [
      {"type": "point", "label": "liver", "coord": [12.5, -80, 33], "positive": true, "round": 0},
      {"type": "scribble", "label": 2, "coords": [[14, -80, 33], [20, -75, 33]], "radius": 1},
      {"type": "box", "label": "spleen", "min": [60, -20, 30], "max": [90, 10, 30]},
      {"type": "mask", "label": "spleen", "file": "slice37.nii.gz"}]}

or ``"space": "voxel"`` with ``"order"``, in the index of the image file, from 0. Coordinates are
kept as written; ``nnmosaic.trainers.clustering_propagation.coordinates`` moves them. Reads no
image, and nothing that could run code: the ``.npz`` files of the CVPR 2025 challenge are refused.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.interactions import (
    CONVENTIONS,
    ORDERS,
    SPACES,
    Box,
    Interaction,
    Label,
    Labels,
    Mask,
    Point,
    Prompts,
    Scribble,
    named_labels,
    parse_coordinates,
    parse_label,
    parse_number,
)
from nnmosaic.data_conversion.slicer_markups import SLICER_ENDING, parse_markups

__all__ = [
    "Box",
    "Interaction",
    "Label",
    "Mask",
    "Point",
    "Prompts",
    "Scribble",
    "find_prompts",
    "parse_prompts",
    "prompts_content",
    "read_prompts",
    "write_prompts",
]

VERSION = 1
MAX_BYTES = 16 * 2**20
"""Of a prompts file: some 300,000 positions. A person makes a few kB; more is another file."""
MAX_POSITIONS = 10_000
"""Of one scribble."""


def read_prompts(path: Path, labels: Labels) -> Prompts:
    """Read a prompts file, or a point list that 3D Slicer saved (``.mrk.json``).

    Parameters
    ----------
    labels : mapping of str to int or sequence of int
        The labels of ``dataset.json``.

    Raises
    ------
    InputError
        If the file cannot be what was meant; names the entry and what to do.
    """
    refuse_challenge_file(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path} cannot be opened ({error.strerror}).") from None
    if size > MAX_BYTES:
        raise InputError(
            f"{path} has {size:,} bytes; a prompts file may have {MAX_BYTES:,}. Give large areas "
            'as "mask", with an image file beside it.'
        )
    content = read_json(path)
    if path.name.endswith(SLICER_ENDING):
        return parse_markups(content, labels, where=str(path))
    return parse_prompts(content, labels, where=str(path), folder=path.parent)


def refuse_challenge_file(path: Path) -> None:
    """Raise an error for a file of the CVPR 2025 challenge.

    Its ``boxes`` and ``clicks`` are dictionaries: NumPy stores these as pickles, which can run any
    code when they are read.
    """
    if path.suffix == ".npz":
        raise InputError(
            f"{path} is not read: the boxes and clicks of the challenge's .npz files are Python "
            "pickles, which can run any code. Load the file yourself if you trust its origin, and "
            f'write the clicks (array index z, y, x) as JSON with "space": "voxel", "order": "zyx" '
            f"to {path.with_suffix('.json').name}."
        )


def find_prompts(folder: Path, case: str) -> Path | None:
    """Return the prompts file of a case in ``folder``; None: nothing was marked.

    Raises
    ------
    InputError
        If there are several, or there is only one that is not read.
    """
    endings = (".json", SLICER_ENDING, ".npz")
    found = [path for ending in endings if (path := folder / f"{case}{ending}").is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{folder}: several files hold prompts of {case}: {names}. Keep one.")
    for path in found:
        refuse_challenge_file(path)
    return found[0] if found else None


def parse_prompts(content: Any, labels: Labels, *, where: str, folder: Path) -> Prompts:
    """Validate the content of a prompts file.

    Parameters
    ----------
    where : str
        What error messages call the file.
    folder : Path
        What the names of mask files are relative to; they must not leave it.

    Raises
    ------
    InputError
        As `read_prompts`.
    """
    if not isinstance(content, dict):
        raise InputError(f"{where} must hold a JSON object, got {type(content).__name__}.")
    _check_keys(content, ("version", "space", "convention", "order", "interactions"), where)
    if content.get("version") != VERSION or isinstance(content["version"], bool):
        raise InputError(f'{where}: "version" must be {VERSION}, got {content.get("version")!r}.')
    space = _choice(content, "space", SPACES, where)
    # What decides where a click lands is asked for; what the space does not use may be left out.
    asked = {"world": "convention", "voxel": "order"}[space]
    convention = _choice({"convention": "LPS", **content}, "convention", CONVENTIONS, where)
    order = _choice({"order": "xyz", **content}, "order", ORDERS, where)
    if asked not in content:
        raise InputError(f'{where}: {space} coordinates need "{asked}". Add it.')
    entries = content.get("interactions")
    if not isinstance(entries, list):
        raise InputError(f'{where}: "interactions" must be a list, got {entries!r}.')
    interactions = tuple(
        _interaction(entry, labels, where=f"{where}: interactions[{i}]", folder=folder)
        for i, entry in enumerate(entries)
    )
    return Prompts(space, convention, order, interactions)


def write_prompts(prompts: Prompts, path: Path, labels: Labels) -> None:
    """Write a prompts file, with the labels by name, in one step.

    Raises
    ------
    InputError
        If a mask lies outside of the folder of ``path``, or a label has no name.
    """
    write_json(prompts_content(prompts, labels, path.parent), path)


def prompts_content(prompts: Prompts, labels: Labels, folder: Path) -> dict[str, Any]:
    """Return what a prompts file in ``folder`` holds.

    Raises
    ------
    InputError
        As `write_prompts`.
    """
    return {
        "version": VERSION,
        "space": prompts.space,
        "convention": prompts.convention,
        "order": prompts.order,
        "interactions": [
            _entry(interaction, labels, folder) for interaction in prompts.interactions
        ],
    }


def _interaction(entry: Any, labels: Labels, *, where: str, folder: Path) -> Interaction:
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be an object, got {entry!r}.")
    kind = _choice(entry, "type", tuple(_KINDS), where)
    own_keys, parse = _KINDS[kind]
    where = f"{where} ({kind})"
    _check_keys(entry, ("type", "label", "positive", "round", *own_keys), where)
    if "label" not in entry:
        raise InputError(f'{where} has no "label". Add the name or the integer of a label.')
    positive, number = entry.get("positive", True), entry.get("round", 0)
    if not isinstance(positive, bool):
        raise InputError(f'{where}: "positive" must be true or false, got {positive!r}.')
    if type(number) is not int or number < 0:
        raise InputError(f'{where}: "round" must be 0, 1, 2, ..., got {number!r}.')
    return parse(entry, parse_label(entry["label"], labels, where), positive, number, where, folder)


def _point(
    entry: dict[str, Any], label: Label, positive: bool, number: int, where: str, folder: Path
) -> Point:
    return Point(label, parse_coordinates(entry.get("coord"), f"{where}: coord"), positive, number)


def _scribble(
    entry: dict[str, Any], label: Label, positive: bool, number: int, where: str, folder: Path
) -> Scribble:
    coords = entry.get("coords")
    if not isinstance(coords, list) or not coords:
        raise InputError(f'{where}: "coords" must be a list of positions, got {coords!r}.')
    places = tuple(parse_coordinates(c, f"{where}: coords[{i}]") for i, c in enumerate(coords))
    if len(places) > MAX_POSITIONS:
        raise InputError(
            f"{where} has {len(places):,} positions; a scribble may have {MAX_POSITIONS:,}. Leave "
            'out positions on straight parts, or give a "mask".'
        )
    radius = parse_number(entry.get("radius", 1), f"{where}: radius")
    if not 0 <= radius <= 100:
        raise InputError(f"{where}: radius must lie between 0 and 100 voxels, got {radius:g}.")
    return Scribble(label, places, radius, positive, number)


def _box(
    entry: dict[str, Any], label: Label, positive: bool, number: int, where: str, folder: Path
) -> Box:
    lower, upper = (parse_coordinates(entry.get(key), f"{where}: {key}") for key in ("min", "max"))
    if any(low > high for low, high in zip(lower, upper, strict=True)):
        raise InputError(
            f"{where}: min {list(lower)} is not below max {list(upper)} in every coordinate. "
            "Swap the numbers that are in the wrong order."
        )
    return Box(label, lower, upper, positive, number)


def _mask(
    entry: dict[str, Any], label: Label, positive: bool, number: int, where: str, folder: Path
) -> Mask:
    name = entry.get("file")
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f'{where}: "file" must be the name of an image file, got {name!r}.')
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise InputError(f"{where}: {name} leaves the folder {folder}. Put the mask into it.")
    if not file.is_file():
        raise InputError(f"{where}: the mask {file} does not exist. Add it or remove the entry.")
    return Mask(label, file, positive, number)


_KINDS: dict[str, tuple[tuple[str, ...], Callable[..., Interaction]]] = {
    "point": (("coord",), _point),
    "scribble": (("coords", "radius"), _scribble),
    "box": (("min", "max"), _box),
    "mask": (("file",), _mask),
}


def _entry(interaction: Interaction, labels: Labels, folder: Path) -> dict[str, Any]:
    names = {label: name for name, label in named_labels(labels).items()}
    label = interaction.label
    if label not in names and isinstance(label, tuple):
        raise InputError(f"No region of the dataset has the labels {list(label)}.")
    common = {
        "label": names.get(label, label),
        "positive": interaction.positive,
        "round": interaction.round,
    }
    if isinstance(interaction, Point):
        return {"type": "point", **common, "coord": list(interaction.coordinates)}
    if isinstance(interaction, Scribble):
        coords = [list(place) for place in interaction.coordinates]
        return {"type": "scribble", **common, "coords": coords, "radius": interaction.radius}
    if isinstance(interaction, Box):
        corners = {"min": list(interaction.lower), "max": list(interaction.upper)}
        return {"type": "box", **common, **corners}
    file = interaction.file.resolve()
    if not file.is_relative_to(folder.resolve()):
        raise InputError(f"The mask {file} must lie in the folder of the prompts, {folder}.")
    return {"type": "mask", **common, "file": file.relative_to(folder.resolve()).as_posix()}


def _check_keys(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}. Known: {', '.join(known)}.")


def _choice(content: Mapping[str, Any], key: str, options: Sequence[str], where: str) -> str:
    value = content.get(key)
    if value not in options:  # a tuple of strings: whatever JSON holds can be looked for
        raise InputError(f'{where}: "{key}" must be {" or ".join(options)}, got {value!r}.')
    return str(value)
