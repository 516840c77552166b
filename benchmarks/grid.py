"""Grids of trainings that can be stopped and go on: one JSON file per run, and how they compare."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import provenance
from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import parse_dataset_json

WORKSPACE = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
RESAMPLES = 2000
BEGUN, FINAL = "training.json", "checkpoint_final.pth"
"""In the folder of a training: what was asked for and what attempts that were ended had taken; the
weights at the end."""


@dataclass(frozen=True)
class Training:
    """One training on the CPU, and the images it predicts.

    Attributes
    ----------
    dataset, configuration, fold
        What is trained on; the plans are those in the preprocessed folder.
    trainer, options
        How.
    budget : mapping
        "epochs", "iterations_per_epoch" and perhaps "batch_size".
    test : Path
        Folder with imagesTs, labelsTs and dataset.json.
    pretrained : Path or None
        Checkpoint of a model that it begins with.
    """

    dataset: str
    configuration: str
    trainer: str
    budget: Mapping[str, int]
    test: Path
    options: Mapping[str, str] = field(default_factory=dict)
    fold: int | str = "all"
    pretrained: Path | None = None


def parser_of(
    description: str | None, settings: Sequence[str], *, seeds: Sequence[int], run: Sequence[str]
) -> argparse.ArgumentParser:
    """Return the command line of a grid; ``run`` names what makes a single run."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("benchmark_work/self_disambiguation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--only", nargs="+", choices=tuple(settings), default=tuple(settings))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only the page, of finished runs")
    parser.add_argument("--one", nargs=len(run), metavar=tuple(run), help="a single run")
    return parser


def use_workspace(work: Path) -> None:
    """Set nnU-Net's variables, before it is imported."""
    for name in WORKSPACE:
        os.environ[name] = str(work / name)
        (work / name).mkdir(parents=True, exist_ok=True)


def command(*arguments: str) -> None:
    """Run an nnMosaic command."""
    run = [sys.executable, "-m", "nnmosaic.pipeline.cli", *arguments]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)


def link(source: Path, target: Path) -> None:
    """Make a link to a file, and the folder that it is in."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())


def preprocess_with_one_plan(
    preprocessed: Path, folders: Sequence[str], configuration: str, plans: Any = None
) -> None:
    """Preprocess datasets, all with these plans; without any with the CPU plan of the first."""
    for name in folders:
        flags = ["-d", name, "-c", configuration]
        if plans is None:
            command("plan_and_preprocess", *flags, "--device", "cpu")
            plans = read_json(preprocessed / name / "nnUNetPlans.json")
        else:
            (preprocessed / name).mkdir(parents=True, exist_ok=True)
            plans_of_it = {**plans, "dataset_name": name}
            write_json(plans_of_it, preprocessed / name / "nnUNetPlans.json")
            command("plan_and_preprocess", *flags, "--keep_plans")


# ------------------------------------------------------------------ one run


def train_and_predict(
    training: Training, seed: int, output: Path, *, probabilities: bool = False
) -> Path:
    """Train, predict the test images without mirroring, and return the folder with label maps.

    Classes have the numbers of the test images, which a merged dataset may have changed. The same
    training goes on from its last checkpoint if it was ended before.
    """
    import torch

    import benchmarks.baselines  # noqa: F401 - registers the peers
    from nnmosaic.pipeline.predict import predict
    from nnmosaic.pipeline.train import load_pretrained
    from nnmosaic.planners.plans_section import RunSettings
    from nnmosaic.trainers.lookup import trainer_class

    checkpoint = _begin(output, f"{training}, seed {seed}")
    goes_on = checkpoint is not None and checkpoint.name != FINAL
    folder = Path(os.environ["nnUNet_preprocessed"]) / training.dataset
    os.environ["nnUNet_results"] = str(output)
    plans = {**read_json(folder / "nnUNetPlans.json"), "continue_training": goes_on}
    content = read_json(folder / "dataset.json")
    trainer: Any = trainer_class(training.trainer)(
        plans, training.configuration, training.fold, content, torch.device("cpu")
    )
    settings = RunSettings(
        epochs=training.budget["epochs"],
        iterations_per_epoch=training.budget["iterations_per_epoch"],
        val_iterations_per_epoch=1,
        batch_size=training.budget.get("batch_size"),
        seed=seed,
        options=dict(training.options) or None,
    )
    trainer.request_settings(settings)
    if training.pretrained is not None:
        load_pretrained(trainer, training.pretrained)
    if goes_on:
        trainer.load_checkpoint(str(checkpoint))
    if goes_on or checkpoint is None:
        trainer.run_training()
    shutil.rmtree(output / "predictions", ignore_errors=True)
    predict(
        training.test / "imagesTs", output / "predictions", Path(trainer.output_folder_base),
        folds=[training.fold], mirroring=False, save_probabilities=probabilities, device="cpu",
        workers=1,
    )  # fmt: skip
    numbers = read_json(training.test / "dataset.json")["labels"]
    _renumber(output / "predictions", content["labels"], numbers)
    return output / "predictions"


def _begin(output: Path, asked: str) -> Path | None:
    """Return the checkpoint with which a training goes on or ends, or empty its folder.

    One that has ended serves again at the same commit only.
    """
    record = read_json(output / BEGUN) if (output / BEGUN).is_file() else {}
    seconds, commits, now = 0.0, [], provenance()["commit"]
    found = [*output.glob(f"*/*/*/{FINAL}"), *output.glob("*/*/*/checkpoint_latest.pth")]
    same = record.get("asked") == asked and bool(found)
    if same and (found[0].name != FINAL or record["commits"] == [now]):
        seconds = record["seconds"] + max(0.0, found[0].stat().st_mtime - record["started"])
        commits = record["commits"]
    else:
        found = []
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
    commits = list(dict.fromkeys([*commits, now]))
    begun = {"asked": asked, "seconds": seconds, "commits": commits, "started": time.time()}
    write_json(begun, output / BEGUN)
    return found[0] if found else None


def _renumber(folder: Path, old: Mapping[str, int], new: Mapping[str, int]) -> None:
    """Give the classes in label maps the numbers of another dataset, which must have them all."""
    import SimpleITK

    if missing := old.keys() - new.keys() - {"ignore"}:
        raise ValueError(f"The test images have no class {', '.join(sorted(missing))}.")
    table = np.arange(256, dtype=np.uint8)
    for name in old.keys() - {"ignore"}:
        table[old[name]] = new[name]
    if (table == np.arange(256)).all():
        return
    for path in folder.glob("*.nii.gz"):
        image = SimpleITK.ReadImage(str(path))
        renumbered = SimpleITK.GetImageFromArray(table[SimpleITK.GetArrayFromImage(image)])
        renumbered.CopyInformation(image)
        SimpleITK.WriteImage(renumbered, str(path), True)


def scores(predictions: Path, test: Path) -> dict[str, dict[str, list[float]]]:
    """Return case -> class -> [Dice, TP, FN] of predicted test images."""
    from nnmosaic.trainers.masked_evaluation import evaluate_folder

    dataset = parse_dataset_json(read_json(test / "dataset.json"))
    summary = evaluate_folder(test / "labelsTs", predictions, dataset)
    names = summary["labels"]
    return {
        Path(case["reference_file"]).name.removesuffix(dataset.file_ending): {
            names[key]: [case["metrics"][key][metric] for metric in ("Dice", "TP", "FN")]
            for key in names
        }
        for case in summary["metric_per_case"]
    }


def what_it_took(start: float, *outputs: Path) -> dict[str, Any]:
    """Return seconds since ``start``, threads and provenance, for the file of a run.

    Of trainings to ``outputs`` that went on, what they had taken until the checkpoint is added, and
    the commits of all attempts are named.
    """
    import torch

    source, seconds = provenance(), time.perf_counter() - start
    begun = [read_json(output / BEGUN) for output in outputs]
    commits = dict.fromkeys([*(c for of in begun for c in of["commits"]), source["commit"]])
    seconds += sum(of["seconds"] for of in begun)
    source["commit"] = ", then ".join(commits)
    return {"seconds": round(seconds, 1), "threads": torch.get_num_threads(), **source}


# ------------------------------------------------------------------ all runs


def make_missing(module: str, runs: Mapping[Path, Sequence[str]], work: Path, *, jobs: int) -> None:
    """Make every run whose file is missing, ``python -m MODULE --one *run``, ``jobs`` at a time.

    Raises
    ------
    RuntimeError
        At the end, if a run failed.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    own_threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    environment = {**os.environ, **own_threads, "nnUNet_n_proc_DA": "0"}

    def make(item: tuple[Path, Sequence[str]]) -> bool:
        path, run = item
        log = work / "logs" / f"{path.stem}.log"
        log.parent.mkdir(exist_ok=True)
        process = [sys.executable, "-m", module, "--work", str(work), "--one", *run]
        with log.open("w") as output:
            code = subprocess.run(process, env=environment, stdout=output, stderr=output).returncode
        print(time.strftime("%H:%M:%S"), *run, "done" if code == 0 else f"FAILED, see {log}",
              flush=True)  # fmt: skip
        return code == 0

    missing = [(path, run) for path, run in runs.items() if not path.is_file()]
    with ThreadPoolExecutor(jobs) as pool:
        made = list(pool.map(make, missing))
    if not all(made):
        raise RuntimeError(f"{made.count(False)} of {len(made)} runs failed; run it again.")


def file_name(*words: object) -> str:
    """Return the name of a run's file."""
    safe = ("".join(c if c.isalnum() else "_" for c in str(word)) for word in words)
    return "__".join(safe) + ".json"


# ------------------------------------------------------------------ comparison


def mean_dice(runs: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return case -> Dice per class, mean over runs."""
    cases = runs[0]["dice_tp_fn"]
    return {
        case: np.mean(
            [[values[0] for values in run["dice_tp_fn"][case].values()] for run in runs], axis=0
        )
        for case in cases
    }


def difference_interval(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    subjects: Mapping[str, str],
    *,
    resample_runs: bool,
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval, over test subjects, of the difference in mean Dice.

    Parameters
    ----------
    first, second : sequence of run
        Equally many where they are resampled, in pairs, too.
    """
    one, other = ([mean_dice([run]) for run in runs] for runs in (first, second))
    cases = list(one[0])
    members: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        members.setdefault(subjects.get(case, case), []).append(i)
    groups = [np.array(indices) for indices in members.values()]
    # Rows: runs; columns: cases.
    a, b = (
        np.array([[np.nanmean(run[c]) for c in cases] for run in runs]) for runs in (one, other)
    )
    rng = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        chosen = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        rows = rng.integers(len(a), size=len(a)) if resample_runs else slice(None)
        means.append(a[rows][:, chosen].mean() - b[rows][:, chosen].mean())
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def comparison_row(
    runs: Sequence[Mapping[str, Any]],
    reference: Sequence[Mapping[str, Any]],
    subjects: Mapping[str, str],
    *,
    resample_runs: bool = False,
) -> list[str]:
    """Return Dice per class, mean, range over runs, and points against the reference's runs."""
    dice, other = mean_dice(runs), mean_dice(reference)
    values = np.array(list(dice.values()))
    per_run = [float(np.mean(list(mean_dice([run]).values()))) for run in runs]
    change = ""
    if runs is not reference:
        bounds = difference_interval(runs, reference, subjects, resample_runs=resample_runs)
        low, high = (100 * bound for bound in bounds)
        points = 100 * (values.mean() - np.mean(list(other.values())))
        change = f"{points:+.2f} [{low:+.2f}, {high:+.2f}]"
    return [
        *(f"{value:.3f}" for value in values.mean(0)),
        f"{values.mean():.4f}",
        f"{min(per_run):.4f} - {max(per_run):.4f}",
        change,
    ]
