"""Making a raw dataset from others: all or nothing, with links to images that are never altered.

Merging combines datasets; `write_relabelled` gives one dataset other label maps and keeps the
complete ones aside for scoring.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nnmosaic.data_conversion.atomic_write import write_json
from nnmosaic.data_conversion.case_check import read_image, read_label, reader_of
from nnmosaic.data_conversion.dataset_json import (
    IGNORE,
    DatasetJson,
    parse_dataset_json,
    read_dataset_json,
    relabelled_content,
)
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import (
    FULL_LABELS_FOLDER,
    Case,
    dataset_name,
    training_cases,
)

Relabel = Callable[[str, np.ndarray, Sequence[float]], np.ndarray]
"""Case name, label map (Z, Y, X) and spacing (mm, per array axis) -> new label map."""


@dataclass(frozen=True)
class Original:
    """A dataset with exclusive classes, annotated alike in all cases."""

    folder: Path
    dataset: DatasetJson
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Relabelled:
    """What `write_relabelled` wrote.

    Attributes
    ----------
    annotated : float
        Share of the voxels, of all cases together, that are not "ignore".
    """

    dataset: DatasetJson
    cases: int
    annotated: float


def new_dataset_folder(raw: Path, identifier: int, name: str) -> Path:
    """Return the folder of a dataset that is to be made.

    Raises
    ------
    InputError
        If the id is taken, or id or name are not nnU-Net's.
    """
    target = raw / dataset_name(identifier, name)
    taken = [path.name for path in raw.glob(f"Dataset{identifier:03d}_*")]
    if taken:
        raise InputError(f"The id {identifier} is taken by {taken[0]} in {raw}. Choose another.")
    return target


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Yield a folder with imagesTr and labelsTr to fill; on success it becomes ``target``.

    On an exception nothing is left.

    Raises
    ------
    InputError
        If ``target`` exists.
    """
    if target.exists():
        raise InputError(f"{target} exists already. Remove it, or choose another id or name.")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for folder in ("imagesTr", "labelsTr"):
            (temporary / folder).mkdir(parents=True)
        yield temporary
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_images(case: Case, folder: Path, name: str, ending: str, *, copy: bool) -> None:
    """Link to the images of a case, or copy them, as ``folder / NAME_XXXX``."""
    for channel, path in enumerate(case.images):
        link_file(path, folder / f"{name}_{channel:04d}{ending}", copy=copy)


def link_file(path: Path, link: Path, *, copy: bool) -> None:
    """Link to a file, or copy it. A link to a link leads to the file itself.

    Raises
    ------
    InputError
        If there can be no link.
    """
    if copy:
        shutil.copyfile(path, link)
        return
    try:
        link.symlink_to(path.resolve())
    except OSError as error:  # Windows without the privilege, or a file system without links
        raise InputError(
            f"{link.parent} cannot hold a link to {path} ({error.strerror}). Use --copy."
        ) from None


def read_original(folder: Path) -> Original:
    """Read a dataset that is to get other label maps.

    Raises
    ------
    InputError
        If it is no usable dataset, or its label maps do not all mean the same.
    """
    dataset = read_dataset_json(folder)
    for key, found in (
        ("overlapping regions in labels", dataset.has_regions),
        ("partial_labels", dataset.partial_labels is not None),
        ("multirater", bool(dataset.raters)),
    ):
        if found:
            raise InputError(
                f"{folder / 'dataset.json'}: a dataset with {key} cannot be converted. Give one "
                "with exclusive classes and one label map per case, all of which are annotated "
                "alike."
            )
    return Original(folder, dataset, tuple(training_cases(folder, dataset)))


def write_relabelled(
    original: Original,
    cases: Sequence[Case],
    target: Path,
    relabel: Relabel,
    *,
    labels: Mapping[str, int],
    copy_files: bool,
) -> Relabelled:
    """Write a raw dataset with other label maps, and the complete ones in ``labelsTr_full``.

    Complete are those that the original keeps in its ``labelsTr_full``, else its label maps.

    Parameters
    ----------
    cases : sequence of Case
        The cases of ``original`` that are wanted.
    target : Path
        Must not exist. It appears in one step, when it is complete.
    labels : mapping of str to int
        What the new label maps may hold, with "background" and perhaps "ignore".
    copy_files : bool
        Copy images and complete label maps instead of linking to them.

    Raises
    ------
    InputError
        If a file of the original is broken, or ``labels`` cannot be meant; nothing is written then.
    """
    content = relabelled_content(original.dataset, labels, [case.identifier for case in cases])
    dataset = parse_dataset_json(content, where=str(target / "dataset.json"))
    write = partial(
        _write_case, original.dataset, relabel, ignore=labels.get(IGNORE), copy_files=copy_files
    )
    with building(target) as folder:
        (folder / FULL_LABELS_FOLDER).mkdir()
        with ThreadPoolExecutor() as pool:
            counts = list(pool.map(lambda case: write(case, folder), cases))
        write_json(content, folder / "dataset.json")
    annotated, voxels = np.sum(counts, axis=0)
    return Relabelled(dataset, len(cases), float(annotated / voxels))


def _write_case(
    dataset: DatasetJson,
    relabel: Relabel,
    case: Case,
    folder: Path,
    *,
    ignore: int | None,
    copy_files: bool,
) -> tuple[int, int]:
    """Return how many voxels are not ignored, and how many there are."""
    reader = reader_of(dataset)
    image, properties = read_image(case, reader, num_channels=len(dataset.channel_names))
    legal = dataset.legal_values(case.identifier)
    label = read_label(case, reader, image=image, properties=properties, legal=legal)
    new = relabel(case.identifier, label[0].astype(np.int64), properties["spacing"])
    link_images(case, folder / "imagesTr", case.identifier, dataset.file_ending, copy=copy_files)
    name = f"{case.identifier}{dataset.file_ending}"
    complete = case.full_label or case.label
    if complete is not None:
        link_file(complete, folder / FULL_LABELS_FOLDER / name, copy=copy_files)
    reader.write_seg(new, str(folder / "labelsTr" / name), properties)
    return new.size - (0 if ignore is None else int((new == ignore).sum())), new.size
