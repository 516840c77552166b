"""Dice per class and source, counting a class only where it was annotated (spec 6.4).

Where a source does not annotate a class, only the predicted volume is known, or what a complete
label map, kept aside for scoring, says of the prediction. Such a map also scores the classes of a
sparse source at the voxels that its references ignore.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnmosaic.data_conversion.case_check import read_label, reader_of
from nnmosaic.data_conversion.dataset_json import BACKGROUND, IGNORE, DatasetJson
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case

METRICS = ("Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref")
"""nnU-Net's, in voxels where they are counts."""

FULL_METRICS = ("Dice", "recall", "false_positive_ml")
"""What full references say of a class that they show."""


def evaluate_folder(
    references: Path,
    predictions: Path,
    dataset: DatasetJson,
    *,
    full_references: Path | None = None,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Score every prediction that has a reference.

    Parameters
    ----------
    references, predictions : Path
        Folders of label maps with equal names.
    full_references : Path, optional
        Folder of complete label maps, in the integers of ``full_labels`` in dataset.json. They may
        exist for some cases only, and score what the reference of the case does not.
    allow_missing : bool
        Accept references without a prediction.

    Returns
    -------
    dict
        nnU-Net's summary ("metric_per_case", "mean", "foreground_mean") plus "n_cases" per class
        and "per_source". Metrics of a class that the source of a case does not annotate are NaN. A
        merged label is scored as the union of its members, under a key such as "(1, 2)".

        With ``partial_labels`` also "warnings" (list of str), and "not_annotated": source -> class
        that it does not annotate as such -> "cases" and the mean "predicted_ml" per case. A class
        that the full references of the source show adds "full_cases" and the means of
        `FULL_METRICS`. "ignored_voxels" says the same of each class that the source does annotate,
        counting only voxels that the reference ignores, in cases with a full reference. Volumes
        rest on the spacing of the reference (2D: as nnU-Net's reader gives it, with a thickness of
        999 mm for PNG).

    Raises
    ------
    InputError
        If a folder holds nothing to score, a prediction is missing, or a full reference does not
        lie on its reference.
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

    def score(name: str) -> dict[str, Any]:
        full = full_references / name if full_references is not None else None
        return _score(references / name, predictions / name, full, dataset)

    with ThreadPoolExecutor() as pool:
        return summarise(list(pool.map(score, names)), dataset)


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
    if dataset.partial_labels is not None:
        for kind in ("not_annotated", "ignored_voxels"):
            summary[kind] = _unlabelled(cases, kind)
        summary["warnings"] = _warnings(cases, names)
    recursive_fix_for_json_export(summary)
    return summary


def names_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return key -> name of all classes, and of merged labels in words ("liver + tumour")."""
    labels = summary["labels"]
    return {
        key: labels.get(key, " + ".join(labels.get(k, k) for k in key.strip("()").split(", ")))
        for key in summary["mean"]
    }


def _score(
    reference: Path, prediction: Path, full: Path | None, dataset: DatasetJson
) -> dict[str, Any]:
    case = reference.name[: -len(dataset.file_ending)]
    source = dataset.source_of(case)
    keys: list[int | tuple[int, ...]] = [dataset.labels[name] for name in source.annotated]
    keys += [
        tuple(sorted(dataset.labels[m] for m in members)) for members in source.merged.values()
    ]
    keys = keys or list(_regions(dataset).values())
    files = SimpleNamespace(read_seg=cache(reader_of(dataset).read_seg))  # reads each file once
    scores = compute_metrics(str(reference), str(prediction), files, keys, dataset.ignore_label)
    metrics = {
        str(dataset.labels[name]): dict.fromkeys(METRICS, float("nan"))
        for name in dataset.foreground
    }
    metrics.update({str(key): values for key, values in scores["metrics"].items()})
    scored = {
        "reference_file": str(reference),
        "prediction_file": str(prediction),
        "source": source.source,
        "metrics": metrics,
    }
    if dataset.partial_labels is not None:
        references = Case(case, (reference,), full if full is not None and full.is_file() else None)
        scored |= _score_unlabelled(references, prediction, files, dataset)
    return scored


def _score_unlabelled(
    references: Case, prediction: Path, files: Any, dataset: DatasetJson
) -> dict[str, dict[str, dict[str, float]]]:
    """Return "not_annotated" and "ignored_voxels" of one case; see `evaluate_folder`.

    Parameters
    ----------
    references : Case
        The reference in place of the image, and the full reference, if there is one, as label.
    files
        Has nnU-Net's ``read_seg``.
    """
    annotated = dataset.source_of(references.identifier).annotated
    reference, properties = files.read_seg(str(references.images[0]))
    predicted = files.read_seg(str(prediction))[0]
    ignored = reference == dataset.ignore_label  # nowhere if there is no such label
    full = None
    if references.label is not None and (ignored.any() or len(annotated) < len(dataset.foreground)):
        reader = reader_of(dataset)
        full = read_label(references, reader, image=reference, properties=properties, legal=None)
    ml_per_voxel = float(np.prod(properties["spacing"])) / 1000

    def score(name: str, where: np.ndarray) -> dict[str, float]:
        found = where & (predicted == dataset.labels[name])
        volume = {"predicted_ml": found.sum() * ml_per_voxel}
        if full is None or name not in dataset.full_labels:
            return volume
        known = where & (full < len(dataset.full_labels))  # the rest is unannotated even there
        present = known & (full == dataset.full_labels[name])
        return volume | _against(present, found & known, ml_per_voxel)

    everywhere = np.ones_like(ignored)
    hidden = [name for name in dataset.foreground if name not in annotated]
    sparse = annotated if full is not None and ignored.any() else ()
    return {
        "not_annotated": {str(dataset.labels[name]): score(name, everywhere) for name in hidden},
        "ignored_voxels": {str(dataset.labels[name]): score(name, ignored) for name in sparse},
    }


def _against(present: np.ndarray, found: np.ndarray, ml_per_voxel: float) -> dict[str, float]:
    """Return `FULL_METRICS` of boolean arrays of equal shape; NaN where undefined."""
    both, n_present, n_found = (present & found).sum(), present.sum(), found.sum()
    return {
        "Dice": 2 * both / (n_present + n_found) if n_present + n_found else np.nan,
        "recall": both / n_present if n_present else np.nan,
        "false_positive_ml": (n_found - both) * ml_per_voxel,
    }


def _unlabelled(cases: Sequence[Mapping[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for case in cases:
        for key, score in case[kind].items():
            table.setdefault(case["source"], {}).setdefault(key, []).append(score)
    return {
        source: {key: _mean_unlabelled(scores) for key, scores in row.items()}
        for source, row in table.items()
    }


def _mean_unlabelled(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the means over the cases of a source.

    A class that none of its full references shows may not be annotated in them either, so there
    they say nothing.
    """
    mean = {"cases": len(scores), "predicted_ml": _nanmean([s["predicted_ml"] for s in scores])}
    full = [score for score in scores if "recall" in score]
    if any(np.isfinite(score["recall"]) for score in full):
        mean["full_cases"] = len(full)
        mean |= {metric: _nanmean([score[metric] for score in full]) for metric in FULL_METRICS}
    return mean


def _warnings(cases: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[str]:
    """Return what the scores cannot show, or hint at a class that was not learnt (spec 6.5)."""
    found = [
        f"Class {name!r} occurs in no reference that annotates it (scored: "
        f"{_count(cases, key)}), so its Dice says nothing. Score cases that show it."
        for key, name in names.items()
        if not any(voxels > 0 for voxels in _values(cases, key, "n_ref"))
    ]
    for key, name in names.items():
        predicted = [case["source"] for case in cases if _is_predicted(case, key)]
        unannotated = [case["source"] for case in cases if key in case["not_annotated"]]
        found += [
            f"Class {name!r} is predicted in 0 of {unannotated.count(source)} cases of source "
            f"{source!r}, which does not annotate it, but in {len(predicted)} others. If "
            "these cases show it, the network may have learnt the source instead of the class: "
            f"check them, and annotate the class in a few cases of {source!r}."
            for source in dict.fromkeys(unannotated)
            if predicted and source not in predicted
        ]
    return found


def _is_predicted(case: Mapping[str, Any], key: str) -> bool:
    if key in case["not_annotated"]:
        return bool(case["not_annotated"][key]["predicted_ml"] > 0)
    return bool(case["metrics"][key]["n_pred"] > 0)


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
