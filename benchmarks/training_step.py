"""Time and memory of a training step with each method, against plain nnU-Net on the same batches.

``python -m benchmarks.training_step --data MSD_FOLDER`` needs the hippocampus data of the Medical
Segmentation Decathlon (imagesTr, labelsTr). Takes about 6 minutes on 2 cores; run nothing else
meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.pipeline import COMPLETE, plan_for_cpu, prepare
from benchmarks.report import footer, provenance, table, write
from nnmosaic.data_conversion.atomic_write import read_json

STEPS, WARM_UP, MEMORY_STEPS, REPEATS = 60, 5, 6, 3
PLAIN = "plain nnU-Net"
ENTROPY = {"entropy": "conditional"}
VARIANTS: dict[str, dict[str, str] | None] = {
    PLAIN: None,
    "self-disambiguation": {},
    "with entropy": ENTROPY,
    "with entropy, source heads": {**ENTROPY, "source_heads": "true"},
    "with entropy, teacher": {**ENTROPY, "ema_teacher": "true"},
    "authors' losses and entropy": {"loss_form": "authors", "entropy": "full"},
}
# Odd numbers belong to a source that annotates "anterior", even ones to "posterior".
SOURCES = {
    "A": {"pattern": "[13579]$", "annotated": ["anterior"]},
    "P": {"pattern": "[02468]$", "annotated": ["posterior"]},
}


def make_trainer(work: Path, variant: str) -> Any:
    """Return a trainer of fold 0 of the CPU plan that is ready to train."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnmosaic.planners.plans_section import RunSettings
    from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    np.random.seed(0)
    folder = work / "nnUNet_preprocessed" / COMPLETE
    content = read_json(folder / "dataset.json")
    plans = {**read_json(folder / "nnUNetPlans.json"), "continue_training": False}
    options = VARIANTS[variant]
    cls: Any = nnUNetTrainer
    if options is not None:
        cls, content["partial_labels"] = nnUNetTrainerSelfDisambiguation, {"sources": SOURCES}
    trainer = cls(plans, "3d_fullres", 0, content, torch.device("cpu"))
    if options:
        trainer.request_settings(RunSettings(options=options))
    trainer.on_train_start()
    return trainer


def hide_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """Set to 0, in place, what the source of a sample does not annotate."""
    for i, key in enumerate(batch["keys"]):
        for level in batch["target"]:
            level[i][level[i] != (1 if int(key[-1]) % 2 else 2)] = 0
    return batch


def time_steps(work: Path) -> dict[str, dict[str, list[float]]]:
    """Time drawing a batch, and a step on the same batches, alternating between variants."""
    trainers = {name: make_trainer(work, name) for name in VARIANTS}
    batches = [hide_labels(next(trainers[PLAIN].dataloader_train)) for _ in range(8)]
    times: dict[str, dict[str, list[float]]] = {n: {"draw": [], "step": []} for n in VARIANTS}
    for step in range(WARM_UP + STEPS):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            next(trainer.dataloader_train)
            drawn = time.perf_counter()
            trainer.train_step(batches[step % len(batches)])
            if step >= WARM_UP:
                times[name]["draw"].append(drawn - start)
                times[name]["step"].append(time.perf_counter() - drawn)
    return times


def peak_gigabytes(work: Path, variant: str) -> float:
    """Return the peak memory of a process of its own that trains some steps."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--work", str(work)]
    run = subprocess.run(
        [*command, "--memory", variant], capture_output=True, text=True, check=True
    )
    return float(json.loads(run.stdout.splitlines()[-1]))


def train_for_memory(work: Path, variant: str) -> float:
    """Train some steps and return the peak memory of this process in GB."""
    import resource

    trainer = make_trainer(work, variant)
    for _ in range(MEMORY_STEPS):
        trainer.train_step(hide_labels(next(trainer.dataloader_train)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def report(
    times: dict[str, dict[str, list[float]]], memory: dict[str, list[float]], source: dict[str, Any]
) -> str:
    """Return the result page."""

    def ratio(values: Sequence[float], plain: Sequence[float]) -> str:
        return f"{median(values) / median(plain):.3f}"

    rows = [
        [
            name,
            f"{median(times[name]['step']):.4f}",
            ratio(times[name]["step"], times[PLAIN]["step"]),
            ratio(times[name]["draw"], times[PLAIN]["draw"]),
            f"{median(memory[name]):.3f}",
            ratio(memory[name], memory[PLAIN]),
        ]
        for name in VARIANTS
    ]
    header = ["variant", "step, median s", "step, ratio", "drawing a batch, ratio",
              "peak memory, GB", "memory, ratio"]  # fmt: skip
    return (
        "# Time and memory of a training step\n\n"
        "Made by `python -m benchmarks.training_step`: hippocampus, CPU plan, fp32, two half "
        f"labelled sources, seed 0. Steps: {STEPS} per variant on the same batches, alternating, "
        f"ratio of medians. Memory: of the whole process, median of {REPEATS}.\n\n"
        f"{table(header, rows)}\n\n{footer(source)}\n"
    )


def main() -> None:
    """Measure, write the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("benchmark_work") / "training_step")
    parser.add_argument("--memory", choices=tuple(VARIANTS), help="peak memory of one variant")
    options = parser.parse_args()
    work = options.work.absolute()
    os.environ["nnUNet_n_proc_DA"] = "0"  # batches are made in this process
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(work / name)
    if options.memory:
        print(json.dumps(train_for_memory(work, options.memory)))
        return
    prepare(options.data, work, 1)
    plan_for_cpu(work)
    memory: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(REPEATS):
        for name in VARIANTS:
            memory[name].append(peak_gigabytes(work, name))
    times = time_steps(work)
    source = provenance()
    text = report(times, memory, source)
    write("training_step", {**source, "seconds": times, "peak_gb": memory}, text)
    print(text)


if __name__ == "__main__":
    main()
