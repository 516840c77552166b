"""Merging raw datasets with different label sets into one, matched by label name.

The merged dataset declares in ``partial_labels`` what each source annotates, so that a class
which a source did not annotate is never taken for background. Images are linked or copied, never
altered. Complete label maps that a source keeps aside for scoring are kept aside.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnmosaic.data_conversion.atomic_write import write_json
from nnmosaic.data_conversion.case_check import read_image, read_label, reader_of
from nnmosaic.data_conversion.dataset_json import (
    BACKGROUND,
    IGNORE,
    DatasetJson,
    SourceLabels,
    parse_dataset_json,
    partial_labels_content,
    read_dataset_json,
)
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.new_dataset import building, link_images
from nnmosaic.data_conversion.raw_dataset import FULL_LABELS_FOLDER, Case, training_cases

logger = logging.getLogger(__name__)

MATRIX_FILE = "class_source_matrix.json"


@dataclass(frozen=True)
class Source:
    """One raw dataset that goes into the merge.

    Attributes
    ----------
    renames : mapping of str to tuple of str
        Label of this source, or of its full references -> the target classes it means; several
        make it a merged label.
    """

    folder: Path
    name: str
    dataset: DatasetJson
    cases: tuple[Case, ...]
    renames: Mapping[str, tuple[str, ...]]

    def meaning(self, label: str) -> tuple[str, ...]:
        """Return the target classes that a label of this source stands for."""
        return self.renames.get(label, (label,))

    def full_meaning(self, label: str) -> str | None:
        """Return the target class of a label of the full references, None if it means several."""
        meaning = self.meaning(label)
        return meaning[0] if len(meaning) == 1 else None

    def labels(self) -> SourceLabels:
        """Return what this source annotates, in target classes."""
        meanings = [self.meaning(label) for label in self.dataset.foreground]
        return SourceLabels(
            self.name,
            annotated=tuple(classes[0] for classes in meanings if len(classes) == 1),
            merged={classes[0]: classes for classes in meanings if len(classes) > 1},
        )

    def target_name(self, case: Case) -> str:
        """Return the name of a case in the merged dataset."""
        return f"{self.name}_{case.identifier}"


def parse_renames(arguments: Sequence[str]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Parse ``SOURCE:LABEL=CLASS[+CLASS...]`` into source -> label -> classes.

    Raises
    ------
    InputError
        If an argument does not have that form.
    """
    renames: dict[str, dict[str, tuple[str, ...]]] = {}
    for argument in arguments:
        source, colon, rest = argument.partition(":")
        label, equals, classes = rest.partition("=")
        members = tuple(name.strip() for name in classes.split("+"))
        if not (colon and equals and label.strip() and all(members)):
            raise InputError(
                f"--rename {argument!r} is not of the form SOURCE:LABEL=CLASS or "
                "SOURCE:LABEL=CLASS+CLASS, for example 12:kidney=kidney_left+kidney_right."
            )
        renames.setdefault(source.strip(), {})[label.strip()] = members
    return renames


def read_sources(
    folders: Mapping[str, Path], renames: Mapping[str, Mapping[str, tuple[str, ...]]]
) -> list[Source]:
    """Read the datasets to be merged.

    Parameters
    ----------
    folders : mapping of str to Path
        As the user named each source (id or name) -> its raw dataset folder.
    renames : mapping
        As returned by `parse_renames`, with the same names.

    Raises
    ------
    InputError
        If a source is no usable dataset, a rename names something unknown, or the sources
        disagree on channels, file type or reader.
    """
    unknown = sorted(set(renames) - set(folders))
    if unknown:
        raise InputError(
            f"--rename names the source {unknown[0]!r}; --sources are {', '.join(folders)}."
        )
    short = [folder.name.split("_", 1)[-1] for folder in folders.values()]
    names = [
        s if short.count(s) == 1 else f.name for s, f in zip(short, folders.values(), strict=True)
    ]
    sources = [
        _read_source(folder, name, renames.get(given, {}))
        for name, (given, folder) in zip(names, folders.items(), strict=True)
    ]
    for source in sources[1:]:
        _check_agreement(sources[0], source)
    return sources


def merge_sources(sources: Sequence[Source], target: Path, *, copy_images: bool) -> dict[str, Any]:
    """Write the merged raw dataset and return its class x source matrix.

    Parameters
    ----------
    target : Path
        Folder of the new dataset; must not exist. It appears in one step, when it is complete.
    copy_images : bool
        Copy the images instead of linking to them.

    Returns
    -------
    dict
        class -> source -> {"annotated", "cases", "present", "voxels"}, also stored in the dataset.

    Raises
    ------
    InputError
        If a file of a source is broken or a class cannot be learnt; nothing is written then.
    """
    content = _merged_content(sources)
    merged = parse_dataset_json(content, where=f"The merge of {', '.join(s.name for s in sources)}")
    with building(target) as folder:
        matrix = _write_cases(sources, merged, folder, copy_images=copy_images)
        write_json(matrix, folder / MATRIX_FILE)
        write_json(content, folder / "dataset.json")
    return matrix


def matrix_warnings(matrix: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Return what a user should know before training on this class x source matrix (spec 6.5)."""
    warnings = [
        f"Class {name!r} occurs in no case of a source that annotates it, so it can never be told "
        "from background. Add cases that show it, or remove the class."
        for name, row in matrix.items()
        if not any(cell["annotated"] != "no" and cell["present"] for cell in row.values())
    ]
    sources = next(iter(matrix.values()))
    warnings += [
        f"Source {source!r} annotates nothing, so its labels teach nothing. Declare what it "
        "annotates, or leave it out."
        for source in sources
        if all(row[source]["annotated"] == "no" for row in matrix.values())
    ]
    if all(any(row[source]["annotated"] != "yes" for row in matrix.values()) for source in sources):
        warnings.append(
            "No source annotates every class, so pure background is never labelled: false "
            "positives of a class are only corrected in the sources that annotate it."
        )
    return warnings


def _read_source(folder: Path, name: str, renames: Mapping[str, tuple[str, ...]]) -> Source:
    dataset = read_dataset_json(folder)
    where = folder / "dataset.json"
    if dataset.has_regions:
        raise InputError(
            f"{where}: sources with overlapping regions cannot be merged. Use classes."
        )
    if dataset.partial_labels is not None:
        raise InputError(
            f"{where}: this is a merged dataset already. Give its own sources instead."
        )
    known = [n for n in {**dataset.labels, **dataset.full_labels} if n != BACKGROUND]
    unknown = sorted(set(renames) - set(known))
    if unknown:
        raise InputError(
            f"--rename: {folder.name} has no label {unknown[0]!r}. It has {', '.join(known)}."
        )
    source = Source(folder, name, dataset, tuple(training_cases(folder, dataset)), dict(renames))
    classes = [c for label in dataset.foreground for c in source.meaning(label)]
    full = [c for c in map(source.full_meaning, dataset.full_labels) if c not in (None, BACKGROUND)]
    reserved = sorted(
        c
        for names in (classes, full)
        for c in names
        if c in (BACKGROUND, IGNORE) or names.count(c) > 1
    )
    if reserved:
        raise InputError(
            f"{folder.name}: after renaming, two labels mean {reserved[0]!r}. Name them apart."
        )
    return source


def _check_agreement(first: Source, other: Source) -> None:
    for what, key in (
        ("channel_names", lambda s: dict(s.dataset.channel_names)),
        ("file_ending", lambda s: s.dataset.file_ending),
        (
            "overwrite_image_reader_writer",
            lambda s: s.dataset.content.get("overwrite_image_reader_writer"),
        ),
    ):
        if key(first) != key(other):
            raise InputError(
                f"{other.folder.name} and {first.folder.name} differ in {what}: {key(other)} "
                f"against {key(first)}. Convert or rename so that they agree."
            )


def _merged_content(sources: Sequence[Source]) -> dict[str, Any]:
    classes = dict.fromkeys(
        name for s in sources for label in s.dataset.foreground for name in s.meaning(label)
    )
    labels = {BACKGROUND: 0, **{name: i + 1 for i, name in enumerate(classes)}}
    if any(s.dataset.ignore_label is not None for s in sources):
        labels[IGNORE] = len(labels)
    cases = {s.name: [s.target_name(case) for case in s.cases] for s in sources}
    content: dict[str, Any] = {
        "channel_names": dict(sources[0].dataset.channel_names),
        "labels": labels,
        "numTraining": sum(len(s.cases) for s in sources),
        "file_ending": sources[0].dataset.file_ending,
        "partial_labels": partial_labels_content(cases, [s.labels() for s in sources]),
    }
    reader = sources[0].dataset.content.get("overwrite_image_reader_writer")
    if reader is not None:
        content["overwrite_image_reader_writer"] = reader
    # A subject keeps its name: two sources that show one person must stay in one fold.
    subjects = {
        s.target_name(c): s.dataset.subject_of(c.identifier) for s in sources for c in s.cases
    }
    content["subjects"] = subjects
    return content


def _write_cases(
    sources: Sequence[Source], merged: DatasetJson, folder: Path, *, copy_images: bool
) -> dict[str, Any]:
    matrix: dict[str, Any] = {name: {} for name in merged.foreground}
    for source in sources:
        stored = source.labels().representatives(merged.labels)
        for name in merged.foreground:
            value = stored[merged.labels[name]]
            kind = "no" if value == 0 else "yes" if stored.count(value) == 1 else "merged"
            matrix[name][source.name] = {
                "annotated": kind, "cases": len(source.cases), "present": 0, "voxels": 0
            }  # fmt: skip
        write = partial(_write_case, source, merged=merged, folder=folder, copy_images=copy_images)
        with ThreadPoolExecutor() as pool:
            for counts in pool.map(write, source.cases):
                for name in merged.foreground:
                    voxels = counts.get(stored[merged.labels[name]], 0)
                    matrix[name][source.name]["present"] += voxels > 0
                    matrix[name][source.name]["voxels"] += voxels
        logger.info("%s: %d cases", source.name, len(source.cases))
    return matrix


def _write_case(
    source: Source, case: Case, *, merged: DatasetJson, folder: Path, copy_images: bool
) -> dict[int, int]:
    """Link a case's images, write its label maps in target integers, and count its voxels."""
    dataset, target = source.dataset, source.target_name(case)
    reader = reader_of(dataset)
    image, properties = read_image(case, reader, num_channels=len(dataset.channel_names))
    read = partial(read_label, reader=reader, image=image, properties=properties)
    link_images(case, folder / "imagesTr", target, merged.file_ending, copy=copy_images)
    label = read(case, legal=dataset.legal_values(case.identifier))
    mapped = _integers(source, merged)[label.astype(np.int64)]
    name = f"{target}{merged.file_ending}"
    reader.write_seg(mapped[0], str(folder / "labelsTr" / name), properties)
    if case.full_label is not None:
        full_integers = _full_integers(source, merged)
        full = read(replace(case, label=case.full_label), legal=range(len(full_integers)))
        (folder / FULL_LABELS_FOLDER).mkdir(exist_ok=True)
        output = folder / FULL_LABELS_FOLDER / name
        reader.write_seg(full_integers[full[0].astype(np.int64)], str(output), properties)
    values, counts = np.unique(mapped, return_counts=True)
    return {int(v): int(n) for v, n in zip(values, counts, strict=True) if v > 0}


def _integers(source: Source, merged: DatasetJson) -> np.ndarray:
    """Return the table source integer -> merged integer."""
    table = np.zeros(len(source.dataset.labels) + 1, dtype=np.int64)
    for name in source.dataset.foreground:
        table[source.dataset.labels[name]] = merged.labels[source.meaning(name)[0]]
    if source.dataset.ignore_label is not None and merged.ignore_label is not None:
        table[source.dataset.ignore_label] = merged.ignore_label
    return table


def _full_integers(source: Source, merged: DatasetJson) -> np.ndarray:
    """Return the table full label -> merged integer; classes that the merge lacks become 0."""
    full_labels = source.dataset.full_labels
    table = np.zeros(len(full_labels) + (merged.ignore_label is not None), dtype=np.int64)
    for name, value in full_labels.items():
        table[value] = merged.labels.get(source.full_meaning(name) or BACKGROUND, 0)
    if merged.ignore_label is not None:
        table[len(full_labels)] = merged.ignore_label
    return table
