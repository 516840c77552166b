"""Scoring predictions against references: tables, nnU-Net's summary.json, and a figure."""

from pathlib import Path
from typing import Any

from rich.table import Table

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import DatasetJson, parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.text_table import as_text

TITLES = {
    "not_annotated": "Where not annotated",
    "ignored_voxels": "Annotated classes at ignored voxels",
}


def evaluate(
    references: Path,
    predictions: Path,
    dataset_file: Path,
    *,
    full_references: Path | None = None,
    output: Path | None = None,
    allow_missing: bool = False,
) -> str:
    """Score a folder, write the summary, and return a table of Dice per class and source.

    With ``partial_labels`` a second table shows the classes where they were not annotated, and
    a figure, ``validation.png``, appears beside the summary.

    Parameters
    ----------
    dataset_file : Path
        dataset.json of the references: says what was annotated in them.
    full_references : Path, optional
        Complete label maps, for what was not annotated.
    output : Path, optional
        Default: ``predictions / "summary.json"``.

    Raises
    ------
    InputError
        If the full references cannot be used, or as
        `nnmosaic.trainers.masked_evaluation.evaluate_folder` does.
    """
    dataset = parse_dataset_json(read_json(dataset_file), where=str(dataset_file))
    if full_references is not None:
        _check_full(full_references, references, dataset, dataset_file)
    from nnmosaic.trainers.masked_evaluation import evaluate_folder
    from nnmosaic.trainers.validation_figure import write_figure

    summary = evaluate_folder(
        references,
        predictions,
        dataset,
        full_references=full_references,
        allow_missing=allow_missing,
    )
    output = output or predictions / "summary.json"
    write_json(summary, output)
    if dataset.partial_labels is None:
        return _table(summary)
    write_figure(summary, output.parent, file_ending=dataset.file_ending)
    warnings = [f"Warning: {warning}" for warning in summary["warnings"]]
    tables = [_table(summary)]
    tables += [_unlabelled_table(summary, kind) for kind in TITLES if summary[kind]]
    return "\n".join([*tables, *warnings])


def _check_full(full: Path, references: Path, dataset: DatasetJson, dataset_file: Path) -> None:
    if dataset.partial_labels is None:
        raise InputError(
            f"{dataset_file} declares no partial_labels, so there is nothing that --full could "
            "score besides. Leave it out, or give it as the references."
        )
    ending = dataset.file_ending
    if not any((full / path.name).is_file() for path in references.glob(f"*{ending}")):
        raise InputError(
            f"{full} has no {ending} file in common with {references}. Give the folder of the "
            "complete label maps, with the same names, or leave --full out."
        )


def _table(summary: dict[str, Any]) -> str:
    from nnmosaic.trainers.masked_evaluation import names_of

    sources = list(summary["per_source"])
    table = Table("class", "Dice", "cases", *(sources if len(sources) > 1 else ()))
    for key, name in names_of(summary).items():
        cells = [
            f"{summary['per_source'][source]['mean'][key]['Dice']:.3f}"
            if key in summary["per_source"][source]["mean"]
            else "-"
            for source in (sources if len(sources) > 1 else ())
        ]
        dice = f"{summary['mean'][key]['Dice']:.3f}"
        table.add_row(name, dice, str(summary["n_cases"][key]), *cells)
    table.add_row("mean", f"{summary['foreground_mean']['Dice']:.3f}")
    return as_text(table)


def _unlabelled_table(summary: dict[str, Any], kind: str) -> str:
    from nnmosaic.trainers.validation_figure import volume_text

    table = Table(
        "class", "source", "cases", "predicted mL", "full references", "Dice", "recall",
        "false positive mL", title=f"{TITLES[kind]} (mean per case)",
    )  # fmt: skip
    for source, row in summary[kind].items():
        for key, score in row.items():
            known: list[str] = []
            if "full_cases" in score:
                known = [str(score["full_cases"]), f"{score['Dice']:.3f}", f"{score['recall']:.3f}"]
                known.append(volume_text(score["false_positive_ml"]))
            cases, volume = str(score["cases"]), volume_text(score["predicted_ml"])
            table.add_row(summary["labels"][key], source, cases, volume, *known)
    return as_text(table)
