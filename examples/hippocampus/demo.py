"""The whole pipeline on the embedded example, from two half-labelled datasets to a scored test set.

Runs the commands that a user would type, prints each one, and compares with plain nnU-Net, which
learns every structure that a source does not annotate as background.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.pipeline.cli import main

EXAMPLE = Path(__file__).parent
SOURCES = ("Dataset011_Anterior", "Dataset012_Posterior")
OURS, PLAIN = "nnUNetTrainerSelfDisambiguation", "nnUNetTrainerMosaic"
DATASET, CONFIGURATION = "501", "3d_fullres"
FOLDS = ("0", "1", "2", "3", "4")


class Demo:
    """The commands on one pair of sources and one test set, with the seconds that each stage took.

    Parameters
    ----------
    data : Path
        Holds the two sources and ``test``; see make_example.py.
    output : Path
        Emptied first.
    settings : sequence of str
        Flags of the train command.
    """

    def __init__(self, data: Path, output: Path, settings: Sequence[str], device: str) -> None:
        self.data, self.output, self.settings, self.device = data, output, settings, device
        self.seconds: dict[str, float] = {}
        if output.is_dir() and any(output.iterdir()) and not (output / "workspace").is_dir():
            sys.exit(f"{output} has other files than this demo's. Name a new folder with --output.")
        shutil.rmtree(output, ignore_errors=True)
        for source in SOURCES:
            shutil.copytree(data / source, output / "workspace" / "nnUNet_raw" / source)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds inside to a stage."""
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 1)

    def command(self, *arguments: str) -> None:
        """Print and run one nnmosaic command."""
        if arguments[0] != "evaluate":
            arguments = (*arguments, "--workspace", str(self.output / "workspace"))
        print("\n$ nnmosaic", *arguments, flush=True)
        code = main(arguments)
        if code != 0:
            sys.exit(code)

    def prepare(self) -> None:
        """Merge, check, plan and preprocess."""
        with self.stage("merge"):
            self.command("merge", "-d", DATASET, "-n", "Hippocampus", "--sources", "11", "12")
        with self.stage("doctor"):
            self.command("doctor", "-d", DATASET)
        with self.stage("plan_and_preprocess"):
            device = ("--device", self.device)
            self.command("plan_and_preprocess", "-d", DATASET, "-c", CONFIGURATION, *device)

    def train_and_score(self, trainer: str, folds: Sequence[str], prefix: str = "") -> Any:
        """Train the folds, predict the test images with all of them, and return the summary."""
        device = ("--device", self.device)
        for fold in folds:
            with self.stage(f"{prefix}train"):
                flags = ("-tr", trainer, "--seed", fold, *self.settings, *device)
                self.command("train", DATASET, CONFIGURATION, fold, *flags)
        predictions = self.output / f"{prefix}predictions"
        model = ("-d", DATASET, "-c", CONFIGURATION, "-tr", trainer, "-f", *folds)
        folders = ("-i", str(self.data / "test" / "images"), "-o", str(predictions))
        with self.stage(f"{prefix}predict"):
            self.command("predict", *folders, *model, *device)
        references, content = self.data / "test" / "labels", self.data / "test" / "dataset.json"
        with self.stage(f"{prefix}evaluate"):
            self.command("evaluate", str(references), str(predictions), "-djfile", str(content))
        return read_json(predictions / "summary.json")


def scores(summary: Any) -> dict[str, Any]:
    """Return mean Dice and Dice per class by name."""
    per_class = {
        name: round(summary["mean"][label]["Dice"], 4) for label, name in summary["labels"].items()
    }
    return {
        "mean_dice": round(summary["foreground_mean"]["Dice"], 4),
        "dice_per_class": per_class,
    }


def run(
    data: Path, output: Path, settings: Sequence[str], folds: Sequence[str], device: str
) -> dict[str, Any]:
    """Run everything and return (and write) ``summary.json``."""
    demo = Demo(data, output, settings, device)
    demo.prepare()
    ours = scores(demo.train_and_score(OURS, folds))
    baseline = scores(demo.train_and_score(PLAIN, folds[:1], "baseline_"))
    summary = {
        **ours,
        "baseline_missing_as_background": baseline,
        "seconds_per_stage": demo.seconds,
        "training": " ".join(settings),
        "seeds": [int(fold) for fold in folds],
        "test_cases": len(list((data / "test" / "images").glob("*.nii.gz"))),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
    }
    write_json(summary, output / "summary.json")
    return summary


def show(summary: dict[str, Any]) -> None:
    """Print the final table."""
    from rich.console import Console
    from rich.table import Table

    plain = summary["baseline_missing_as_background"]
    columns = ("class", f"nnMosaic, {len(summary['seeds'])} folds", "plain nnU-Net, 1 fold")
    table = Table(*columns, title="Dice on unseen cases")
    for name, dice in summary["dice_per_class"].items():
        table.add_row(name, f"{dice:.3f}", f"{plain['dice_per_class'][name]:.3f}")
    table.add_row("mean", f"{summary['mean_dice']:.3f}", f"{plain['mean_dice']:.3f}")
    console = Console(width=100)
    console.print(table)
    console.print(f"{sum(summary['seconds_per_stage'].values()):.0f} s in all:")
    console.print(json.dumps(summary["seconds_per_stage"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=EXAMPLE)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--epochs", default="5")
    parser.add_argument("--iterations_per_epoch", default="60")
    parser.add_argument("--folds", nargs="+", choices=FOLDS, default=FOLDS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    flags = ["--epochs", options.epochs, "--iterations_per_epoch", options.iterations_per_epoch]
    result = run(options.data, options.output, flags, options.folds, options.device)
    from overlays import draw_overlays  # not at the top: worker processes import this file

    figures = options.output / "overlays"
    draw_overlays(options.data / "test", options.output / "predictions", figures)
    show(result)
    print(f"Figures: {figures}; numbers: {options.output / 'summary.json'}")
