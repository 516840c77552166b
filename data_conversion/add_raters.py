"""One dataset with several annotations per case (multi_rater_personalization.md, 7.1).

``labelsTr`` holds a fused reference, which nnU-Net reads; ``labelsTr_raters/RATER`` the label maps
of each rater. A rater without a file for a case has not annotated it.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nnmosaic.data_conversion.atomic_write import write_json
from nnmosaic.data_conversion.case_check import read_image, read_label, reader_of
from nnmosaic.data_conversion.dataset_json import (
    BACKGROUND,
    DatasetJson,
    multirater_content,
    parse_dataset_json,
)
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.label_fusion import Staple, Tie, majority, staple
from nnmosaic.data_conversion.new_dataset import building, link_file, link_images
from nnmosaic.data_conversion.raw_dataset import RATERS_FOLDER, Case, find_image_cases

STAPLE_FILE = "staple.json"
"""Case -> class -> rater -> sensitivity and specificity, of the classes that somebody drew."""


@dataclass(frozen=True)
class RaterDataset:
    """What the new dataset says.

    Attributes
    ----------
    channels : sequence of str
        Names of the image channels.
    classes : sequence of str
        Names of the labels 1, 2, ...
    fusion : {"majority", "staple"}
        How the reference in ``labelsTr`` is made. The soft mean of the masks has no word of its
        own: where it is highest is the majority.
    tie : {"background", "foreground", "first_rater"}
        See `majority`.
    identity : {"persistent", "exchangeable"}
        Whether a rater is the same person in all cases, or the names are slots.
    order : {"as_is", "area"}
        "area": the slots are not the raters but rank1, rank2, ..., and hold each case's label maps
        in the order of their foreground, smallest first (7.2).
    """

    channels: Sequence[str]
    classes: Sequence[str]
    file_ending: str = ".nii.gz"
    fusion: Literal["majority", "staple"] = "majority"
    tie: Tie = "background"
    identity: Literal["persistent", "exchangeable"] = "persistent"
    order: Literal["as_is", "area"] = "as_is"


def add_raters(
    images: Path,
    raters: Mapping[str, Path],
    target: Path,
    what: RaterDataset,
    *,
    subjects: Path | None = None,
    copy_files: bool = False,
) -> dict[str, int]:
    """Write a raw dataset with the label maps of several raters, and return rater -> cases.

    Parameters
    ----------
    images : Path
        Folder with ``CASE_XXXX`` files.
    raters : mapping of str to Path
        Rater -> folder with ``CASE`` files.
    target : Path
        Must not exist. It appears in one step, when it is complete.
    subjects : Path, optional
        CSV file with the columns case and subject; without it, each case is a subject.
    copy_files : bool
        Copy images and label maps instead of linking to them.

    Raises
    ------
    InputError
        If a file is broken or does not fit its image, nobody annotated a case, a rater annotated
        none, or a label map has no image; if the names of raters cannot be told apart on every
        system, see `refuse_unclear_raters`; with the order "area" if raters are called persistent,
        the first one decides ties, or one has not annotated a case. Nothing is written then.
    """
    refuse_unclear_raters(raters)
    ending = what.file_ending
    by_area = what.order == "area"
    if by_area and what.identity == "persistent":
        raise InputError(
            "Sorted by area, a label map belongs to a rank and to no person. Leave --identity "
            "persistent out, or --order area."
        )
    if by_area and what.tie == "first_rater":
        raise InputError(
            "With --order area no rater comes first: choose --tie background or foreground."
        )
    cases, faults = find_image_cases(images, file_ending=ending, num_channels=len(what.channels))
    if faults:
        raise InputError(next(iter(faults.values())))
    cases = [replace(case, raters=_rater_files(case, raters, ending)) for case in cases]
    _check_files(cases, raters, images, ending, everyone=by_area)
    slots = [f"rank{i + 1}" for i in range(len(raters))] if by_area else list(raters)
    content: dict[str, Any] = {
        "channel_names": {str(i): name for i, name in enumerate(what.channels)},
        "labels": {BACKGROUND: 0, **{name: i + 1 for i, name in enumerate(what.classes)}},
        "numTraining": len(cases),
        "file_ending": ending,
        "multirater": multirater_content(slots, what.identity),
    }
    if subjects is not None:
        content["subjects"] = _read_subjects(subjects, cases)
    dataset = parse_dataset_json(content, where=str(target / "dataset.json"))
    write = partial(_write_case, what=what, dataset=dataset, copy_files=copy_files)
    with building(target) as folder:
        for slot in slots:
            (folder / RATERS_FOLDER / slot).mkdir(parents=True)
        with ThreadPoolExecutor() as pool:
            qualities = list(pool.map(lambda case: write(case, folder), cases))
        if what.fusion == "staple":
            names = [case.identifier for case in cases]
            write_json(dict(zip(names, qualities, strict=True)), folder / STAPLE_FILE)
        write_json(content, folder / "dataset.json")
    return {slot: len(list((target / RATERS_FOLDER / slot).glob(f"*{ending}"))) for slot in slots}


def parse_raters(texts: Sequence[str]) -> dict[str, Path]:
    """Return rater -> folder from ``RATER=FOLDER``.

    Raises
    ------
    InputError
        If a text is none, a rater comes twice, or a folder is missing.
    """
    raters: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise InputError(f"--raters {text}: expected RATER=FOLDER, for example A1=masks/anna.")
        refuse_unclear_raters([*raters, name])
        if name in raters:
            raise InputError(f"--raters names {name} twice. Give each rater one folder.")
        if not Path(folder).is_dir():
            raise InputError(f"--raters {name}: {folder} does not exist or is not a folder.")
        raters[name] = Path(folder)
    return raters


def refuse_unclear_raters(names: Iterable[str]) -> None:
    """Refuse names of raters that files or commands could take for others.

    Raises
    ------
    InputError
        If a rater is called all, which means everyone in ``predict``, or two differ only in upper
        and lower case: on macOS and Windows their files would be the same.
    """
    known: dict[str, str] = {}
    for name in names:
        if name == "all":
            raise InputError("A rater called all: predict --raters all means everyone. Rename it.")
        other = known.setdefault(name.casefold(), name)
        if other != name:
            raise InputError(
                f"The raters {other} and {name} differ only in upper and lower case, which are the "
                "same folder on macOS and Windows. Rename one."
            )


def _rater_files(
    case: Case, raters: Mapping[str, Path], ending: str
) -> tuple[tuple[str, Path], ...]:
    files = ((name, folder / f"{case.identifier}{ending}") for name, folder in raters.items())
    return tuple((name, path) for name, path in files if path.is_file())


def _check_files(
    cases: Sequence[Case], raters: Mapping[str, Path], images: Path, ending: str, *, everyone: bool
) -> None:
    for case in cases:
        if not case.raters:
            raise InputError(
                f"Case {case.identifier!r} in {images} was annotated by none of "
                f"{', '.join(raters)}: no folder holds {case.identifier}{ending}. Add a label map, "
                "or move the image away."
            )
    known = {path for case in cases for _, path in case.raters}
    for folder in raters.values():
        for path in sorted(folder.glob(f"*{ending}")):
            if path not in known:
                raise InputError(
                    f"{path} belongs to no image in {images}. Rename it to CASE{ending}, or move "
                    "it away."
                )
    heard = {name for case in cases for name, _ in case.raters}
    for name, folder in raters.items():
        if name not in heard:
            raise InputError(
                f"Rater {name} annotated no case: {folder} holds no label map CASE{ending}. Add "
                f"one, or leave --raters {name}={folder} out."
            )
    for case in cases if everyone else ():
        absent = [name for name in raters if name not in dict(case.raters)]
        if absent:
            raise InputError(
                f"Case {case.identifier!r} in {images} was not annotated by {', '.join(absent)}: "
                "with --order area each rank needs a label map. Add it, or move the image away."
            )


def _read_subjects(path: Path, cases: Sequence[Case]) -> dict[str, str]:
    if not path.is_file():
        raise InputError(f"{path} does not exist.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"case", "subject"} <= set(rows[0]):
        raise InputError(f'{path} needs a first line with the columns "case" and "subject".')
    subjects = {row["case"]: row["subject"] for row in rows}
    missing = [case.identifier for case in cases if not subjects.get(case.identifier)]
    if missing:
        raise InputError(f"{path} names no subject for case {missing[0]!r}. Add a line.")
    return {case.identifier: subjects[case.identifier] for case in cases}


def _write_case(
    case: Case, folder: Path, *, what: RaterDataset, dataset: DatasetJson, copy_files: bool
) -> dict[str, Any]:
    """Write a case, and return how good STAPLE finds its raters: class -> rater -> rates."""
    reader = reader_of(dataset)
    image, properties = read_image(case, reader, num_channels=len(what.channels))
    legal = dataset.legal_values(case.identifier)
    name = f"{case.identifier}{what.file_ending}"
    drawn = []
    for _, path in case.raters:
        one = replace(case, label=path)
        label = read_label(one, reader, image=image, properties=properties, legal=legal)
        drawn.append(label[0].astype(np.int64))
    paths = dict(case.raters)
    if what.order == "area":
        ranks = np.argsort([np.count_nonzero(label) for label in drawn], kind="stable")
        drawn = [drawn[i] for i in ranks]
        paths = {slot: case.raters[i][1] for slot, i in zip(dataset.raters, ranks, strict=True)}
    for slot, path in paths.items():
        link_file(path, folder / RATERS_FOLDER / slot / name, copy=copy_files)
    link_images(case, folder / "imagesTr", case.identifier, what.file_ending, copy=copy_files)
    labels, classes = np.stack(drawn), len(dataset.labels)
    qualities: dict[str, Any] = {}
    if what.fusion == "staple":
        found = staple(labels, classes)
        fused, qualities = found.fused, _qualities(found, what.classes, paths)
    else:
        fused = majority(labels, classes, tie=what.tie)
    reader.write_seg(fused.astype(np.uint8), str(folder / "labelsTr" / name), properties)
    return qualities


def _qualities(found: Staple, classes: Sequence[str], raters: Iterable[str]) -> dict[str, Any]:
    return {
        name: {
            rater: {"sensitivity": float(sensitivity), "specificity": float(specificity)}
            for rater, sensitivity, specificity in zip(raters, *rates, strict=True)
        }
        for name, *rates in zip(classes, found.sensitivity, found.specificity, strict=True)
        if not np.isnan(rates).any()
    }
