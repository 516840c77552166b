"""Dataset fingerprint: nnU-Net's numbers and those of the sources, from one reading of each case.

The same reading checks the case. Runs without torch, so that it need not wait for the import of
torch in the worker processes.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.data_conversion.case_check import read_image, read_label, reader_of
from nnmosaic.data_conversion.dataset_json import DatasetJson
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.merge import matrix_warnings
from nnmosaic.data_conversion.raw_dataset import Case
from nnmosaic.planners.ledger import content_digest, file_times
from nnmosaic.planners.source_statistics import (
    CaseFacts,
    intensity_properties,
    rater_agreement,
    source_statistics,
)
from nnmosaic.planners.worker_pool import run_cases

SECTION = "nnmosaic"
VERSION = 1
"""Of that section: another one is computed anew."""
NUM_INTENSITY_SAMPLES = 10e7
"""Foreground voxels sampled in the whole dataset, as nnU-Net does."""
SAMPLING_SEED = 1234
"""nnU-Net's, the same for every case."""


def extract_fingerprint(
    cases: Sequence[Case],
    dataset: DatasetJson,
    *,
    workers: int,
    on_case: Callable[[str], None],
) -> dict[str, Any]:
    """Return the content of ``dataset_fingerprint.json``: nnU-Net's, and a section of ours.

    Parameters
    ----------
    workers : int
        Threads.
    on_case : callable
        Called with the name of each finished case.

    Returns
    -------
    dict
        nnU-Net's entries, equal to nnU-Net's where no partial labels are declared; with them, the
        ignore label is no foreground. In "nnmosaic": "inputs" (for `unchanged_fingerprint`),
        and what `nnmosaic.planners.source_statistics.source_statistics` returns.

    Raises
    ------
    InputError
        If a case is broken (see `nnmosaic.data_conversion.case_check`), or no voxel is labelled.
    """
    times = {case.identifier: file_times(case) for case in cases}
    analyse = partial(
        analyse_case, dataset=dataset, num_samples=int(NUM_INTENSITY_SAMPLES // len(cases))
    )
    results: dict[str, CaseFacts] = {}
    with ThreadPoolExecutor(workers) as pool:
        for name, result in run_cases(pool, analyse, {c.identifier: (c,) for c in cases}):
            results[name] = result
            on_case(name)
    facts = {case.identifier: results[case.identifier] for case in cases}
    if not any(fact.intensities[0].size for fact in facts.values()):
        raise InputError("No case has a labelled voxel: labelsTr holds only background.")
    return fingerprint_of(facts, dataset, times)


def fingerprint_of(
    facts: Mapping[str, CaseFacts], dataset: DatasetJson, times: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fingerprint of cases that have been analysed.

    Parameters
    ----------
    times : mapping
        Case -> `nnmosaic.planners.ledger.file_times`.
    """
    ordered = list(facts.values())
    return {
        "spacings": [fact.spacing for fact in ordered],
        "shapes_after_crop": [fact.shape for fact in ordered],
        "foreground_intensity_properties_per_channel": {
            str(c): intensity_properties([fact.intensities[c] for fact in ordered])
            for c in range(len(ordered[0].intensities))
        },
        "median_relative_size_after_cropping": float(
            np.median([fact.relative_size for fact in ordered])
        ),
        SECTION: {
            "inputs": _inputs(dataset, times, {name: fact.content for name, fact in facts.items()}),
            **source_statistics(facts, dataset),
        },
    }


def analyse_case(case: Case, dataset: DatasetJson, num_samples: int) -> CaseFacts:
    """Check one case and measure it."""
    reader = reader_of(dataset)
    image, properties = read_image(case, reader, num_channels=len(dataset.channel_names))
    legal = dataset.legal_values(case.identifier)
    label = read_label(case, reader, image=image, properties=properties, legal=legal)
    if not image.any():
        raise InputError(
            f"{case.images[0]} holds nothing but zeros. Restore it or remove the case."
        )
    inside = _nonzero_box(image)
    labelled = label[0]
    if dataset.partial_labels is not None and dataset.ignore_label is not None:
        labelled = np.where(labelled == dataset.ignore_label, 0, labelled)
    foreground = labelled[inside] > 0
    rng = np.random.RandomState(SAMPLING_SEED)
    # Without foreground float64, as in nnU-Net: one such case decides the precision of the mean.
    intensities = [
        rng.choice(channel[inside][foreground], num_samples) if foreground.any() else np.empty(0)
        for channel in image
    ]
    masks = {}
    for rater, path in case.raters:
        own = replace(case, label=path)
        drawn = read_label(own, reader, image=image, properties=properties, legal=legal)
        masks[rater] = (drawn > 0) & (drawn != dataset.ignore_label)
    return CaseFacts(
        shape=foreground.shape,
        spacing=[float(s) for s in properties["spacing"]],
        intensities=intensities,
        lowest=[float(channel.min()) for channel in image],
        relative_size=foreground.size / labelled.size,
        objects=_objects(labelled.astype(np.int32)),
        content=content_digest(case),
        agreement=rater_agreement(masks),
    )


def unchanged_fingerprint(
    path: Path, cases: Sequence[Case], dataset: DatasetJson
) -> dict[str, Any] | None:
    """Return the fingerprint in ``path``, with present times, if it still describes these cases.

    Only files whose size or time differ are read again, so a dataset that was copied or touched
    keeps its fingerprint. None if there is none, or if cases, files or declarations have changed.
    """
    if not path.is_file():
        return None
    fingerprint: dict[str, Any] = read_json(path)
    known = fingerprint.get(SECTION, {}).get("inputs", {})
    stored = known.get("cases", {})
    if known.get("declared") != _declared(dataset) or list(stored) != [c.identifier for c in cases]:
        return None
    times = {case.identifier: file_times(case) for case in cases}
    contents = {
        case.identifier: stored[case.identifier]["content"]
        if stored[case.identifier]["files"] == times[case.identifier]
        else content_digest(case)
        for case in cases
    }
    if contents != contents_of(fingerprint):
        return None
    fingerprint[SECTION]["inputs"] = _inputs(dataset, times, contents)
    return fingerprint


def contents_of(fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """Return case -> digest of its files."""
    cases = fingerprint[SECTION]["inputs"]["cases"]
    return {name: case["content"] for name, case in cases.items()}


def learnability_warnings(fingerprint_file: Path) -> list[str]:
    """Return what a user should know of who annotates what; nothing of nnU-Net's own fingerprint.

    See `nnmosaic.data_conversion.merge.matrix_warnings`.
    """
    section = read_json(fingerprint_file).get(SECTION)
    return [] if section is None else matrix_warnings(section["class_source_matrix"])


def _inputs(
    dataset: DatasetJson, times: Mapping[str, Any], contents: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "declared": _declared(dataset),
        "cases": {name: {"files": times[name], "content": contents[name]} for name in contents},
    }


def _declared(dataset: DatasetJson) -> dict[str, Any]:
    keys = (
        "labels", "partial_labels", "channel_names", "multirater", "overwrite_image_reader_writer",
    )  # fmt: skip
    return {"version": VERSION, **{key: dataset.content.get(key) for key in keys}}


def _nonzero_box(image: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box around the voxels that are not 0 in every channel."""
    mask = (image != 0).any(0)
    box = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        occupied = np.flatnonzero(mask.any(others))
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def _objects(label: np.ndarray) -> dict[int, tuple[int, int]]:
    """Return label value -> (voxels, components); voxels that share a corner are connected."""
    objects = {}
    for index, box in enumerate(ndimage.find_objects(label)):
        if box is not None:
            mask = label[box] == index + 1
            _, components = ndimage.label(mask, np.ones((3,) * mask.ndim))
            objects[index + 1] = (int(np.count_nonzero(mask)), int(components))
    return objects
