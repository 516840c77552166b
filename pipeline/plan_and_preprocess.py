"""Fingerprint, plans, folds and preprocessing of one dataset, in one command."""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import DatasetJson, read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case, training_cases
from nnmosaic.pipeline.lock import exclusive
from nnmosaic.pipeline.progress import progress
from nnmosaic.pipeline.speed import measure_speed
from nnmosaic.pipeline.workspace import Workspace
from nnmosaic.planners.cpu_budget import Speed, fit_to_seconds, fitted_decisions, name_of
from nnmosaic.planners.fingerprint import (
    contents_of,
    extract_fingerprint,
    unchanged_fingerprint,
)
from nnmosaic.planners.method_memory import memory_factor
from nnmosaic.planners.plans_section import (
    PlanningResult,
    PlansSection,
    read_section,
    write_section,
)
from nnmosaic.planners.preprocessing import copy_references, preprocess_configuration
from nnmosaic.planners.resources import MAX_WORKERS, check_free_space, default_workers
from nnmosaic.planners.worker_pool import call, start_server, worker_pool

logger = logging.getLogger(__name__)

DEFAULT_FOLDS = 5
DEFAULT_PLANS = "nnUNetPlans"
DEFAULT_TRAINER = "nnUNetTrainerSelfDisambiguation"


@dataclass(frozen=True)
class PlanRequest:
    """What plans are asked to fit.

    Attributes
    ----------
    planner : str, optional
        Class name of a planner of nnMosaic or nnU-Net. Default: MosaicPlanner, or the small-machine
        planner for a CPU or for less memory than nnU-Net's smallest preset.
    plans_name : str, optional
        Default: the planner's.
    memory_gb : float, optional
        GPU memory to plan for.
    trainer : str, optional
        Class name; patch and batch leave room for what its method needs.
    device : {"cpu"}, optional
        Plan for a machine without a GPU.
    minutes : float, optional
        For the CPU: time for all folds together; network and steps are chosen to fit it.
    folds : int
        Folds that will be trained in these minutes.
    cores : int, optional
        Threads of the training in these minutes. Default: all cores.
    keep_plans : bool
        Do not plan: take the plans file as it is, for example edited by hand.
    measure : bool
        Train some steps of each configuration and note time and memory in the plans.
    """

    planner: str | None = None
    plans_name: str | None = None
    memory_gb: float | None = None
    trainer: str | None = None
    device: str | None = None
    minutes: float | None = None
    folds: int = DEFAULT_FOLDS
    cores: int | None = None
    keep_plans: bool = False
    measure: bool = False

    def __post_init__(self) -> None:
        if self.device is not None and (self.planner or self.memory_gb):
            raise InputError(
                "--device cpu has a planner of its own: leave -pl and --memory_gb out."
            )
        if self.keep_plans and (self.planner or self.memory_gb or self.device):
            raise InputError(
                "--keep_plans takes the plans file as it is: leave -pl, --memory_gb and --device "
                "out."
            )
        if self.minutes is not None and self.device is None:
            raise InputError("--minutes plans for a CPU: add --device cpu.")
        if self.cores is not None and self.minutes is None:
            raise InputError("--cores are those that train for some --minutes: give both.")
        present = os.cpu_count() or 1
        if self.cores is not None and self.cores > present:
            raise InputError(
                f"--cores {self.cores}: this machine has {present}, and the time of a step is "
                "measured here. Plan on the machine that trains."
            )

    def budget(self) -> dict[str, Any]:
        """Return what a measured CPU plan is made for, as its plans hold it."""
        cores = {"cores": self.cores} if self.cores else {}
        return {"device": "cpu", "minutes": self.minutes, "folds": self.folds, **cores}


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
    with _opened(workspace, identifier) as (dataset, cases, folder):
        _fingerprint(cases, dataset, folder, os.cpu_count() or 1)
        with worker_pool(1) as pool:
            result = _plan(folder, request, pool)
        write_json(result.plans, _plans_file(folder, result.plans))
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
        If the dataset is broken; nothing is planned then.
    """
    request = request or PlanRequest()
    if request.minutes is not None and len(configurations) != 1:
        raise InputError("--minutes is the time of one configuration: give exactly one with -c.")
    with _opened(workspace, identifier) as (dataset, cases, folder):
        threads = workers or min(MAX_WORKERS, os.cpu_count() or 1)
        fingerprint = _fingerprint(cases, dataset, folder, threads)
        with worker_pool(workers or default_workers(fingerprint)) as pool:
            result = _plan(folder, request, pool)
            decisions = result.decisions
            plans_file = _plans_file(folder, result.plans)
            fitted = _fitted_before(result.plans, plans_file, request)
            write_json(fitted or result.plans, plans_file)
            # In a worker, beside the first cases: it imports scikit-learn.
            folds = pool.submit(_folds, [case.identifier for case in cases], dataset, folder)
            known = _known_configurations(configurations, result.plans, plans_file)
            _preprocess(cases, dataset, plans_file, known, pool, fingerprint)
            if (problem := folds.result()) is not None:
                logger.warning("No folds: %s", problem)
            if request.minutes is not None:
                fitted = fitted or _fit(result.plans, known[0], request, folder, len(cases), pool)
            elif request.measure:
                fitted = _measured(result.plans, known, request, folder)
            if fitted is not None:
                write_json(fitted, plans_file)
                result = pool.submit(call, "describe", fitted).result()
                result = replace(result, decisions=result.decisions or decisions)
    return result


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


def _plan(folder: Path, request: PlanRequest, pool: Executor) -> PlanningResult:
    if request.keep_plans:
        path = folder / f"{request.plans_name or DEFAULT_PLANS}.json"
        if not path.is_file():
            raise InputError(f"{path} does not exist: leave --keep_plans out to plan.")
        result: PlanningResult = pool.submit(call, "describe", read_json(path)).result()
    else:
        result = pool.submit(
            call,
            "plan",
            folder.name,
            planner=request.planner,
            plans_name=request.plans_name,
            memory_gb=request.memory_gb,
            memory_factor=memory_factor(request.trainer),
            device=request.device,
        ).result()
    logger.debug(result.output)
    return result


def _plans_file(folder: Path, plans: dict[str, Any]) -> Path:
    return folder / f"{plans['plans_name']}.json"


def _known_configurations(
    configurations: Sequence[str], plans: dict[str, Any], plans_file: Path
) -> list[str]:
    known = [name for name in configurations if name in plans["configurations"]]
    for name in sorted(set(configurations) - set(known)):
        logger.info("Configuration %s is not in the plans and is skipped", name)
    if not known:
        raise InputError(
            f"None of {list(configurations)} is in {plans_file}, which has "
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
    plans_file: Path,
    configurations: Sequence[str],
    pool: Executor,
    fingerprint: dict[str, Any],
) -> None:
    plans = read_json(plans_file)
    for name in configurations:
        if (warning := check_free_space(plans_file.parent, fingerprint, plans, name)) is not None:
            logger.warning(warning)
    for name in configurations:
        with progress(f"Preprocessing {name}", len(cases)) as advance:
            done = preprocess_configuration(
                cases,
                dataset,
                plans_file,
                name,
                pool,
                contents=contents_of(fingerprint),
                on_case=advance,
            )
        if done < len(cases):
            logger.info("%s: %d cases were preprocessed already", name, len(cases) - done)
    copy_references(cases, plans_file.parent / "gt_segmentations", dataset.file_ending)


# -------------------------------------------------------------------- minutes on a CPU


def _fitted_before(
    plans: dict[str, Any], plans_file: Path, request: PlanRequest
) -> dict[str, Any] | None:
    """Return the plans in the file if they were fitted from the same plans to the same minutes.

    A measurement never comes out twice the same, and trained folds must keep their network.
    """
    if request.minutes is None or not plans_file.is_file():
        return None
    before: dict[str, Any] = read_json(plans_file)
    budget = read_section(before).budget
    wanted = {**request.budget(), "planned_from": _digest(plans)}
    return before if budget == wanted else None


def _fit(
    plans: dict[str, Any],
    configuration: str,
    request: PlanRequest,
    folder: Path,
    number_of_cases: int,
    pool: Executor,
) -> dict[str, Any]:
    if "architecture" not in plans["configurations"][configuration]:
        raise InputError(
            f"--minutes cannot choose a network for {configuration}, which inherits that of "
            "another configuration. Plan for the other one."
        )
    section = read_section(plans)
    budget = {**request.budget(), "planned_from": _digest(plans)}

    def planned(size: float) -> dict[str, Any]:
        if size == 1:
            return plans
        arguments = {"plans_name": request.plans_name, "device": "cpu", "size": size}
        smaller: dict[str, Any] = pool.submit(call, "plan", folder.name, **arguments).result().plans
        return smaller

    def measure(candidate: dict[str, Any]) -> Speed:
        logger.info("Measuring steps of %s", name_of(candidate, configuration))
        write_section(candidate, replace(section, budget=budget))  # the threads of a training
        return measure_speed(candidate, configuration, request.trainer or DEFAULT_TRAINER, folder)

    fit = fit_to_seconds(
        planned,
        measure,
        configuration,
        section.run_settings,
        seconds=60 * float(request.minutes or 0) / request.folds,
        validation_cases=-(-number_of_cases // DEFAULT_FOLDS),
    )
    write_section(
        fit.plans,
        PlansSection(
            budget,
            fit.settings,
            (*section.decisions[:-2], *fitted_decisions(fit, configuration, request.folds)),
            {configuration: fit.numbers()},
        ),
    )
    return fit.plans


def _measured(
    plans: dict[str, Any], configurations: Sequence[str], request: PlanRequest, folder: Path
) -> dict[str, Any]:
    section = read_section(plans)
    expected = {}
    for name in configurations:
        if "previous_stage" in plans["configurations"][name]:
            logger.info("%s needs predictions of another stage: not measured", name)
            continue
        logger.info("Measuring steps of %s", name)
        trainer = request.trainer or DEFAULT_TRAINER
        expected[name] = asdict(measure_speed(plans, name, trainer, folder, request.device))
    measured = copy.deepcopy(plans)
    write_section(measured, replace(section, expected=expected))
    return measured


def _digest(plans: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plans, sort_keys=True).encode()).hexdigest()
