"""Which trained configuration, or which two together, predict best in cross-validation.

nnU-Net's choice, with classes counted only where they were annotated, on the folds that are
finished, and with the uncertainty that so many subjects leave.
"""

import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import DatasetJson, read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.ensemble import average_cases, cases_with_probabilities
from nnmosaic.pipeline.few_shot import without_few_shot
from nnmosaic.pipeline.text_table import as_text
from nnmosaic.pipeline.train import is_finished, model_folder
from nnmosaic.pipeline.workspace import Workspace

logger = logging.getLogger(__name__)

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)
SEED = 12345


@dataclass(frozen=True)
class Model:
    """A trained configuration."""

    trainer: str
    plans_name: str
    configuration: str
    folder: Path
    folds: tuple[str, ...]

    def previous_stage(self) -> "Model | None":
        """Return the model whose predictions this one needs as input."""
        plans = read_json(self.folder / "plans.json")
        stage = plans["configurations"][self.configuration].get("previous_stage")
        if stage is None:
            return None
        folder = self.folder.with_name(f"{self.trainer}__{self.plans_name}__{stage}")
        return replace(self, configuration=stage, folder=folder)


@dataclass(frozen=True)
class Candidate:
    """One model, or two whose probabilities are averaged.

    Attributes
    ----------
    dice : ndarray, shape (cases, classes)
        NaN where a class was not annotated, or neither annotated nor predicted in the case.
    cases : list of str
    """

    models: tuple[Model, ...]
    dice: np.ndarray
    cases: list[str]

    @property
    def name(self) -> str:
        """Name of the model folder or folders."""
        return " + ".join(model.folder.name for model in self.models)


def find_best(
    workspace: Workspace,
    identifier: str,
    *,
    configurations: Sequence[str],
    trainers: Sequence[str],
    plans_names: Sequence[str],
    folds: Sequence[int | str] | None = None,
    allow_ensembling: bool = True,
) -> str:
    """Compare trained models on their validation cases and return a report.

    ``find_best.json`` is written to the results of the dataset.

    Parameters
    ----------
    folds : sequence of int, optional
        Default: all folds that are finished for every model.
    allow_ensembling : bool
        Also average two models each, where both were trained with ``--npz``.

    Raises
    ------
    InputError
        If there is no trained model, or no fold that all of them have finished.
    """
    dataset_name = workspace.dataset(identifier)
    dataset = read_dataset_json(workspace.preprocessed / dataset_name)
    models = [
        model
        for trainer, plans_name, configuration in product(trainers, plans_names, configurations)
        if (model := _model(workspace, identifier, trainer, plans_name, configuration, dataset))
    ]
    if not models:
        raise InputError(
            f"{workspace.results / dataset_name} has no finished fold of {', '.join(trainers)} "
            f"with {', '.join(configurations)}. Train one, or name others with -tr, -c and -p."
        )
    common = _common_folds(models, folds, workspace.preprocessed / dataset_name)
    references = workspace.preprocessed / dataset_name / "gt_segmentations"
    candidates = []
    for model in models:
        predictions = [model.folder / f"fold_{fold}" / "validation" for fold in common]
        candidates.append(_candidate((model,), predictions, references, dataset))
    for pair in combinations(models, 2) if allow_ensembling else ():
        output = workspace.results / dataset_name / "ensembles"
        if (ensemble := _ensemble(pair, common, output, references, dataset)) is not None:
            candidates.append(ensemble)
    rows = compare(candidates, dataset)
    best = max(range(len(rows)), key=lambda i: rows[i]["dice"])  # the first of equals: the simpler
    commands = _commands(candidates[best].models, common)
    content = {"folds": common, "models": rows, "best": rows[best]["model"], "commands": commands}
    write_json(content, workspace.results / dataset_name / "find_best.json")
    return _report(rows, best, commands, common, len(candidates[0].cases))


def compare(candidates: Sequence[Candidate], dataset: DatasetJson) -> list[dict[str, Any]]:
    """Return one row per candidate: Dice with its interval, and the difference to the best.

    Dice is the mean over classes of the mean over the cases that annotate the class. Intervals are
    95 % percentile bootstrap over subjects, the same resamples for all candidates.

    Raises
    ------
    InputError
        If they were not validated on the same cases.
    """
    for candidate in candidates[1:]:
        if different := sorted(set(candidate.cases) ^ set(candidates[0].cases)):
            raise InputError(
                f"{candidate.name} and {candidates[0].name} were not validated on the same cases: "
                f"{different[0]} is missing in one of them. Validate again with train --val, or "
                "name one model with -c, -tr and -p."
            )
    scores = np.array([_score(candidate.dice) for candidate in candidates])
    resampled = np.array(_bootstrap(candidates, dataset))
    best = int(np.argmax(scores))
    return [
        {
            "model": candidate.name,
            "dice": float(scores[i]),
            "interval": np.nanpercentile(resampled[:, i], INTERVAL).tolist(),
            "difference_to_best": float(scores[i] - scores[best]),
            "difference_interval": np.nanpercentile(
                resampled[:, i] - resampled[:, best], INTERVAL
            ).tolist(),
        }
        for i, candidate in enumerate(candidates)
    ]


def _score(dice: np.ndarray) -> float:
    annotated = dice[:, ~np.isnan(dice).all(axis=0)]
    return float(np.nanmean(annotated, axis=0).mean()) if annotated.size else float("nan")


def _bootstrap(candidates: Sequence[Candidate], dataset: DatasetJson) -> list[list[float]]:
    cases = candidates[0].cases
    members: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        members.setdefault(dataset.subject_of(case), []).append(i)
    groups = list(members.values())
    rng = np.random.default_rng(SEED)
    rows = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(groups), size=len(groups))
        index = np.concatenate([groups[i] for i in drawn])
        rows.append([_score(candidate.dice[index]) for candidate in candidates])
    return rows


def _model(
    workspace: Workspace,
    identifier: str,
    trainer: str,
    plans_name: str,
    configuration: str,
    dataset: DatasetJson,
) -> Model | None:
    folder = model_folder(workspace, identifier, configuration, trainer, plans_name)
    folds = tuple(
        fold.name.removeprefix("fold_")
        for fold in sorted(folder.glob("fold_*"))
        if fold.name != "fold_all" and is_finished(fold, trainer, dataset)
    )
    return Model(trainer, plans_name, configuration, folder, folds) if folds else None


def _common_folds(
    models: Sequence[Model], wanted: Sequence[int | str] | None, preprocessed: Path
) -> list[str]:
    for model in models:
        missing = sorted({str(fold) for fold in wanted or ()} - set(model.folds))
        if missing:
            raise InputError(
                f"{model.folder} has no finished fold {missing[0]}. Train it, or leave -f out to "
                "compare the folds that all models have."
            )
    common = set.intersection(*(set(model.folds) for model in models))
    if wanted:
        folds = sorted(common & {str(fold) for fold in wanted})
    else:
        folds = without_few_shot(sorted(common), preprocessed)
    if not folds:
        listed = "; ".join(f"{model.folder.name}: {', '.join(model.folds)}" for model in models)
        raise InputError(f"No fold is finished for every model ({listed}). Train the missing ones.")
    return folds


def _candidate(
    models: tuple[Model, ...], predictions: Sequence[Path], references: Path, dataset: DatasetJson
) -> Candidate:
    from nnmosaic.trainers.masked_evaluation import evaluate_folder

    scored: dict[str, Mapping[str, Any]] = {}
    classes: list[str] = []
    for folder in predictions:
        summary = evaluate_folder(references, folder, dataset, allow_missing=True)
        classes = list(summary["labels"])
        for case in summary["metric_per_case"]:
            name = Path(case["reference_file"]).name[: -len(dataset.file_ending)]
            scored[name] = case["metrics"]
    names = sorted(scored)
    nothing = {"Dice": float("nan")}
    dice = [[scored[name].get(key, nothing)["Dice"] for key in classes] for name in names]
    return Candidate(models, np.array(dice, float), names)


def _ensemble(
    pair: tuple[Model, Model],
    folds: Sequence[str],
    output: Path,
    references: Path,
    dataset: DatasetJson,
) -> Candidate | None:
    name = "___".join(model.folder.name for model in pair)
    folders = []
    for fold in folds:
        inputs = [model.folder / f"fold_{fold}" / "validation" for model in pair]
        try:
            cases = cases_with_probabilities(inputs)
        except InputError as error:
            logger.info("No ensemble of %s (train with --npz): %s", name, error)
            return None
        target = output / name / f"fold_{fold}"
        shutil.rmtree(target, ignore_errors=True)  # an older run may have had other cases
        average_cases(cases, inputs, target, dataset, read_json(pair[0].folder / "plans.json"))
        folders.append(target)
    return _candidate(pair, folders, references, dataset)


def _commands(models: Sequence[Model], folds: Sequence[str]) -> list[str]:
    if len(models) == 1:
        return _predictions(models[0], "PREDICTIONS", folds)
    outputs = [f"PREDICTIONS_{i + 1}" for i in range(len(models))]
    commands = [
        command
        for model, output in zip(models, outputs, strict=True)
        for command in _predictions(model, output, folds, "--save_probabilities")
    ]
    return [*commands, f"nnmosaic ensemble -i {' '.join(outputs)} -o PREDICTIONS"]


def _predictions(model: Model, output: str, folds: Sequence[str], *options: str) -> list[str]:
    before: list[str] = []
    if (stage := model.previous_stage()) is not None:
        before = _predictions(stage, f"{output}_{stage.configuration}", folds)
        options = (*options, f"-prev_stage_predictions {output}_{stage.configuration}")
    words = ["nnmosaic predict -i IMAGES", f"-o {output}", f"-m {shlex.quote(str(model.folder))}"]
    return [*before, " ".join([*words, f"-f {' '.join(folds)}", *options])]


def _report(
    rows: Sequence[Mapping[str, Any]],
    best: int,
    commands: Sequence[str],
    folds: Sequence[str],
    cases: int,
) -> str:
    table = Table("model", "Dice", "95 % interval", "against the best", title=f"{cases} cases")
    for row in rows:
        low, high = row["interval"]
        below, above = row["difference_interval"]
        is_best = row is rows[best]
        difference = f"{row['difference_to_best']:+.3f} ({below:+.3f} to {above:+.3f})"
        table.add_row(
            row["model"],
            f"{row['dice']:.3f}",
            f"{low:.3f} to {high:.3f}",
            "best" if is_best else difference,
        )
    return "\n".join([f"Folds {', '.join(folds)}", as_text(table), *commands])
