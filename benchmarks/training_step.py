"""Time and memory of a training step with each method and its options, against nnU-Net.

``python -m benchmarks.training_step --data MSD_FOLDER`` needs the hippocampus data of the Medical
Segmentation Decathlon (imagesTr, labelsTr). Takes about 15 minutes on 2 cores; run nothing else
meanwhile. Finished parts are kept in ``--work``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.pipeline import (
    SELF_DISAMBIGUATION,
    STEPS,
    Variant,
    finished,
    half_labelled,
    make_trainer,
    plan_for_cpu,
    prepare,
    start,
    time_training_step,
)
from benchmarks.report import footer, peak_gigabytes, provenance, table, write

ALONE_STEPS, ALONE_WARM_UP, REPEATS = 20, 4, 3
PLAIN = "plain nnU-Net"
ENTROPY = {"entropy": "conditional"}
FEW_CASES = {"few_cases": "100000"}
"""As with few cases: with all, there are no masked passes."""
CONTEXT = "nnUNetTrainerContextReconstruction"
TEACHER = {"reconstruction_weight": "0.5"}
FULL_FORM = {**FEW_CASES, **TEACHER, "every_k": "1"}
VARIANTS: Mapping[str, Variant | None] = {
    PLAIN: None,
    "nnUNetTrainerMosaic": ("nnUNetTrainerMosaic", {}),
    "self-disambiguation": (SELF_DISAMBIGUATION, {}),
    "with entropy": (SELF_DISAMBIGUATION, ENTROPY),
    "with entropy and source heads": (SELF_DISAMBIGUATION, {**ENTROPY, "source_heads": "true"}),
    "with entropy and teacher": (SELF_DISAMBIGUATION, {**ENTROPY, "ema_teacher": "true"}),
    "authors' losses and entropy": (
        SELF_DISAMBIGUATION,
        {"loss_form": "authors", "entropy": "full"},
    ),
    "context reconstruction, few cases": (CONTEXT, FEW_CASES),
    "context reconstruction, few cases, with teacher": (CONTEXT, {**FEW_CASES, **TEACHER}),
    "context reconstruction, full form": (CONTEXT, FULL_FORM),
    "context reconstruction, full form without teacher": (CONTEXT, {**FEW_CASES, "every_k": "1"}),
    "context reconstruction, full form, half of the batch": (
        CONTEXT,
        {**FULL_FORM, "masked_fraction": "0.5"},
    ),
    "self-disambiguation and context, with teacher": (
        f"{SELF_DISAMBIGUATION}Context",
        {**FEW_CASES, **TEACHER},
    ),
}


def measure_alone(work: Path) -> dict[str, list[dict[str, float]]]:
    """Return peak memory (GB) and seconds of a step of every variant, several times.

    Each in a process of its own: how memory is allocated is set for a whole process.
    """
    command = [sys.executable, "-m", "benchmarks.training_step", "--work", str(work), "--alone"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(REPEATS):
        for name in VARIANTS:
            run = subprocess.run([*command, name], stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(run.stdout.splitlines()[-1]))
    return found


def train_alone(work: Path, variant: str) -> dict[str, float]:
    """Return the median seconds of a step, and the peak memory of this process (GB); Linux only."""
    trainer = start(make_trainer(work, VARIANTS[variant]))
    batches = [half_labelled(next(trainer.dataloader_train)) for _ in range(8)]
    times = []
    for step in range(0, ALONE_WARM_UP + ALONE_STEPS, 2):
        begin = time.perf_counter()
        for i in (step, step + 1):
            trainer.train_step(batches[i % len(batches)])
        times.append((time.perf_counter() - begin) / 2)
    return {"seconds": median(times[ALONE_WARM_UP // 2 :]), "gigabytes": peak_gigabytes()}


def with_source(path: Path, measure: Callable[[], Any]) -> dict[str, Any]:
    """Return "values" and the "source" of what was measured, perhaps before; see `finished`."""
    found: dict[str, Any] = finished(path, lambda: {"values": measure(), "source": provenance()})
    return found


def report(together: Mapping[str, Any], alone: Mapping[str, Any]) -> str:
    """Return the result page."""
    columns: list[Mapping[str, float]] = [
        {name: median(values) for name, values in together["values"].items()},
        *(
            {name: median(run[key] for run in runs) for name, runs in alone["values"].items()}
            for key in ("seconds", "gigabytes")
        ),
    ]
    rows = [
        [name, *(cell for c in columns for cell in (f"{c[name]:.3f}", f"{c[name] / c[PLAIN]:.3f}"))]
        for name in columns[0]
    ]
    header = ["variant", "step, s", "ratio", "step alone, s", "ratio", "peak memory, GB", "ratio"]
    return (
        "# Time and memory of a training step\n\n"
        "Made by `python -m benchmarks.training_step`: hippocampus, CPU plan, fp32, seed 0; "
        "self-disambiguation has two half labelled sources. Step: "
        f"{STEPS} steps per variant on the same batches, in pairs, alternating, all in one "
        "process, where all profit from memory that is kept: what the method costs. Alone: "
        f"{ALONE_STEPS} steps in a process of its own, where stock nnU-Net does not: what a user "
        f"waits. Memory: of that process. Both: the median of {REPEATS}, alternating. Ratios of "
        f"medians.\n\n{table(header, rows)}\n\nTogether: {footer(together['source'])}\n\nAlone: "
        f"{footer(alone['source'])}\n"
    )


def main() -> None:
    """Measure, write the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("benchmark_work") / "training_step")
    parser.add_argument("--alone", choices=tuple(VARIANTS), help="measure one variant")
    options = parser.parse_args()
    work = options.work.absolute()
    if options.alone:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            os.environ[name] = str(work / name)
        print(json.dumps(train_alone(work, options.alone)))
        return
    if options.data is None:
        parser.error("--data is needed: the folder with imagesTr and labelsTr")
    prepare(options.data, work, 1)
    plan_for_cpu(work)
    together = with_source(work / "together.json", lambda: time_training_step(work, VARIANTS))
    alone = with_source(work / "alone.json", lambda: measure_alone(work))
    text = report(together, alone)
    write("training_step", {"together": together, "alone": alone}, text)
    print(text)


if __name__ == "__main__":
    main()
