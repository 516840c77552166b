"""What both stages for many raters cost, in training and in prediction, against plain nnU-Net.

``python -m benchmarks.rater_cost`` after ``benchmarks.multi_rater`` has prepared its data. Every
measurement is a process of its own, in turn. Run nothing else meanwhile.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.grid import use_workspace
from benchmarks.multi_rater import FIRST, SECOND, SETTINGS
from benchmarks.report import footer, peak_gigabytes, provenance, table, write
from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.planners.plans_section import rater_plan
from nnmosaic.trainers.heap import keep_freed_memory

MEASURED = ("chase", "bubil", "complete")
REPEATS, SAMPLES = 3, 16
BATCH, STEPS = 4, 3
PLAIN, RATERS = "plain nnU-Net", "16 samples and all raters"
STAGES = {PLAIN: "nnUNetTrainerMosaic", "first stage": FIRST, "second stage": SECOND}
FEATURES = {"CPU plan": 1, "nnU-Net's width": 4}
"""Factor on the features of the CPU plan, which begins with 8."""
WIDEST = {"2d": 512, "3d_fullres": 320}
"""nnU-Net's."""


def _plan(work: Path, setting: str, factor: int) -> Any:
    """Return plans, configuration and dataset.json of a wider network."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    base = work / "nnUNet_preprocessed" / SETTINGS[setting].dataset
    name = SETTINGS[setting].source.configuration
    plans = read_json(base / "nnUNetPlans.json")
    architecture = plans["configurations"][name]["architecture"]["arch_kwargs"]
    wider = [min(WIDEST[name], factor * n) for n in architecture["features_per_stage"]]
    architecture["features_per_stage"] = wider
    manager = PlansManager(plans)
    return manager, manager.get_configuration(name), read_json(base / "dataset.json")


def _network(trainer: str, plan: Any, *, deep_supervision: bool) -> Any:
    import torch

    from nnmosaic.trainers.lookup import trainer_class

    manager, configuration, content = plan
    torch.manual_seed(0)
    return trainer_class(trainer).build_network_architecture(
        manager, configuration, len(content["channel_names"]), len(content["labels"]),
        deep_supervision,
    )  # fmt: skip


def step_once(work: Path, setting: str, stage: str, factor: int) -> dict[str, float]:
    """Return seconds (median) and memory (GB, of the steps alone) of passes there and back."""
    import torch

    from nnmosaic.trainers.multi_rater.loss import bound_loss, energy_set_loss, posterior_input

    plan = _plan(work, setting, factor)
    network = _network(STAGES[stage], plan, deep_supervision=stage != "second stage").train()
    manager, configuration, content = plan
    section = rater_plan(manager.plans)
    data = torch.randn(BATCH, len(content["channel_names"]), *configuration.patch_size)
    classes, shape = len(content["labels"]), (BATCH, len(section.raters))
    drawn = torch.randint(classes, (*shape, *data.shape[2:]))
    available = torch.ones(shape, dtype=torch.bool)
    samples = section.prior_samples if data.dim() == 4 else section.prior_samples_3d
    seconds, before = [], peak_gigabytes()
    for _ in range(STEPS):
        start = time.perf_counter()
        if stage == "first stage":
            noise = torch.randn(1 + samples, BATCH, section.latent)
            annotated = posterior_input(data, drawn, available, classes)
            found = network(data, annotated=annotated, noise=noise)
            probabilities = found.samples.softmax(2)
            terms = [f(probabilities, drawn, available) for f in (bound_loss, energy_set_loss)]
            answers = [*found.logits, *found.mean_opinion, *found.prior, *found.posterior, *terms]
        elif stage == "second stage":
            answers = [network(data, of_raters=True)]
        else:
            answers = network(data)
        sum(answer.square().sum() for answer in answers).backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": median(seconds), "gigabytes": peak_gigabytes() - before}


def predict_once(work: Path, setting: str, what: str, factor: int) -> dict[str, float]:
    """Return seconds and peak memory (GB) of predicting and writing one preprocessed case."""
    import torch
    from nnunetv2.inference.export_prediction import export_prediction_from_logits

    from nnmosaic.trainers.multi_rater.dataset import RaterDataset
    from nnmosaic.trainers.multi_rater.export import CaseWriter
    from nnmosaic.trainers.multi_rater.prediction import RaterPredictor
    from nnmosaic.trainers.multi_rater.wanted_masks import ALL, WantedMasks
    from nnmosaic.trainers.predictor import MosaicPredictor

    plan = manager, configuration, content = _plan(work, setting, factor)
    trainer = STAGES[PLAIN] if what == PLAIN else SECOND
    predictor = MosaicPredictor(
        perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    network = _network(trainer, plan, deep_supervision=False)
    axes = tuple(range(len(configuration.patch_size)))
    predictor.manual_initialization(
        network, manager, configuration, None, content, trainer, axes
    )  # fmt: skip
    base = work / "nnUNet_preprocessed" / SETTINGS[setting].dataset
    dataset = RaterDataset(str(base / configuration.data_identifier))
    case = sorted(dataset.identifiers)[0]
    data, _, _, properties = dataset.load_case(case)
    image = torch.from_numpy(data[:])
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            if what == PLAIN:
                logits = predictor.predict_sliding_window_return_logits(image).numpy()
                export_prediction_from_logits(
                    logits, properties, configuration, manager, content, f"{folder}/{case}",
                    num_threads_torch=torch.get_num_threads(),
                )  # fmt: skip
            else:
                raters = RaterPredictor(predictor, WantedMasks((ALL,), SAMPLES))
                writer = CaseWriter(Path(folder), case, predictor, properties, mean_of="samples")
                for kind, name, one in raters.logits(image, case):
                    writer.add(kind, name, one)
                writer.finish(raters.latents)
            seconds = time.perf_counter() - start
    return {"seconds": seconds, "gigabytes": peak_gigabytes()}


def measure(work: Path, setting: str, plan: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Return kind -> median seconds and gigabytes, in processes of their own, in turn."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(REPEATS):
        for kind in kinds:
            command = [sys.executable, "-m", "benchmarks.rater_cost", "--work", str(work)]
            task = "--predict" if RATERS in kinds else "--step"
            command += [task, setting, kind, str(FEATURES[plan])]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[kind].append(json.loads(run.stdout.splitlines()[-1]))
    return {
        kind: {name: median(run[name] for run in runs) for name in runs[0]}
        for kind, runs in found.items()
    }


def cost_table(work: Path, kinds: Sequence[str], found: dict[str, Any]) -> str:
    """Return a table of all settings and plans, and note what was measured in ``found``."""
    rows = []
    for setting, plan in product(MEASURED, FEATURES):
        costs = measure(work, setting, plan, kinds)
        found[f"{setting}, {plan}, {kinds[-1]}"] = costs
        plain = costs[PLAIN]
        for kind in kinds[1:]:
            seconds, gigabytes = (costs[kind][n] / plain[n] for n in ("seconds", "gigabytes"))
            rows.append([SETTINGS[setting].title, plan, kind, f"{plain['seconds']:.2f}",
                         f"{seconds:.2f}", f"{gigabytes:.2f}"])  # fmt: skip
    header = ["data", "network", "what", "plain, s", "time, ratio", "memory, ratio"]
    return table(header, rows)


def main() -> None:
    """Measure, write the tables and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("benchmark_work/multi_rater"))
    for task in ("--predict", "--step"):
        parser.add_argument(task, nargs=3, metavar=("SETTING", "WHAT", "FACTOR"))
    options = parser.parse_args()
    work = options.work.resolve()
    use_workspace(work)
    if options.predict or options.step:
        keep_freed_memory()
        once = predict_once if options.predict else step_once
        setting, what, factor = options.predict or options.step
        print(json.dumps(once(work, setting, what, int(factor))))
        return
    found: dict[str, Any] = {}
    source = provenance()
    text = (
        "# Cost of samples and raters\n\nMade by `python -m benchmarks.rater_cost`; medians of "
        f"{REPEATS} processes each. Peak memory; in training without what there was before the "
        f"steps.\n\n## Passes there and back, batch {BATCH}\n\n"
        f"{cost_table(work, list(STAGES), found)}\n\n## Prediction of one preprocessed case, "
        "all mirrored copies, with all files\n\n"
        f"{cost_table(work, [PLAIN, RATERS], found)}\n\n{footer(source)}\n"
    )
    write("rater_cost", {**source, "runs": found}, text)
    print(text)


if __name__ == "__main__":
    main()
