"""Looking through a raw dataset and saying what is wrong with it, each finding with its cure."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.data_conversion.case_check import read_image, read_label, reader_of
from nnmosaic.data_conversion.dataset_json import DatasetJson, read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import (
    FULL_LABELS_FOLDER,
    RATERS_FOLDER,
    Case,
    training_cases,
)


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes
    ----------
    is_error : bool
        Whether training on the dataset would fail or learn something wrong.
    text : str
        What is wrong, where, and what to do.
    """

    is_error: bool
    text: str


def examine(folder: Path, *, splits_file: Path | None = None) -> list[Finding]:
    """Check a raw dataset as a whole.

    Parameters
    ----------
    folder : Path
        Raw dataset, with dataset.json, imagesTr, labelsTr and perhaps labelsTr_full.
    splits_file : Path, optional
        ``splits_final.json``, whose folds must not share subjects.
    """
    try:
        dataset = read_dataset_json(folder)
        cases = training_cases(folder, dataset)
    except InputError as error:
        return [Finding(True, str(error))]
    findings = list(_stray_files(folder, dataset, cases))
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda case: _examine_case(case, dataset), cases))
    findings += [finding for found, _ in results for finding in found]
    findings += _duplicates(cases, [digest for _, digest in results], dataset)
    if splits_file is not None and splits_file.is_file():
        findings += _shared_subjects(splits_file, dataset)
    declared = dataset.content.get("numTraining")
    if declared != len(cases):
        findings.append(
            Finding(
                False,
                f"{folder / 'dataset.json'}: numTraining is {declared}, found {len(cases)} cases.",
            )
        )
    return findings


def _examine_case(case: Case, dataset: DatasetJson) -> tuple[list[Finding], str]:
    """Return the findings of one case and a digest of its voxels."""
    reader = reader_of(dataset)
    try:
        image, properties = read_image(case, reader, num_channels=len(dataset.channel_names))
    except InputError as error:
        return [Finding(True, str(error))], ""
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    read = partial(read_label, reader=reader, image=image, properties=properties)
    findings: list[Finding] = []
    try:
        label = read(case, legal=dataset.legal_values(case.identifier))
        for _, path in case.raters:
            read(replace(case, label=path), legal=dataset.legal_values(case.identifier))
        if case.full_label is not None:
            full = read(replace(case, label=case.full_label), legal=_full_values(dataset))
            findings += _contradictions(case, label, full, dataset)
    except InputError as error:
        return [Finding(True, str(error))], digest
    if dataset.raters and not case.raters:
        findings.append(
            Finding(
                True,
                f"Case {case.identifier!r} has no label map of {', '.join(dataset.raters)} in "
                f"{RATERS_FOLDER}. Add one, or remove the case.",
            )
        )
    if not np.any(label > 0):
        source = dataset.source_of(case.identifier) if not dataset.has_regions else None
        annotated = [] if source is None else [*source.annotated, *source.merged]
        findings.append(
            Finding(
                False,
                f"{case.label} is empty. That says: none of "
                f"{', '.join(annotated) or 'the classes'} is in "
                "this image. If they were not drawn, remove the case or declare it in "
                "partial_labels.",
            )
        )
    if image.std() == 0:
        findings.append(
            Finding(False, f"{case.images[0]} has one constant value. Check the export.")
        )
    return findings, digest


def _full_values(dataset: DatasetJson) -> range | None:
    return None if dataset.has_regions else range(len(dataset.full_labels) + 1)


def _contradictions(
    case: Case, label: np.ndarray, full: np.ndarray, dataset: DatasetJson
) -> Iterator[Finding]:
    """Compare each class that the source annotates and the full reference shows."""
    source = dataset.source_of(case.identifier)
    labelled = (label != dataset.ignore_label) & (full < len(dataset.full_labels))
    for name, members in ({n: (n,) for n in source.annotated} | dict(source.merged)).items():
        if not all(member in dataset.full_labels for member in members):
            continue
        shown = np.isin(full, [dataset.full_labels[member] for member in members])
        wrong = int((labelled & (shown != (label == dataset.labels[name]))).sum())
        if shown.any() and wrong:
            yield Finding(
                False,
                f"{case.full_label} contradicts {case.label} in {wrong} voxels of {name!r}, which "
                "is annotated there. Scores against it would mislead: correct the file that is "
                "wrong, or remove the full reference.",
            )


def _stray_files(folder: Path, dataset: DatasetJson, cases: list[Case]) -> Iterator[Finding]:
    known = {path for case in cases for path in (*case.images, case.label, case.full_label)}
    known |= {path for case in cases for _, path in case.raters}
    parts = [f"{RATERS_FOLDER}/{rater}" for rater in dataset.raters]
    for part in ("imagesTr", "labelsTr", FULL_LABELS_FOLDER, *parts):
        for path in sorted((folder / part).glob("*")):
            if path not in known:
                unused = path.name.endswith(dataset.file_ending)
                reason = "belongs to no case" if unused else f"is not a {dataset.file_ending} file"
                yield Finding(False, f"{path} {reason} and is ignored. Move it away.")


def _duplicates(cases: list[Case], digests: list[str], dataset: DatasetJson) -> Iterator[Finding]:
    first: dict[str, Case] = {}
    for case, digest in zip(cases, digests, strict=True):
        other = first.setdefault(digest, case) if digest else case
        same_subject = dataset.subject_of(case.identifier) == dataset.subject_of(other.identifier)
        if other is not case and not same_subject:
            yield Finding(
                True,
                f"{case.images[0]} and {other.images[0]} hold the same voxels, but count as "
                "different subjects: folds would leak. Remove one, or give both one subject in "
                "'subjects' of dataset.json.",
            )


def _shared_subjects(splits_file: Path, dataset: DatasetJson) -> Iterator[Finding]:
    for fold, split in enumerate(read_json(splits_file)):
        train = {dataset.subject_of(case) for case in split["train"]}
        both = sorted(train & {dataset.subject_of(case) for case in split["val"]})
        if both:
            yield Finding(
                True,
                f"{splits_file}: fold {fold} trains and validates on subject {both[0]!r} "
                f"({len(both)} in all). Delete the file to get folds grouped by subject.",
            )
