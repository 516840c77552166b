"""Plans that rest on measured steps: fitted to some minutes on a CPU, or with their speed noted."""

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.plan_request import PlanRequest
from nnmosaic.pipeline.speed import measure_speed
from nnmosaic.planners.cpu_budget import Speed, fit_to_seconds, fitted_decisions, name_of
from nnmosaic.planners.plans_section import (
    PlanningResult,
    read_section,
    write_section,
)
from nnmosaic.planners.worker_pool import call_one

logger = logging.getLogger(__name__)


def fitted_before(
    plans: dict[str, Any], folder: Path, request: PlanRequest
) -> dict[str, Any] | None:
    """Return the plans in the file if they were fitted from the same plans to the same minutes.

    A measurement never comes out twice the same, and trained folds must keep their network.

    Raises
    ------
    InputError
        If the file fits another configuration into its minutes.
    """
    plans_file = folder / f"{plans['plans_name']}.json"
    if request.minutes is None or not plans_file.is_file():
        return None
    before: dict[str, Any] = read_json(plans_file)
    budget = read_section(before).budget
    wanted = request.budget()
    if "minutes" in budget and budget["configuration"] != wanted["configuration"]:
        raise InputError(
            f"{plans_file} fits {budget['configuration']} into its minutes. Give the plans of "
            f"{wanted['configuration']} another name with -overwrite_plans_name."
        )
    return before if budget == {**wanted, "planned_from": _digest(plans, request)} else None


def fit_to_minutes(
    plans: dict[str, Any],
    request: PlanRequest,
    folder: Path,
    number_of_cases: int,
    pool: Executor,
) -> dict[str, Any]:
    """Return plans whose network and steps fit the minutes; ``plans`` is changed in place.

    Parameters
    ----------
    folder : Path
        The dataset's in ``nnUNet_preprocessed``; steps are measured on what is in it.
    pool : Executor
        Plans smaller networks.

    Raises
    ------
    InputError
        If the configuration has no network of its own, or the minutes are too few.
    """
    configuration = str(request.configuration)
    if "architecture" not in plans["configurations"][configuration]:
        raise InputError(
            f"--minutes cannot choose a network for {configuration}, which inherits that of "
            "another configuration. Plan for the other one."
        )
    budget = {**request.budget(), "planned_from": _digest(plans, request)}

    def planned(size: float) -> dict[str, Any]:
        if size == 1:
            return plans
        options = {"plans_name": request.plans_name, "device": "cpu", "size": size}
        smaller: PlanningResult = call_one(pool, "plan", folder.name, **options)
        return smaller.plans

    def measure(candidate: dict[str, Any]) -> Speed:
        logger.info("Measuring steps of %s", name_of(candidate, configuration))
        # With the budget, so that the steps get the cores of the training.
        write_section(candidate, replace(read_section(candidate), budget=budget))
        return measure_speed(candidate, configuration, request.measured_trainer, folder)

    fit = fit_to_seconds(
        planned,
        measure,
        configuration,
        read_section(plans).run_settings,
        seconds=60 * float(request.minutes or 0) / request.folds,
        validation_cases=_validation_cases(folder, number_of_cases),
    )
    section = read_section(fit.plans)
    own = fitted_decisions(fit, configuration, request.folds)
    kept = [d for d in section.decisions if d.what not in {decision.what for decision in own}]
    expected = {configuration: fit.numbers()}
    fitted = replace(
        section,
        budget=budget,
        run_settings=fit.settings,
        decisions=(*kept, *own),
        expected=expected,
    )
    write_section(fit.plans, fitted)
    return fit.plans


def _validation_cases(folder: Path, number_of_cases: int) -> int:
    """Return the cases of the largest fold."""
    splits = folder / "splits_final.json"
    if splits.is_file():
        return max(len(fold["val"]) for fold in read_json(splits))
    return number_of_cases  # too few for folds: fold "all" is validated on all of them


def with_speeds(
    plans: dict[str, Any], configurations: Sequence[str], request: PlanRequest, folder: Path
) -> dict[str, Any]:
    """Return a copy of the plans with the measured speed of each configuration in it."""
    expected = {}
    for name in configurations:
        if "previous_stage" in plans["configurations"][name]:
            logger.info("%s needs predictions of another stage: not measured", name)
            continue
        logger.info("Measuring steps of %s", name)
        expected[name] = asdict(
            measure_speed(plans, name, request.measured_trainer, folder, request.device)
        )
    measured = copy.deepcopy(plans)
    write_section(measured, replace(read_section(plans), expected=expected))
    return measured


def _digest(plans: dict[str, Any], request: PlanRequest) -> str:
    """Return a digest of what the fit began with: the configuration alone."""
    text = json.dumps(plans["configurations"][str(request.configuration)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
