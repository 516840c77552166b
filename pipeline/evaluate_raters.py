"""Scoring predictions against several raters: tables and summary_raters.json."""

from pathlib import Path
from typing import Any

from rich.table import Table

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import parse_dataset_json
from nnmosaic.pipeline.text_table import as_text

SAMPLE_COLUMNS = {
    "number": "samples",
    "GED": "GED",
    "dice_soft": "soft Dice",
    "max_of_annotations": "best for annotation",
    "max_of_predictions": "best for sample",
    "match": "matched",
    "coverage": "coverage",
    "variance_ratio": "variance ratio",
}
"""Key in the summary -> heading."""


def evaluate_raters(
    references: Path, predictions: Path, dataset_file: Path, *, output: Path | None = None
) -> str:
    """Score a folder against each rater, write the summary, and return tables.

    Parameters
    ----------
    references, predictions : Path
        See `nnmosaic.trainers.multi_rater.evaluation.evaluate_raters`.
    dataset_file : Path
        dataset.json of the references: names the raters.
    output : Path, optional
        Default: ``predictions / "summary_raters.json"``.

    Raises
    ------
    InputError
        As `nnmosaic.trainers.multi_rater.evaluation.evaluate_raters` does.
    """
    dataset = parse_dataset_json(read_json(dataset_file), where=str(dataset_file))
    from nnmosaic.trainers.multi_rater import evaluation

    summary = evaluation.evaluate_raters(references, predictions, dataset)
    write_json(summary, output or predictions / "summary_raters.json")
    parts = [as_text(_rater_table(summary)), *_remarks(summary)]
    if "samples" in summary:
        parts.append(as_text(_sample_table(summary["samples"])))
    return "\n".join(parts)


def _rater_table(summary: dict[str, Any]) -> Table:
    scores = summary["raters"]
    one = "rank" if summary["identity"] == "exchangeable" else "rater"
    title = f"Mask of each {one}" if scores["personalised"] else f"One mask, each {one}"
    if one == "rank":
        title += " (no person)"
    table = Table(one, "Dice", "cases", f"other {one}s", title=title)
    for rater, dice in scores["Dice"].items():
        number = scores["n_cases"][rater]
        table.add_row(rater, f"{dice:.3f}" if number else "-", str(number), _others(summary, rater))
    table.add_row("mean", f"{scores['Dice_mean']:.3f}")
    if scores["personalised"]:
        table.add_row("best assignment", f"{scores['match']:.3f}")
    return table


def _others(summary: dict[str, Any], rater: str) -> str:
    """Return the mean Dice of a rater's annotations with those of the others."""
    pairs = summary["between_raters"].items()
    dice = [pair["Dice"] for names, pair in pairs if rater in names.split("/")]
    return f"{sum(dice) / len(dice):.3f}" if dice else "-"


def _remarks(summary: dict[str, Any]) -> list[str]:
    remarks = []
    if summary["raters"]["personalised"]:
        remarks.append(f"GED of the raters' masks: {summary['raters']['GED']:.3f}")
    if "identification" in summary:
        found = summary["identification"]
        low, high = found["swapped"]
        remarks.append(
            f"Rater identified by its mask: {found['score']:.3f} (by chance {found['chance']:.3f}, "
            f"with swapped names {low:.3f} to {high:.3f})"
        )
    if "calibration" in summary:
        names = {"ECE": "ECE", "ACE": "ACE", "dice_soft": "soft Dice"}
        scores = [f"{name} {summary['calibration'][key]:.3f}" for key, name in names.items()]
        kind = summary["calibration"]["of"].capitalize()
        remarks.append(f"{kind}: {', '.join(scores)}")
    if summary["not_predicted"]:
        remarks.append(f"Annotated, but not predicted: {len(summary['not_predicted'])} cases")
    return remarks


def _sample_table(scores: dict[str, Any]) -> Table:
    table = Table(*SAMPLE_COLUMNS.values(), title="Samples, all raters")
    number, *others = (scores[key] for key in SAMPLE_COLUMNS)
    table.add_row(str(number), *(f"{score:.3f}" for score in others))
    return table
