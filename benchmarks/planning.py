"""Planning: time against stock nnU-Net, plans for several machines, and CPU plans kept to minutes.

``python -m benchmarks.planning --data SHARED_DATA`` needs ``msd_task04_hippocampus``,
``chaos_mr_t1dual`` and ``chaos_mr_t2spir`` in that folder. Takes about 70 minutes on 2 cores, most
of them the two trainings; run nothing else meanwhile. Finished parts are kept in ``--work``.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.pipeline import finished, ours, seconds, time_preparation
from benchmarks.report import ROOT, footer, provenance, table, write
from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import read_dataset_json
from nnmosaic.data_conversion.raw_dataset import training_cases
from nnmosaic.pipeline.speed import measure_speed
from nnmosaic.planners.plans_section import read_section
from nnmosaic.planners.resources import voxels_after_resampling
from nnmosaic.planners.worker_pool import call, worker_pool

WORKSPACE = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
CHAOS_LABELS = {"background": 0, "liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4}
CHAOS, CHAOS_PLAIN, HIPPOCAMPUS = "Dataset503_CHAOS", "Dataset504_CHAOSplain", "Dataset505_Hippo"
MINUTES = (10, 30)
MEMORY_GB = (4, 8, 24)
TRAINERS = ("nnUNetTrainerMosaic", "nnUNetTrainerSelfDisambiguation")


def link_dataset(folder: Path, parts: Mapping[str, Path], labels: Mapping[str, int]) -> None:
    """Write a raw dataset with the first channel of all cases of some data folders, as links."""
    number = 0
    for prefix, data in parts.items():
        for label in sorted((data / "labelsTr").glob("*.nii.gz")):
            number += 1
            case = label.name.removesuffix(".nii.gz")
            image = data / "imagesTr" / f"{case}_0000.nii.gz"
            image = image if image.is_file() else data / "imagesTr" / label.name
            for target, source in ((f"imagesTr/{prefix}{case}_0000.nii.gz", image),
                                   (f"labelsTr/{prefix}{case}.nii.gz", label)):  # fmt: skip
                (folder / target).parent.mkdir(parents=True, exist_ok=True)
                (folder / target).symlink_to(source.resolve())
    content = {
        "channel_names": {"0": "MRI"},
        "labels": dict(labels),
        "numTraining": number,
        "file_ending": ".nii.gz",
    }
    write_json(content, folder / "dataset.json")


def prepare(data: Path, work: Path) -> None:
    """Write the raw datasets; subjects of the two CHAOS series are the same people."""
    for name in WORKSPACE:
        os.environ[name] = str(work / name)
        (work / name).mkdir(parents=True, exist_ok=True)
    raw = work / "nnUNet_raw"
    shutil.rmtree(raw)
    t1, t2 = data / "chaos_mr_t1dual", data / "chaos_mr_t2spir"
    for name, parts, labels in (
        ("Dataset513_T1", {"": t1}, CHAOS_LABELS),
        ("Dataset514_T2", {"": t2}, CHAOS_LABELS),
        (CHAOS_PLAIN, {"": t1, "t2_": t2}, CHAOS_LABELS),
        (HIPPOCAMPUS, {"": data / "msd_task04_hippocampus"},
         {"background": 0, "anterior": 1, "posterior": 2}),
    ):  # fmt: skip
        link_dataset(raw / name, parts, labels)
    for name in ("Dataset513_T1", "Dataset514_T2"):
        content = read_json(raw / name / "dataset.json")
        cases = [path.name.removesuffix(".nii.gz") for path in (raw / name / "labelsTr").iterdir()]
        content["subjects"] = {case: case.split("_")[-1] for case in sorted(cases)}
        write_json(content, raw / name / "dataset.json")
    seconds(ours("merge", "-d", "503", "-n", "CHAOS", "--sources", "513", "514"))


def make_plans(work: Path) -> dict[str, Any]:
    """Plan CHAOS for GPUs and for 30 CPU minutes, and train some steps of the CPU plan."""
    rows = []
    folder = work / "nnUNet_preprocessed" / CHAOS
    for gigabytes in MEMORY_GB:
        name = f"plans_{gigabytes}"
        options = ("--memory_gb", str(gigabytes), "-overwrite_plans_name", name)
        seconds(ours("plan", "-d", "503", *options))
        rows.append(_row(f"{gigabytes} GB", read_json(folder / f"{name}.json")))
    cpu = ("--device", "cpu", "--minutes", "30", "--folds", "1", "-overwrite_plans_name", "cpu")
    seconds(ours("plan_and_preprocess", "-d", "503", "-c", "3d_fullres", *cpu))
    plans = read_json(folder / "cpu.json")
    expected = read_section(plans).expected["3d_fullres"]
    short = ("--epochs", "1", "--iterations_per_epoch", "5", "--val_iterations_per_epoch", "1")
    shutil.rmtree(work / "nnUNet_results" / CHAOS, ignore_errors=True)
    peak = 0.0
    training = subprocess.Popen(ours("train", "503", "3d_fullres", "0", "-p", "cpu", *short))
    while not list((work / "nnUNet_results" / CHAOS).glob("*/fold_0/checkpoint_final.pth")):
        if training.poll() is not None:
            raise RuntimeError("The training of the CPU plan failed.")
        peak = max(peak, _peak_gb(training.pid))
        time.sleep(0.1)
    training.kill()  # the final validation of full images takes minutes and is not looked at
    training.wait()
    rows.append(
        {
            **_row("CPU, 30 min", plans),
            "expected_gb": expected["memory_gb"],
            "training_peak_gb": peak,
        }
    )
    return {"rows": rows}


def _peak_gb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    kilobytes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return float(kilobytes[0]) / 2**20 if kilobytes else 0.0


def _row(budget: str, plans: Mapping[str, Any]) -> dict[str, Any]:
    configuration = plans["configurations"]["3d_fullres"]
    return {
        "budget": budget,
        "spacing": configuration["spacing"],
        "patch": configuration["patch_size"],
        "batch": configuration["batch_size"],
        "features": configuration["architecture"]["arch_kwargs"]["features_per_stage"],
    }


def measure_methods(work: Path) -> dict[str, Any]:
    """Measure the memory of a training process with each trainer, on the CPU plan of CHAOS."""
    folder = work / "nnUNet_preprocessed" / CHAOS
    plans = read_json(folder / "cpu.json")
    gigabytes = {
        trainer: [measure_speed(plans, "3d_fullres", trainer, folder).memory_gb for _ in range(3)]
        for trainer in TRAINERS
    }
    return {"memory_gb": gigabytes}


def measure_workers(work: Path) -> dict[str, float]:
    """Return case -> bytes per voxel that its preprocessing adds to a worker process."""
    raw, folder = work / "nnUNet_raw" / CHAOS_PLAIN, work / "nnUNet_preprocessed" / CHAOS_PLAIN
    dataset, plans = read_dataset_json(raw), folder / "nnUNetPlans.json"
    voxels = voxels_after_resampling(
        read_json(folder / "dataset_fingerprint.json"), read_json(plans), "3d_fullres"
    )
    cases = training_cases(raw, dataset)
    scratch = work / "scratch"
    scratch.mkdir(exist_ok=True)
    result = {}
    for i in range(0, len(cases), 5):
        arguments = (
            cases[i],
            str(plans),
            "3d_fullres",
            dataset.content,
            str(scratch),
            str(scratch),
        )
        with worker_pool(1) as pool:
            before = pool.submit(_peak_bytes).result()
            pool.submit(call, "preprocess_case", *arguments).result()
            result[cases[i].identifier] = (pool.submit(_peak_bytes).result() - before) / voxels[
                cases[i].identifier
            ]
    shutil.rmtree(scratch)
    return result


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train_for(data: Path, work: Path, minutes: int) -> dict[str, Any]:
    """Train one fold of half-labelled hippocampus in so many minutes, and score unseen subjects."""
    files, output = work / "half_labelled", work / f"minutes_{minutes}"
    shutil.rmtree(output, ignore_errors=True)
    if not files.is_dir():
        make = str(ROOT / "examples" / "hippocampus" / "make_example.py")
        hippocampus = str(data / "msd_task04_hippocampus")
        subprocess.run(
            [sys.executable, make, "--data", hippocampus, "--output", str(files)], check=True
        )
    workspace = ("--workspace", str(output))
    for source in files.glob("Dataset*"):
        shutil.copytree(source, output / "nnUNet_raw" / source.name)
    seconds(ours("merge", "-d", "501", "-n", "Half", "--sources", "11", "12", *workspace))
    cpu = ("--device", "cpu", "--minutes", str(minutes), "--folds", "1")
    seconds(ours("plan_and_preprocess", "-d", "501", "-c", "3d_fullres", *cpu, *workspace))
    plans = read_json(output / "nnUNet_preprocessed" / "Dataset501_Half" / "nnUNetPlans.json")
    section = read_section(plans)
    start = time.perf_counter()
    seconds(ours("train", "501", "3d_fullres", "0", "--seed", "0", *workspace))
    took = time.perf_counter() - start
    predicted = output / "predicted"
    model = ("-d", "501", "-c", "3d_fullres", "-f", "0")
    images, test = str(files / "test" / "images"), files / "test"
    seconds(ours("predict", "-i", images, "-o", str(predicted), *model, *workspace))
    labels, declared = str(test / "labels"), str(test / "dataset.json")
    seconds(ours("evaluate", labels, str(predicted), "-djfile", declared))
    summary = read_json(predicted / "summary.json")
    return {
        "minutes": minutes,
        "network": _row("", plans)["features"],
        "settings": section.run_settings.given(),
        "expected_s": section.expected["3d_fullres"]["seconds_per_fold"],
        "took_s": took,
        "dice": {summary["labels"][key]: value["Dice"] for key, value in summary["mean"].items()
                 if key in summary["labels"]},
        "cases": len(summary["metric_per_case"]),
        **provenance(),
    }  # fmt: skip


SPEED_HEADER = ("data", "against", "stock, median s", "nnMosaic, median s", "ratio", "repeats")
BUDGET_HEADER = (
    "budget", "spacing (mm)", "patch", "batch", "features", "expected GB",
    "largest process of a training, GB",
)  # fmt: skip
FIT_HEADER = (
    "minutes", "features", "epochs x steps", "expected min", "took min", "ratio",
    "Dice anterior / posterior", "unseen cases",
)  # fmt: skip


def report(
    times: Mapping[str, Any],
    plans: Mapping[str, Any],
    methods: Mapping[str, Any],
    workers: Mapping[str, float],
    trainings: Sequence[Mapping[str, Any]],
    source: Mapping[str, Any],
) -> str:
    """Return the result page."""
    speed = [
        _speed_row(dataset, name, values, own["nnMosaic"])
        for dataset, own in times.items()
        for name, values in own.items()
        if name != "nnMosaic"
    ]
    budgets = [_budget_row(row) for row in plans["rows"]]
    fits = [_fit_row(row) for row in trainings]
    memory = methods["memory_gb"]
    factor = median(memory[TRAINERS[1]]) / median(memory[TRAINERS[0]])
    return (
        "# Planning\n\nMade by `python -m benchmarks.planning`.\n\n"
        "## Fingerprint, plan and preprocessing against stock nnU-Net (wall time)\n\n"
        f"{table(SPEED_HEADER, speed)}\n\n"
        "Plans and preprocessed arrays were compared and are equal.\n\n"
        "## CHAOS, T1 in-phase and T2-SPIR as two sources\n\n"
        f"{table(BUDGET_HEADER, budgets)}\n\n"
        "## Half-labelled hippocampus, one fold in some CPU minutes\n\n"
        f"{table(FIT_HEADER, fits)}\n\n"
        f"Memory of a training process, {TRAINERS[1]} / {TRAINERS[0]}: {factor:.3f}.\n\n"
        f"Preprocessing adds {min(workers.values()):.0f} to {max(workers.values()):.0f} bytes per "
        "voxel to a worker process (CHAOS).\n\n"
        f"Seed of trainings: 0. {footer(source)}\n"
    )


def _speed_row(
    dataset: str, name: str, stock_times: Sequence[float], our_times: Sequence[float]
) -> list[str]:
    theirs, mine = median(stock_times), median(our_times)
    return [
        dataset,
        name,
        f"{theirs:.1f}",
        f"{mine:.1f}",
        f"{mine / theirs:.3f}",
        str(len(stock_times)),
    ]


def _budget_row(row: Mapping[str, Any]) -> list[str]:
    return [
        row["budget"],
        _by(row["spacing"]),
        _by(row["patch"]),
        str(row["batch"]),
        f"{row['features'][0]} to {row['features'][-1]}",
        f"{row['expected_gb']:.2f}" if "expected_gb" in row else "-",
        f"{row['training_peak_gb']:.2f}" if "training_peak_gb" in row else "-",
    ]


def _fit_row(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["minutes"]),
        str(row["network"][0]),
        f"{row['settings']['epochs']} x {row['settings']['iterations_per_epoch']}",
        f"{row['expected_s'] / 60:.1f}",
        f"{row['took_s'] / 60:.1f}",
        f"{row['took_s'] / row['expected_s']:.3f}",
        " / ".join(f"{value:.3f}" for value in row["dice"].values()),
        str(row["cases"]),
    ]


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def main() -> None:
    """Measure what is not measured yet, write the tables and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("benchmark_work") / "planning")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    work = options.work.absolute()
    prepare(options.data, work)
    times = {
        name: finished(
            work / f"times_{name}.json",
            lambda dataset=dataset: time_preparation(work, dataset, options.repeats),
        )
        for name, dataset in (("hippocampus", HIPPOCAMPUS), ("CHAOS", CHAOS_PLAIN))
    }
    plans = finished(work / "plans.json", lambda: make_plans(work))
    workers = finished(work / "workers.json", lambda: measure_workers(work))
    methods = finished(work / "methods.json", lambda: measure_methods(work))
    trainings = [
        finished(work / f"minutes_{m}.json", lambda m=m: train_for(options.data, work, m))
        for m in MINUTES
    ]
    source = provenance()
    text = report(times, plans, methods, workers, trainings, source)
    content = {
        **source,
        "seconds": times,
        **plans,
        **methods,
        "worker_bytes_per_voxel": workers,
        "trainings": trainings,
    }
    write("planning", content, text)
    print(text)


if __name__ == "__main__":
    main()
