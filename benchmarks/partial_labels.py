"""Dice on unseen subjects after training on half-labelled sources, against plain nnU-Net.

``python -m benchmarks.partial_labels --data MSD_FOLDER`` splits the hippocampus data of the Medical
Segmentation Decathlon by subject (a quarter for testing; the others alternate between a source with
the anterior and one with the posterior part labelled) and runs the demo on it. Takes about 20
minutes on 2 cores. A finished result is not measured again: delete its JSON file first.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT, footer, provenance, table, write
from nnmosaic.data_conversion.atomic_write import read_json

EXAMPLE = ROOT / "examples" / "hippocampus"
MODEL = (
    "nnUNet_results/Dataset501_Hippocampus/nnUNetTrainerSelfDisambiguation__nnUNetPlans__3d_fullres"
)


def measure(data: Path, work: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Build the data, run the demo on it, and score fold 0 of both trainers alone as well."""
    full, output = work / "data", work / "output"
    _python(str(EXAMPLE / "make_example.py"), "--data", str(data), "--output", str(full))
    _python(str(EXAMPLE / "demo.py"), "--data", str(full), "--output", str(output), *settings)
    alone = work / "fold_0"
    model = str(output / "workspace" / MODEL)
    images, labels = str(full / "test" / "images"), str(full / "test" / "labels")
    command = ("-m", "nnmosaic.pipeline.cli")
    _python(*command, "predict", "-i", images, "-o", str(alone), "-m", model, "-f", "0")
    _python(
        *command, "evaluate", labels, str(alone), "-djfile", str(full / "test" / "dataset.json")
    )
    summary: dict[str, Any] = read_json(output / "summary.json")
    summary["fold_0_alone"] = _scores(read_json(alone / "summary.json"))
    return {**summary, **provenance()}


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True)


def _scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    means = {name: summary["mean"][key]["Dice"] for key, name in summary["labels"].items()}
    return {
        "mean_dice": round(summary["foreground_mean"]["Dice"], 4),
        "dice_per_class": {name: round(value, 4) for name, value in means.items()},
    }


def report(result: Mapping[str, Any]) -> str:
    """Return the result page."""
    plain = result["baseline_missing_as_background"]
    models = {
        "nnMosaic, 5 folds": result,
        "nnMosaic, fold 0": result["fold_0_alone"],
        "plain nnU-Net, fold 0": plain,
    }
    classes = list(result["dice_per_class"])
    rows = [
        [name, *(f"{s['dice_per_class'][c]:.3f}" for c in classes), f"{s['mean_dice']:.3f}"]
        for name, s in models.items()
    ]
    source = {key: result[key] for key in provenance()}
    return (
        "# Dice on unseen subjects, each source half labelled\n\n"
        "Made by `python -m benchmarks.partial_labels`. Both trainers see the same merged data, "
        "plan, folds, seeds and budget; plain nnU-Net learns what is not annotated as "
        "background.\n\n"
        f"{table(['model', *classes, 'mean'], rows)}\n\n"
        f"{result['test_cases']} test cases; training: `{result['training']}`, seeds "
        f"{result['seeds']} (one per fold); CPU plan.\n\n{footer(source)}\n"
    )


def main() -> None:
    """Measure where there is no result yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("benchmark_work") / "partial_labels")
    parser.add_argument("--epochs", default="8")
    parser.add_argument("--iterations_per_epoch", default="75")
    options = parser.parse_args()
    settings = ("--epochs", options.epochs, "--iterations_per_epoch", options.iterations_per_epoch)
    path = RESULTS / "partial_labels.json"
    result = read_json(path) if path.is_file() else measure(options.data, options.work, settings)
    text = report(result)
    write("partial_labels", result, text)
    print(text)


if __name__ == "__main__":
    main()
