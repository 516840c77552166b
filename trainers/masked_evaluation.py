"""Dice per class and source, counting a class only where it was annotated (spec 6.4)."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnmosaic.data_conversion.case_check import reader_of
from nnmosaic.data_conversion.dataset_json import BACKGROUND, IGNORE, DatasetJson
from nnmosaic.data_conversion.errors import InputError

METRICS = ("Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref")
"""nnU-Net's, in voxels where they are counts."""


def evaluate_folder(
    references: Path, predictions: Path, dataset: DatasetJson, *, allow_missing: bool = False
) -> dict[str, Any]:
    """Score every prediction that has a reference.

    Parameters
    ----------
    references, predictions : Path
        Folders of label maps with equal names.
    allow_missing : bool
        Accept references without a prediction.

    Returns
    -------
    dict
        nnU-Net's summary ("metric_per_case", "mean", "foreground_mean") plus "n_cases" per class
        and "per_source". Metrics of a class that the source of a case does not annotate are NaN. A
        merged label is scored as the union of its members, under a key such as "(1, 2)".

    Raises
    ------
    InputError
        If a folder holds nothing to score, or a prediction is missing.
    """
    ending = dataset.file_ending
    predicted = sorted(p.name for p in predictions.glob(f"*{ending}"))
    present = {p.name for p in references.glob(f"*{ending}")}
    missing = sorted(present - set(predicted))
    if missing and not allow_missing:
        raise InputError(
            f"{predictions / missing[0]} does not exist ({len(missing)} of {len(present)} "
            "references have no prediction). Predict the rest, or pass --chill to leave them out."
        )
    names = [name for name in predicted if name in present]
    if not names:
        raise InputError(f"{predictions} and {references} have no {ending} file in common.")
    with ThreadPoolExecutor() as pool:
        cases = list(
            pool.map(lambda name: _score(references / name, predictions / name, dataset), names)
        )
    return summarise(cases, dataset)


def summarise(cases: Sequence[Mapping[str, Any]], dataset: DatasetJson) -> dict[str, Any]:
    """Return the summary of scored cases; see `evaluate_folder`."""
    keys = list(dict.fromkeys(key for case in cases for key in case["metrics"]))
    keys.sort(key=lambda key: (key.startswith("("), int(key) if key.isdecimal() else 0, key))
    mean = _means(cases, keys)
    names = {str(dataset.labels[name]): name for name in dataset.foreground}
    names = names or {str(key): name for name, key in _regions(dataset).items()}
    classes = [key for key in names if key in keys and _count(cases, key) > 0]
    summary: dict[str, Any] = {
        "foreground_mean": _mean_of(mean[key] for key in classes),
        "mean": mean,
        "metric_per_case": [dict(case) for case in cases],
        "n_cases": {key: _count(cases, key) for key in keys},
        "labels": names,
        "per_source": {},
    }
    for source in dict.fromkeys(case["source"] for case in cases):
        own = [case for case in cases if case["source"] == source]
        annotated = [key for key in keys if _count(own, key) > 0]
        summary["per_source"][source] = {
            "mean": _means(own, annotated),
            "n_cases": {key: _count(own, key) for key in annotated},
        }
    recursive_fix_for_json_export(summary)
    return summary


def _score(reference: Path, prediction: Path, dataset: DatasetJson) -> dict[str, Any]:
    case = reference.name[: -len(dataset.file_ending)]
    source = dataset.source_of(case)
    keys: list[int | tuple[int, ...]] = [dataset.labels[name] for name in source.annotated]
    keys += [
        tuple(sorted(dataset.labels[m] for m in members)) for members in source.merged.values()
    ]
    keys = keys or list(_regions(dataset).values())
    scores = compute_metrics(
        str(reference), str(prediction), reader_of(dataset), keys, dataset.ignore_label
    )
    metrics = {
        str(dataset.labels[name]): dict.fromkeys(METRICS, float("nan"))
        for name in dataset.foreground
    }
    metrics.update({str(key): values for key, values in scores["metrics"].items()})
    return {
        "reference_file": str(reference),
        "prediction_file": str(prediction),
        "source": source.source,
        "metrics": metrics,
    }


def _regions(dataset: DatasetJson) -> dict[str, int | tuple[int, ...]]:
    """Return nnU-Net's overlapping regions: name -> the integers they are made of."""
    labels = dataset.content["labels"] if dataset.has_regions else {}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in labels.items()
        if name not in (BACKGROUND, IGNORE)
    }


def _values(cases: Iterable[Mapping[str, Any]], key: str, metric: str) -> list[float]:
    return [case["metrics"][key][metric] for case in cases if key in case["metrics"]]


def _count(cases: Iterable[Mapping[str, Any]], key: str) -> int:
    """Return in how many cases the class was annotated."""
    return int(np.isfinite(_values(cases, key, "TP")).sum())


def _means(cases: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> dict[str, dict[str, float]]:
    return {key: {m: _nanmean(_values(cases, key, m)) for m in METRICS} for key in keys}


def _mean_of(means: Iterable[Mapping[str, float]]) -> dict[str, float]:
    rows = list(means)
    return {metric: _nanmean([row[metric] for row in rows]) for metric in METRICS}


def _nanmean(values: Sequence[float]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no value at all: NaN is the answer
        return float(np.nanmean(values)) if len(values) else float("nan")
