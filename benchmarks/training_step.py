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
from collections.abc import Callable, Mapping, Sequence
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
from benchmarks.report import footer, provenance, table, write

MEMORY_STEPS, REPEATS = 6, 3
PLAIN = "plain nnU-Net"
ENTROPY = {"entropy": "conditional"}
FEW_CASES = {"few_cases": "100000"}
"""As with few cases: with all, there are no masked passes."""
CONTEXT = "nnUNetTrainerContextReconstruction"
TEACHER = {"reconstruction_weight": "0.5"}
FULL_FORM = {**FEW_CASES, **TEACHER, "every_k": "1"}
VARIANTS: Mapping[str, Variant | None] = {
    PLAIN: None,
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


def peak_gigabytes(work: Path, variant: str) -> float:
    """Return the peak memory of a process of its own that trains some steps."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--work", str(work)]
    command += ["--memory", variant]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(run.stdout.splitlines()[-1]))


def measure_memory(work: Path) -> dict[str, list[float]]:
    """Return the peak memory of every variant, several times."""
    memory: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(REPEATS):
        for name in VARIANTS:
            memory[name].append(peak_gigabytes(work, name))
    return memory


def train_for_memory(work: Path, variant: str) -> float:
    """Train some steps and return the peak memory of this process in GB; Linux only."""
    trainer = start(make_trainer(work, VARIANTS[variant]))
    for _ in range(MEMORY_STEPS):
        trainer.train_step(half_labelled(next(trainer.dataloader_train)))
    # Not getrusage: what that returns includes the parent's memory at the time of the fork.
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(peak) / 2**20


def with_source(path: Path, measure: Callable[[], Any]) -> dict[str, Any]:
    """Return "values" and the "source" of what was measured, perhaps before; see `finished`."""
    found: dict[str, Any] = finished(path, lambda: {"values": measure(), "source": provenance()})
    return found


def report(steps: Mapping[str, Any], peaks: Mapping[str, Any]) -> str:
    """Return the result page."""
    times: Mapping[str, Sequence[float]] = steps["values"]
    memory: Mapping[str, Sequence[float]] = peaks["values"]
    rows = [
        [
            name,
            f"{median(times[name]):.4f}",
            f"{median(times[name]) / median(times[PLAIN]):.3f}",
            f"{median(memory[name]):.3f}",
            f"{median(memory[name]) / median(memory[PLAIN]):.3f}",
        ]
        for name in times
    ]
    header = ["variant", "step, median s", "ratio", "peak memory, GB", "ratio"]
    return (
        "# Time and memory of a training step\n\n"
        "Made by `python -m benchmarks.training_step`: hippocampus, CPU plan, fp32, seed 0; "
        "self-disambiguation has two half labelled sources. Time: "
        f"{STEPS} steps per variant on the same batches, in pairs, alternating, ratio of medians. "
        "Memory: of the whole process, the median of "
        f"{REPEATS}.\n\n{table(header, rows)}\n\nTimes: {footer(steps['source'])}\n\nMemory: "
        f"{footer(peaks['source'])}\n"
    )


def main() -> None:
    """Measure, write the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("benchmark_work") / "training_step")
    parser.add_argument("--memory", choices=tuple(VARIANTS), help="peak memory of one variant")
    options = parser.parse_args()
    work = options.work.absolute()
    if options.memory:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            os.environ[name] = str(work / name)
        print(json.dumps(train_for_memory(work, options.memory)))
        return
    if options.data is None:
        parser.error("--data is needed: the folder with imagesTr and labelsTr")
    prepare(options.data, work, 1)
    plan_for_cpu(work)
    steps = with_source(work / "steps.json", lambda: time_training_step(work, VARIANTS))
    peaks = with_source(work / "memory.json", lambda: measure_memory(work))
    text = report(steps, peaks)
    write("training_step", {"seconds": steps, "peak_gb": peaks}, text)
    print(text)


if __name__ == "__main__":
    main()
