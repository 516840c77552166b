"""Scoring predictions against references, as a table and as nnU-Net's summary.json."""

import io
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import parse_dataset_json


def evaluate(
    references: Path,
    predictions: Path,
    dataset_file: Path,
    *,
    output: Path | None = None,
    allow_missing: bool = False,
) -> str:
    """Score a folder, write the summary, and return a table of Dice per class and source.

    Parameters
    ----------
    dataset_file : Path
        dataset.json of the references: says what was annotated in them.
    output : Path, optional
        Default: ``predictions / "summary.json"``.

    Raises
    ------
    InputError
        See `nnmosaic.trainers.masked_evaluation.evaluate_folder`.
    """
    dataset = parse_dataset_json(read_json(dataset_file), where=str(dataset_file))
    from nnmosaic.trainers.masked_evaluation import evaluate_folder

    summary = evaluate_folder(references, predictions, dataset, allow_missing=allow_missing)
    write_json(summary, output or predictions / "summary.json")
    return _table(summary)


def _table(summary: dict[str, Any]) -> str:
    from rich.console import Console
    from rich.table import Table

    sources = list(summary["per_source"])
    table = Table("class", "Dice", "cases", *(sources if len(sources) > 1 else ()))
    for key, mean in summary["mean"].items():
        cells = [
            f"{summary['per_source'][source]['mean'][key]['Dice']:.3f}"
            if key in summary["per_source"][source]["mean"]
            else "-"
            for source in (sources if len(sources) > 1 else ())
        ]
        name = summary["labels"].get(key, key)
        table.add_row(name, f"{mean['Dice']:.3f}", str(summary["n_cases"][key]), *cells)
    table.add_row("mean", f"{summary['foreground_mean']['Dice']:.3f}")
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return text.getvalue().rstrip()
