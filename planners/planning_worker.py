"""What the worker processes do: planning, and the work on one case. The only part that needs torch.

The command's own process never imports this module. It names the functions, and one server process
imports them once for all workers.
"""

import contextlib
import io
import multiprocessing
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import nnunetv2
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case
from nnmosaic.planners.preprocessing import SUFFIXES
from nnmosaic.planners.small_machine_planner import SMALLEST_PRESET_GB, SmallMachinePlanner


def plan(
    dataset_name: str,
    *,
    planner: str | None,
    plans_name: str | None,
    memory_gb: float | None,
    device: str | None,
) -> tuple[dict[str, Any], str]:
    """Run a planner and return the plans, and what nnU-Net printed.

    Raises
    ------
    InputError
        If nnU-Net has no such planner.
    """
    options: dict[str, Any] = {} if plans_name is None else {"plans_name": plans_name}
    if memory_gb is not None:
        options["gpu_memory_target_in_gb"] = memory_gb
    small = device == "cpu" or (memory_gb is not None and memory_gb < SMALLEST_PRESET_GB)
    planner_class = ExperimentPlanner if planner is None else _nnunet_planner(planner)
    if planner is None and small:
        planner_class, options["device"] = SmallMachinePlanner, device or "cuda"
    if os.environ.get("nnUNet_n_proc_DA") == "0":
        # nnU-Net's planners pass the number to torch.set_num_threads, which refuses 0. They run in
        # a worker process, so the setting of the command itself stays.
        os.environ["nnUNet_n_proc_DA"] = "1"
    if "fork" in multiprocessing.get_all_start_methods():
        # nnU-Net lists the files of a dataset with 12 processes, which takes ten times as long in
        # the way that this worker was started.
        multiprocessing.set_start_method("fork", force=True)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        plans: dict[str, Any] = planner_class(dataset_name, **options).plan_experiment()
    return plans, output.getvalue()


def _nnunet_planner(name: str) -> Any:
    folder = str(Path(nnunetv2.__path__[0]) / "experiment_planning")
    found = recursive_find_python_class(folder, name, "nnunetv2.experiment_planning")
    if found is None:
        raise InputError(f"nnU-Net has no planner {name!r}. Its default is ExperimentPlanner.")
    return found


def preprocess_case(
    case: Case,
    plans_file: str,
    configuration: str,
    dataset_json: Mapping[str, Any],
    scratch: str,
    folder: str,
) -> None:
    """Preprocess one case in ``scratch`` and move its files to ``folder``."""
    torch.set_num_threads(1)
    plans_manager = _plans_manager(plans_file, Path(plans_file).stat().st_mtime_ns)
    configuration_manager = plans_manager.get_configuration(configuration)
    preprocessor = configuration_manager.preprocessor_class(verbose=False)
    preprocessor.run_case_save(
        os.path.join(scratch, case.identifier),  # noqa: PTH118 - nnU-Net appends to a string
        [str(path) for path in case.images],
        str(case.label),
        plans_manager,
        configuration_manager,
        dataset_json,
    )
    for name in (f"{case.identifier}{suffix}" for suffix in SUFFIXES):
        (Path(scratch) / name).replace(Path(folder) / name)


@lru_cache(maxsize=2)
def _plans_manager(plans_file: str, _modified: int) -> PlansManager:
    return PlansManager(read_json(Path(plans_file)))
