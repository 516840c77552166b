"""Fingerprint, plans, folds and preprocessing of one dataset, in one command."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import DatasetJson, read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case, training_cases
from nnmosaic.pipeline.lock import exclusive
from nnmosaic.pipeline.progress import progress
from nnmosaic.pipeline.workspace import Workspace
from nnmosaic.planners.fingerprint import extract_fingerprint
from nnmosaic.planners.ledger import signature
from nnmosaic.planners.preprocessing import copy_references, preprocess_configuration
from nnmosaic.planners.worker_pool import call, worker_pool

logger = logging.getLogger(__name__)

INPUTS_KEY = "nnmosaic_inputs"
"""In dataset_fingerprint.json: what it was computed from, and the labels were checked against."""


def plan_and_preprocess(
    workspace: Workspace,
    identifier: str,
    configurations: Sequence[str],
    *,
    planner: str | None = None,
    plans_name: str | None = None,
    memory_gb: float | None = None,
    device: str | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Prepare a dataset for training and return its plans. What is done already is not done again.

    Parameters
    ----------
    identifier : str
        Dataset id or name.
    configurations : sequence of str
        Of the plans, for example "3d_fullres"; one that the planner found useless is skipped.
    planner : str, optional
        Class name of an nnU-Net planner. Default: nnU-Net's, or the small-machine planner for
        ``device="cpu"`` or less memory than nnU-Net's smallest preset.
    memory_gb : float, optional
        GPU memory to plan for.
    workers : int, optional
        Processes. Default: one per core, at most 8.

    Raises
    ------
    InputError
        If the dataset is broken; nothing is planned then.
    """
    name = workspace.raw_dataset(identifier).name
    raw, preprocessed = workspace.raw / name, workspace.preprocessed / name
    workers = workers or min(8, os.cpu_count() or 1)
    with worker_pool(workers) as pool, ExitStack() as stack:
        dataset = read_dataset_json(raw)
        cases = training_cases(raw, dataset)
        for case in cases:
            dataset.source_of(case.identifier)
        preprocessed.mkdir(parents=True, exist_ok=True)
        stack.enter_context(exclusive(preprocessed / "preprocessing.lock", "prepares this dataset"))

        _fingerprint(cases, dataset, preprocessed, workers)
        plans: dict[str, Any]
        plans, output = pool.submit(
            call,
            "plan",
            name,
            planner=planner,
            plans_name=plans_name,
            memory_gb=memory_gb,
            device=device,
        ).result()
        logger.debug(output)
        plans_file = preprocessed / f"{plans['plans_name']}.json"
        # In a worker, beside the first cases: it imports scikit-learn.
        folds = pool.submit(_folds, [case.identifier for case in cases], dataset, preprocessed)
        _preprocess(cases, dataset, plans_file, plans, configurations, pool)
        if (problem := folds.result()) is not None:
            logger.warning("No folds: %s", problem)
    return plans


def _fingerprint(cases: Sequence[Case], dataset: DatasetJson, folder: Path, workers: int) -> None:
    path = folder / "dataset_fingerprint.json"
    declared = ("labels", "partial_labels", "channel_names")
    inputs = {
        "cases": {case.identifier: signature(case) for case in cases},
        **{key: dataset.content.get(key) for key in declared},
    }
    if path.is_file() and read_json(path).get(INPUTS_KEY) == inputs:
        logger.info("Fingerprint: unchanged")
        return
    with progress("Fingerprint", len(cases)) as advance:
        fingerprint = extract_fingerprint(cases, dataset, workers=workers, on_case=advance)
    write_json({**fingerprint, INPUTS_KEY: inputs}, path)


def _folds(names: Sequence[str], dataset: DatasetJson, folder: Path) -> str | None:
    """Write the folds where there are none, and return why that is impossible."""
    from nnmosaic.planners.splits import ensure_splits

    try:
        ensure_splits(folder / "splits_final.json", names, dataset)
    except InputError as error:
        return str(error)
    return None


def _preprocess(
    cases: Sequence[Case],
    dataset: DatasetJson,
    plans_file: Path,
    plans: dict[str, Any],
    configurations: Sequence[str],
    pool: ProcessPoolExecutor,
) -> None:
    known = [name for name in configurations if name in plans["configurations"]]
    for name in sorted(set(configurations) - set(known)):
        logger.info("Configuration %s is not in the plans and is skipped", name)
    if not known:
        raise InputError(
            f"None of {list(configurations)} is in {plans_file}, which has "
            f"{', '.join(plans['configurations'])}. Choose one of these with -c."
        )
    for name in known:
        with progress(f"Preprocessing {name}", len(cases)) as advance:
            done = preprocess_configuration(cases, dataset, plans_file, name, pool, on_case=advance)
        if done < len(cases):
            logger.info("%s: %d cases were preprocessed already", name, len(cases) - done)
    copy_references(cases, plans_file.parent / "gt_segmentations", dataset.file_ending)
