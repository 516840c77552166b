"""Fingerprint, plans, folds and preprocessing of one dataset, in one command."""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import DatasetJson, read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case, training_cases
from nnmosaic.pipeline.defaults import DEFAULT_PLANS
from nnmosaic.pipeline.lock import exclusive
from nnmosaic.pipeline.measured_plans import fit_to_minutes, fitted_before, with_speeds
from nnmosaic.pipeline.plan_request import PlanRequest
from nnmosaic.pipeline.progress import progress
from nnmosaic.pipeline.workspace import Workspace
from nnmosaic.planners.fingerprint import (
    contents_of,
    extract_fingerprint,
    unchanged_fingerprint,
)
from nnmosaic.planners.ledger import configuration_digest
from nnmosaic.planners.method_memory import memory_factor
from nnmosaic.planners.plans_section import PlanningResult
from nnmosaic.planners.preprocessing import (
    FULL_REFERENCES_FOLDER,
    RATER_REFERENCES_FOLDER,
    copy_references,
    finished_cases,
    preprocess_configuration,
)
from nnmosaic.planners.resources import MAX_WORKERS, default_workers, space_warning
from nnmosaic.planners.worker_pool import call_one, start_server, worker_pool
from nnmosaic.trainers import TRAINERS

logger = logging.getLogger(__name__)

NETWORK = ("architecture", "spacing", "normalization_schemes", "inherits_from")
"""Entries of a configuration that all folds of a model must share."""


def plan(workspace: Workspace, identifier: str, request: PlanRequest) -> PlanningResult:
    """Make fingerprint and plans of a dataset, without preprocessing.

    Raises
    ------
    InputError
        If the dataset is broken; nothing is planned then.
    """
    if request.minutes is not None:
        raise InputError(
            "--minutes needs preprocessed data, on which steps are measured: use "
            "plan_and_preprocess."
        )
    with _opened(workspace, identifier) as (dataset, cases, folder), worker_pool(1) as pool:
        _fingerprint(cases, dataset, folder, _threads(None))
        _check_trainer(request, pool)
        result = _plan(folder, request, dataset, pool)
        _write_plans(result.plans, folder, workspace)
    return result


def plan_and_preprocess(
    workspace: Workspace,
    identifier: str,
    configurations: Sequence[str],
    request: PlanRequest | None = None,
    *,
    workers: int | None = None,
) -> PlanningResult:
    """Prepare a dataset for training and return its plans. What is done already is not done again.

    Parameters
    ----------
    identifier : str
        Dataset id or name.
    configurations : sequence of str
        Of the plans, for example "3d_fullres"; one that the planner found useless is skipped.
    request : PlanRequest, optional
        Default: nnU-Net's plans.
    workers : int, optional
        Processes. Default: one per core, at most 8, and no more than the free memory has room for.

    Raises
    ------
    InputError
        If the dataset is broken, or if the plans would change the network of trained folds; nothing
        is planned then.
    """
    request = (request or PlanRequest()).of(configurations)
    with _opened(workspace, identifier) as (dataset, cases, folder), worker_pool(1) as planning:
        fingerprint = _fingerprint(cases, dataset, folder, _threads(workers))
        _check_trainer(request, planning)
        result = _plan(folder, request, dataset, planning)
        fitted = fitted_before(result.plans, folder, request)
        plans = fitted or result.plans
        known = _known_configurations(configurations, plans)
        if not request.keep_plans:
            _write_plans(plans, folder, workspace)
        # Beside the first cases: it imports scikit-learn.
        folds = planning.submit(_folds, [case.identifier for case in cases], dataset, folder)
        workers = workers or default_workers(fingerprint, plans, known)
        with worker_pool(workers) as pool:
            preprocess = partial(_preprocess, cases, dataset, folder, known, pool, fingerprint)
            preprocess(plans)
            if (problem := folds.result()) is not None:
                logger.warning("No folds: %s", problem)
            if request.minutes is not None:
                if fitted is None:
                    fitted = fit_to_minutes(result.plans, request, folder, len(cases), planning)
                    _write_plans(fitted, folder, workspace)
                    declared = dataset.content
                    digests = {configuration_digest(p, known[0], declared) for p in (plans, fitted)}
                    if len(digests) > 1:  # a smaller patch gives 3d_lowres another spacing
                        preprocess(fitted)
                result = call_one(planning, "describe", fitted)
            elif request.measure:
                measured = with_speeds(plans, known, request, folder)
                _write_plans(measured, folder, workspace)
                result = replace(result, plans=measured)
    return result


def _threads(workers: int | None) -> int:
    return workers or min(MAX_WORKERS, os.cpu_count() or 1)


@contextmanager
def _opened(
    workspace: Workspace, identifier: str
) -> Iterator[tuple[DatasetJson, list[Case], Path]]:
    """Yield dataset, cases and the preprocessed folder, locked, while the worker server starts."""
    start_server()
    name = workspace.raw_dataset(identifier).name
    raw, folder = workspace.raw / name, workspace.preprocessed / name
    dataset = read_dataset_json(raw)
    cases = training_cases(raw, dataset)
    for case in cases:
        dataset.source_of(case.identifier)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / "preprocessing.lock", "prepares this dataset"):
        yield dataset, cases, folder


def _fingerprint(
    cases: Sequence[Case], dataset: DatasetJson, folder: Path, workers: int
) -> dict[str, Any]:
    path = folder / "dataset_fingerprint.json"
    fingerprint = unchanged_fingerprint(path, cases, dataset)
    if fingerprint is not None:
        logger.info("Fingerprint: unchanged")
    else:
        with progress("Fingerprint", len(cases)) as advance:
            fingerprint = extract_fingerprint(cases, dataset, workers=workers, on_case=advance)
    write_json(fingerprint, path)
    return fingerprint


def _check_trainer(request: PlanRequest, pool: Executor) -> None:
    if request.trainer is not None and request.trainer not in TRAINERS:
        pool.submit(_look_up_trainer, request.trainer).result()


def _look_up_trainer(name: str) -> None:
    """Raise `InputError` if there is no such trainer; runs where torch is imported already."""
    from nnmosaic.trainers.lookup import trainer_class

    trainer_class(name)


def _plan(
    folder: Path, request: PlanRequest, dataset: DatasetJson, pool: Executor
) -> PlanningResult:
    if request.keep_plans:
        name = request.plans_name or DEFAULT_PLANS
        path = folder / f"{name}.json"
        if not path.is_file():
            raise InputError(f"{path} does not exist: leave --keep_plans out to plan.")
        plans = read_json(path)
        if plans.get("plans_name") != name:
            raise InputError(
                f'{path} holds "plans_name": {plans.get("plans_name")!r}. Set it to {name!r}, and '
                "the data_identifier of changed configurations to a name of their own."
            )
        write_json(dataset.content, folder / "dataset.json")  # planners copy it, too
        result: PlanningResult = call_one(pool, "describe", plans)
    else:
        result = call_one(
            pool,
            "plan",
            folder.name,
            planner=request.planner,
            plans_name=request.plans_name,
            memory_gb=request.memory_gb,
            memory_factor=memory_factor(request.trainer),
            device=request.device,
        )
    logger.debug(result.output)
    return result


def _plans_file(folder: Path, plans: dict[str, Any]) -> Path:
    return folder / f"{plans['plans_name']}.json"


def _write_plans(plans: dict[str, Any], folder: Path, workspace: Workspace) -> None:
    """Write the plans file, unless folds were trained with another network of that name."""
    path = _plans_file(folder, plans)
    before = read_json(path)["configurations"] if path.is_file() else {}
    for name, configuration in plans["configurations"].items():
        trained = f"*__{plans['plans_name']}__{name}/fold_*/checkpoint_*.pth"
        if (
            name in before
            and any(before[name].get(key) != configuration.get(key) for key in NETWORK)
            and (found := next((workspace.results / folder.name).glob(trained), None))
        ):
            raise InputError(
                f"{path} would get another network for {name}, but {found.parent} was trained with "
                "the present one. Go on with --keep_plans, name the new plans with "
                "-overwrite_plans_name, or move the results away."
            )
    write_json(plans, path)


def _known_configurations(configurations: Sequence[str], plans: dict[str, Any]) -> list[str]:
    known = [name for name in configurations if name in plans["configurations"]]
    for name in sorted(set(configurations) - set(known)):
        logger.info("Configuration %s is not in the plans and is skipped", name)
    if not known:
        raise InputError(
            f"None of {list(configurations)} is in {plans['plans_name']}, which has "
            f"{', '.join(plans['configurations'])}. Choose one of these with -c."
        )
    return known


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
    folder: Path,
    configurations: Sequence[str],
    pool: Executor,
    fingerprint: dict[str, Any],
    plans: dict[str, Any],
) -> None:
    """Preprocess what is not preprocessed yet for the plans, which are in their file."""
    plans_file, contents = _plans_file(folder, plans), contents_of(fingerprint)
    unfinished = {
        name: set(contents) - set(finished_cases(plans_file, plans, name, dataset, contents))
        for name in configurations
    }
    if (warning := space_warning(folder, fingerprint, plans, unfinished)) is not None:
        logger.warning(warning)
    for name in configurations:
        done = len(cases) - len(unfinished[name])
        if done:
            logger.info("%s: %d cases are preprocessed already", name, done)
        with progress(f"Preprocessing {name}", len(unfinished[name])) as advance:
            preprocess_configuration(
                cases, dataset, plans_file, name, pool, contents=contents, on_case=advance
            )
    copy_references(
        {case.identifier: case.label for case in cases if case.label is not None},
        folder / "gt_segmentations",
        dataset.file_ending,
    )
    for rater in dataset.raters:
        copy_references(
            {c.identifier: dict(c.raters)[rater] for c in cases if rater in dict(c.raters)},
            folder / RATER_REFERENCES_FOLDER / rater,
            dataset.file_ending,
        )
    copy_references(
        {case.identifier: case.full_label for case in cases if case.full_label is not None},
        folder / FULL_REFERENCES_FOLDER,
        dataset.file_ending,
    )
