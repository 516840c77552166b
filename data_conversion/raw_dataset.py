"""The files of an nnU-Net raw dataset or of an input folder, found by name. Opens no image."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnmosaic.data_conversion.dataset_json import DatasetJson
from nnmosaic.data_conversion.errors import InputError

COLOUR_ENDINGS = (".png", ".bmp", ".tif")
"""2D files that may hold several channels in one."""

RATERS_FOLDER = "labelsTr_raters"
"""Label maps of the raters: RATER/CASE; an absent file is an absent rater."""

FULL_LABELS_FOLDER = "labelsTr_full"
"""Complete label maps, kept aside for scoring: CASE, in the integers of ``full_labels``."""

DATASET_NAME = re.compile(r"Dataset(\d{3})_[^/\\]+")


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes
    ----------
    images : tuple of Path
        One file per channel.
    label : Path or None
        None: not asked for.
    raters : tuple of (str, Path)
        Rater and label file, for those who annotated the case.
    full_label : Path or None
        Complete label map, kept aside for scoring; None: there is none, or it was not asked for.
    """

    identifier: str
    images: tuple[Path, ...]
    label: Path | None
    raters: tuple[tuple[str, Path], ...] = ()
    full_label: Path | None = None


def dataset_name(identifier: int, name: str) -> str:
    """Return nnU-Net's folder name, ``Dataset<three digits>_<name>``.

    Raises
    ------
    InputError
        If the number has more than three digits, or the name could leave its folder.
    """
    if not 1 <= identifier <= 999:
        raise InputError(f"A dataset id must be between 1 and 999, got {identifier}.")
    if not name or name.strip() != name or name.startswith(".") or re.search(r"[/\\\0\n]", name):
        raise InputError(
            f"{name!r} cannot be a dataset name: it must not be empty, begin with a dot or a "
            "space, or hold a slash, a backslash or a line break."
        )
    return f"Dataset{identifier:03d}_{name}"


def find_dataset(roots: Sequence[Path], identifier: str) -> str:
    """Return the full name of a dataset from its number (``501``) or name, as nnU-Net does.

    Parameters
    ----------
    roots : sequence of Path
        Folders to look into (raw, preprocessed, results).

    Raises
    ------
    InputError
        If there is none, or if several datasets have that number.
    """
    if identifier.startswith("Dataset"):
        if not DATASET_NAME.fullmatch(identifier):
            raise InputError(f"{identifier!r} is not a dataset name: expected DatasetXXX_NAME.")
        wanted = re.compile(re.escape(identifier))
    elif identifier.isdecimal() and 1 <= int(identifier) <= 999:
        wanted = re.compile(rf"Dataset{int(identifier):03d}_.+")
    else:
        raise InputError(
            f"{identifier!r} is neither a dataset id (1 to 999) nor a name DatasetXXX_NAME."
        )
    found = {
        entry.name
        for root in roots
        if root.is_dir()
        for entry in root.iterdir()
        if entry.is_dir() and wanted.fullmatch(entry.name)
    }
    where = ", ".join(str(root) for root in roots)
    if not found:
        raise InputError(f"There is no dataset {identifier} in {where}.")
    if len(found) > 1:
        raise InputError(
            f"The id {identifier} belongs to several datasets: {', '.join(sorted(found))} (in "
            f"{where}). Rename or remove all but one."
        )
    return found.pop()


def find_image_cases(
    folder: Path, *, file_ending: str, num_channels: int
) -> tuple[list[Case], dict[str, str]]:
    """Return the cases of an image folder, sorted by name, and what is wrong with the others.

    Files of other types are ignored.

    Returns
    -------
    cases : list of Case
        Without label files.
    faults : dict of str to str
        Case or file name -> what is wrong: not named ``CASE_XXXX``, or a channel is missing.

    Raises
    ------
    InputError
        If the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist or is not a folder.")
    named = re.compile(r"(.+)_(\d{4})" + re.escape(file_ending), re.DOTALL)
    channels: dict[str, dict[int, Path]] = {}
    faults: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if not path.name.endswith(file_ending) or path.name.startswith("."):
            continue
        match = named.fullmatch(path.name)
        if match is None:
            faults[path.name] = (
                f"{path} is not named CASE_XXXX{file_ending} (XXXX = channel, for example "
                f"{path.name[: -len(file_ending)]}_0000{file_ending}). Rename it or move it away."
            )
        else:
            channels.setdefault(match[1], {})[int(match[2])] = path
    if not channels and not faults:
        raise InputError(f"{folder} holds no image that ends with {file_ending}.")
    cases = []
    for case, files in sorted(channels.items()):
        one_colour_file = file_ending.lower() in COLOUR_ENDINGS and list(files) == [0]
        if sorted(files) == list(range(num_channels)) or one_colour_file:
            cases.append(Case(case, tuple(files[i] for i in sorted(files)), None))
        else:
            faults[case] = (
                f"{folder}: case {case!r} has the channels {sorted(files)}, but dataset.json "
                f"declares {num_channels} ({list(range(num_channels))}). Add or remove files."
            )
    return cases, faults


def training_cases(folder: Path, dataset: DatasetJson) -> list[Case]:
    """Return the training cases of a raw dataset, sorted by name, as nnU-Net would find them.

    Raises
    ------
    InputError
        Also if a label file is missing.
    """
    listed = dataset.content.get("dataset")
    if listed is not None:
        cases = [_listed_case(folder, name, entry) for name, entry in sorted(listed.items())]
    else:
        ending = dataset.file_ending
        found, faults = find_image_cases(
            folder / "imagesTr", file_ending=ending, num_channels=len(dataset.channel_names)
        )
        if faults:
            raise InputError(next(iter(faults.values())))
        labels = folder / "labelsTr"
        cases = [replace(case, label=labels / f"{case.identifier}{ending}") for case in found]
    cases = [
        replace(
            case,
            raters=_rater_files(folder, case.identifier, dataset),
            full_label=_full_label(folder, case.identifier, dataset),
        )
        for case in cases
    ]
    for path in (path for case in cases for path in case.images):
        if not path.is_file():
            gone = f" (a link to {path.readlink()})" if path.is_symlink() else ""
            raise InputError(f"{path}{gone} does not exist. Restore it, or merge with --copy.")
    missing = [case.label for case in cases if case.label is not None and not case.label.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]} does not exist ({len(missing)} of {len(cases)} cases have no label "
            "file). Add the label files, or move these images to imagesTs."
        )
    return cases


def _rater_files(
    folder: Path, identifier: str, dataset: DatasetJson
) -> tuple[tuple[str, Path], ...]:
    files = {
        rater: folder / RATERS_FOLDER / rater / f"{identifier}{dataset.file_ending}"
        for rater in dataset.raters
    }
    return tuple((rater, path) for rater, path in files.items() if path.is_file())


def _full_label(folder: Path, identifier: str, dataset: DatasetJson) -> Path | None:
    path = folder / FULL_LABELS_FOLDER / f"{identifier}{dataset.file_ending}"
    return path if path.is_file() else None


def _listed_case(folder: Path, name: str, entry: dict[str, object]) -> Case:
    """Return a case of the "dataset" list of dataset.json, with nnU-Net's rules for its paths."""

    def resolve(path: object) -> Path:
        return Path(os.path.abspath(folder / os.path.expandvars(str(path))))  # noqa: PTH100 - keeps links

    images, label = entry.get("images"), entry.get("label")
    if not isinstance(images, list) or label is None:
        raise InputError(
            f'{folder / "dataset.json"}: case {name!r} needs "images" (a list) and "label".'
        )
    return Case(name, tuple(resolve(image) for image in images), resolve(label))
