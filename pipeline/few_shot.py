"""Training on few cases: the folds, and what came out of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.table import Table

from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.data_conversion.dataset_json import read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.text_table import as_text
from nnmosaic.pipeline.train import is_finished, model_folder
from nnmosaic.pipeline.workspace import Workspace
from nnmosaic.planners.few_shot import add_few_shot_folds, few_shot_folds

Fold = TypeVar("Fold", int | str, str)


def few_shot(workspace: Workspace, identifier: str, *, numbers: Sequence[int], draws: int) -> str:
    """Add few-shot folds to a preprocessed dataset and return which ones there are.

    Raises
    ------
    InputError
        See `add_few_shot_folds`.
    """
    folder = workspace.preprocessed / workspace.dataset(identifier)
    path = folder / "splits_final.json"
    folds = add_few_shot_folds(path, read_dataset_json(folder), numbers=numbers, draws=draws)
    table = Table("fold", "training cases", "draw")
    for fold, what in folds.items():
        table.add_row(str(fold), str(what["cases"]), str(what["draw"]))
    return (
        f"{as_text(table)}\nAll validate on the cases of fold 0. Train them like other folds. "
        "predict and find_best take them only where they are named with -f."
    )


def few_shot_report(
    workspace: Workspace,
    identifier: str,
    configuration: str,
    *,
    trainers: Sequence[str],
    plans_name: str,
) -> str:
    """Return mean Dice of the finished few-shot folds, by trainer and number of cases.

    Raises
    ------
    InputError
        If none is finished.
    """
    folder = workspace.preprocessed / workspace.dataset(identifier)
    dataset = read_dataset_json(folder)
    folds = few_shot_folds(folder / "splits_final.json")
    table = Table("training cases", "trainer", "mean Dice", "standard deviation", "draws")
    for number in sorted({what["cases"] for what in folds.values()}):
        for trainer in trainers:
            model = model_folder(workspace, identifier, configuration, trainer, plans_name)
            dice = {
                what["draw"]: _mean_dice(results)
                for fold, what in folds.items()
                if what["cases"] == number
                and is_finished(results := model / f"fold_{fold}", trainer, dataset)
            }
            if dice:
                values = list(dice.values())
                spread = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
                drawn = ", ".join(map(str, sorted(dice)))
                table.add_row(str(number), trainer, f"{np.mean(values):.4f}", spread, drawn)
    if not table.row_count:
        raise InputError(
            f"No few-shot fold of {folder.name} is trained with {', '.join(trainers)} and "
            f"{configuration}. Make folds with few_shot --cases, train them, and ask again."
        )
    return as_text(table)


def without_few_shot(folds: Sequence[Fold], preprocessed: Path) -> list[Fold]:
    """Return the folds that are not few-shot folds of a preprocessed dataset."""
    few = few_shot_folds(preprocessed / "splits_final.json")
    return [fold for fold in folds if str(fold) not in map(str, few)]


def folds_to_predict(
    workspace: Workspace, identifier: str, model: Path, checkpoint: str
) -> list[int | str]:
    """Return the trained folds of a model that are not few-shot folds; empty if none is trained.

    Raises
    ------
    InputError
        If all trained folds are few-shot folds.
    """
    from nnmosaic.trainers.predictor import available_folds

    trained = available_folds(model, checkpoint)
    kept = without_few_shot(trained, workspace.preprocessed / workspace.dataset(identifier))
    if trained and not kept:
        raise InputError(
            f"{model} has few-shot folds only: {', '.join(map(str, trained))}. Name those that are "
            "to predict with -f."
        )
    return kept


def _mean_dice(fold_folder: Path) -> float:
    summary = read_json(fold_folder / "validation" / "summary.json")
    return float(summary["foreground_mean"]["Dice"])
