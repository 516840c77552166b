"""What the worker processes do: planning, and the work on one case. The only part that needs torch.

The command's own process never imports this module. It names the functions, and one server process
imports them once for all workers.
"""

import contextlib
import io
import json
import multiprocessing
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import nnunetv2
import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnmosaic.data_conversion.atomic_write import read_json, replacing
from nnmosaic.data_conversion.dataset_json import parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case
from nnmosaic.planners.mosaic_planner import (
    MosaicPlanner,
    MosaicPlannerResEncL,
    MosaicPlannerResEncM,
    MosaicPlannerResEncXL,
    SourceAwareMixin,
)
from nnmosaic.planners.plans_section import PlanningResult, read_section
from nnmosaic.planners.preprocessing import RATER_SUFFIXES, SUFFIXES, case_file, rater_folder
from nnmosaic.planners.rater_preprocessing import rater_preprocessor
from nnmosaic.planners.small_machine_planner import SMALLEST_PRESET_GB, SmallMachinePlanner

OWN_PLANNERS: dict[str, Any] = {
    planner.__name__: planner
    for planner in (
        MosaicPlanner, MosaicPlannerResEncM, MosaicPlannerResEncL, MosaicPlannerResEncXL
    )
}  # fmt: skip


def plan(
    dataset_name: str,
    *,
    planner: str | None = None,
    plans_name: str | None = None,
    memory_gb: float | None = None,
    memory_factor: float = 1.0,
    device: str | None = None,
    size: float = 1.0,
) -> PlanningResult:
    """Run a planner and return its plans; only nnU-Net's own planners write them to disk.

    Parameters
    ----------
    memory_factor
        As for `nnmosaic.planners.mosaic_planner.SourceAwareMixin`.
    size
        As for `nnmosaic.planners.small_machine_planner.SmallMachinePlanner`.

    Raises
    ------
    InputError
        If there is no such planner.
    """
    options: dict[str, Any] = {} if plans_name is None else {"plans_name": plans_name}
    if memory_gb is not None:
        options["gpu_memory_target_in_gb"] = memory_gb
    small = device == "cpu" or (memory_gb is not None and memory_gb < SMALLEST_PRESET_GB)
    planner_class = OWN_PLANNERS.get(planner or "MosaicPlanner") or _nnunet_planner(str(planner))
    if planner is None and small:
        planner_class = SmallMachinePlanner
        options.update(device=device or "cuda", size=size)
    if issubclass(planner_class, SourceAwareMixin):
        options["memory_factor"] = memory_factor
    if os.environ.get("nnUNet_n_proc_DA") == "0":
        # nnU-Net's planners pass the number to torch.set_num_threads, which refuses 0. They run in
        # a worker process, so the setting of the command itself stays.
        os.environ["nnUNet_n_proc_DA"] = "1"
    if "fork" in multiprocessing.get_all_start_methods():
        # nnU-Net lists the files of a dataset with 12 processes, which takes ten times as long in
        # the way that this worker was started.
        multiprocessing.set_start_method("fork", force=True)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        used = planner_class(dataset_name, **options)
        # As it is read from the file later: nnU-Net's planners leave tuples in it.
        plans: dict[str, Any] = json.loads(json.dumps(used.plan_experiment()))
        is_ours = isinstance(used, SourceAwareMixin)
        return PlanningResult(
            plans,
            tuple(used.decisions) if is_ours else (),
            _network_sizes(plans, used if is_ours else None),
            output.getvalue(),
        )


def describe(plans: dict[str, Any]) -> PlanningResult:
    """Return plans as they are, with the decisions that they hold and the sizes of networks."""
    decisions = read_section(plans).decisions
    return PlanningResult(plans, decisions, _network_sizes(plans, None), "")


def _network_sizes(
    plans: dict[str, Any], planner: SourceAwareMixin | None
) -> dict[str, dict[str, float]]:
    """Return configuration -> parameters of the network, and expected memory on a GPU."""
    content = read_json(Path(nnUNet_preprocessed) / plans["dataset_name"] / "dataset.json")
    manager = PlansManager(plans)
    labels = manager.get_label_manager(content)
    sizes: dict[str, dict[str, float]] = {}
    for name in plans["configurations"]:
        configuration = manager.get_configuration(name)
        with torch.device("meta"):
            network = get_network_from_plans(
                configuration.network_arch_class_name,
                configuration.network_arch_init_kwargs,
                configuration.network_arch_init_kwargs_req_import,
                determine_num_input_channels(manager, configuration, content),
                labels.num_segmentation_heads,
                allow_init=False,
            )
        sizes[name] = {"parameters": sum(p.numel() for p in network.parameters())}
        has_estimate = hasattr(network, "compute_conv_feature_map_size")
        if planner is not None and planner.plans_for_gpu and has_estimate:
            values = network.compute_conv_feature_map_size(configuration.patch_size)
            resolved = configuration.configuration
            sizes[name]["memory_gb"] = planner.expected_memory_gb(values, resolved)
    return sizes


def _nnunet_planner(name: str) -> Any:
    folder = str(Path(nnunetv2.__path__[0]) / "experiment_planning")
    found = recursive_find_python_class(folder, name, "nnunetv2.experiment_planning")
    if found is None:
        known = ", ".join(OWN_PLANNERS)
        raise InputError(f"There is no planner {name!r}: neither among {known}, nor in nnU-Net.")
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
    with replacing(case_file(scratch, os.getpid())) as note:  # whole, whenever this one is killed
        note.write_text(case.identifier, encoding="utf-8")
    plans_manager = _plans_manager(plans_file, Path(plans_file).stat().st_mtime_ns)
    configuration_manager = plans_manager.get_configuration(configuration)
    preprocessor_class = configuration_manager.preprocessor_class
    raters = parse_dataset_json(dataset_json).raters
    if raters:
        preprocessor = rater_preprocessor(preprocessor_class, case, raters)
    else:
        preprocessor = preprocessor_class(verbose=False)
    preprocessor.run_case_save(
        os.path.join(scratch, case.identifier),  # noqa: PTH118 - nnU-Net appends to a string
        [str(path) for path in case.images],
        str(case.label),
        plans_manager,
        configuration_manager,
        dataset_json,
    )
    if raters:
        own = f"{case.identifier}_raters"
        preprocessor.save_raters(Path(scratch) / own, configuration_manager.patch_size)
        for suffix in RATER_SUFFIXES:
            target = rater_folder(folder) / f"{case.identifier}{suffix}"
            (Path(scratch) / f"{own}{suffix}").replace(target)
    for name in (f"{case.identifier}{suffix}" for suffix in SUFFIXES):
        (Path(scratch) / name).replace(Path(folder) / name)


@lru_cache(maxsize=2)
def _plans_manager(plans_file: str, _modified: int) -> PlansManager:
    return PlansManager(read_json(Path(plans_file)))
