"""Predictions on disk against the label maps of several raters (multi_rater_personalization.md, 5).

Scores are per case and foreground class, then averaged over classes, then over cases. The metrics
themselves are in ``set_metrics.py``.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from nnmosaic.data_conversion.case_check import read_image, read_label, reader_of
from nnmosaic.data_conversion.dataset_json import DatasetJson
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import RATERS_FOLDER, Case
from nnmosaic.trainers.multi_rater.set_metrics import (
    THRESHOLDS,
    calibration,
    dice_matrix,
    dice_soft,
    generalised_energy_distance,
    rater_identification,
    set_dice,
    variance_ratio,
)
from nnmosaic.trainers.multi_rater.wanted_masks import RATERS, SAMPLES

READERS = 4
"""Threads that read the files of a case, one case at a time: the maps of two may not fit into
memory, and each file is a volume in single precision meanwhile."""


@dataclass(frozen=True)
class _Files:
    """What there is of one case.

    Attributes
    ----------
    raters : tuple of str
        Who annotated the case.
    annotations : tuple of Path
        Of these raters.
    own : tuple of Path
        The personalised mask for each of them, or one prediction for all.
    probabilities : Path or None
        Mean over samples.
    """

    case: str
    raters: tuple[str, ...]
    annotations: tuple[Path, ...]
    own: tuple[Path, ...]
    samples: tuple[Path, ...]
    probabilities: Path | None
    personalised: bool


def evaluate_raters(
    references: Path, predictions: Path, dataset: DatasetJson, *, read_probabilities: bool = True
) -> dict[str, Any]:
    """Score every predicted case that a rater annotated.

    A class that neither side shows has Dice and IoU 1. Values that are undefined are NaN, and left
    out of means.

    Parameters
    ----------
    references : Path
        Holds ``RATER/CASE``; who has no file did not annotate the case.
    predictions : Path
        Holds any of ``CASE`` (the label map of the mean probability), ``raters/RATER/CASE``
        (personalised masks), ``samples/NUMBER/CASE`` (diverse label maps), and ``CASE.npz``
        ("probabilities", shape (K, *spatial), mean over samples). What one case has, all must.
    dataset : DatasetJson
        Of the references; with exclusive, complete classes.
    read_probabilities : bool
        Look at ``CASE.npz``; not where they belong to another prediction than the samples.

    Returns
    -------
    dict
        "raters": "Dice" of each rater's own mask with the annotations of that rater, and
        "Dice_mean", the mean over raters. If "personalised" is false, the label map ``CASE`` was
        held against each rater; otherwise also "match" and "GED" of the set of masks, without the
        masks of absent raters. With "exchangeable" as "identity" a rater is a rank, not a person.

        "identification" (personalised, and two raters in a case): see `rater_identification`.

        "samples": their "number", "GED" and the fields of `SetDice`, "variance_ratio", and
        "dice_soft".

        "calibration" (with samples or ``CASE.npz``): "ECE", "ACE" over all voxels, "dice_soft", and
        "of": "mean probability", or "share of samples" where there are no ``CASE.npz``; that is
        what "dice_soft" above is of, too.

        "between_raters": "FIRST/SECOND" -> mean "Dice" of the two, the ceiling, and "n_cases".

        "metric_per_case" has the same per case, and the "Dice_matrix" of personalised masks (rows)
        and annotations; "n_cases" is its length, "not_predicted" lists the annotated cases that it
        lacks.

    Raises
    ------
    InputError
        If dataset.json declares no raters or more than complete classes, a folder belongs to no
        rater, nothing is in common, a case lacks a file, or the files of a case do not lie on one
        grid or hold other values than the classes.
    """
    _check_dataset(dataset)
    found, not_predicted = _find_files(
        references, predictions, dataset, read_probabilities=read_probabilities
    )
    with ThreadPoolExecutor(READERS) as pool:
        cases = [_score_case(files, dataset, pool) for files in found]
    personalised = found[0].personalised
    summary: dict[str, Any] = {
        "identity": dataset.rater_identity,
        "n_cases": len(cases),
        "not_predicted": not_predicted,
        "raters": _summarise_raters(cases, dataset.raters, personalised=personalised),
        "between_raters": _summarise_pairs(cases),
    }
    if personalised and any(case["n_raters"] > 1 for case in cases):
        matrices = [np.asarray(case["Dice_matrix"]) for case in cases]
        summary["identification"] = asdict(rater_identification(matrices))
    if found[0].samples:
        scores = _means([case["samples"] for case in cases])
        summary["samples"] = {"number": len(found[0].samples), **scores}
    if found[0].samples or found[0].probabilities is not None:
        kind = "share of samples" if found[0].probabilities is None else "mean probability"
        scores = _means([case["calibration"] for case in cases])
        summary["calibration"] = {"of": kind, **scores}
    return {**summary, "metric_per_case": cases}


def _check_dataset(dataset: DatasetJson) -> None:
    if not dataset.raters:
        raise InputError(
            'dataset.json has no "multirater", which names the raters. Add it, or score one label '
            "map per case with: nnmosaic evaluate."
        )
    if dataset.has_regions or dataset.ignore_label is not None or dataset.partial_labels:
        raise InputError(
            "dataset.json declares overlapping regions, an ignore label or partial_labels, but "
            "raters can be compared only where each annotated every voxel with exclusive classes. "
            "Give the dataset.json of such label maps."
        )


def _find_files(
    references: Path, predictions: Path, dataset: DatasetJson, *, read_probabilities: bool
) -> tuple[list[_Files], list[str]]:
    """Return the files of each case to score, and the annotated cases without a prediction."""
    ending = dataset.file_ending
    drawn = {folder.name: _names(folder, ending) for folder in _of_raters(references, dataset)}
    if not drawn:
        raise InputError(
            f"{references} holds no folder of a rater ({', '.join(dataset.raters)}). Give the "
            f"folder above them, such as {RATERS_FOLDER}."
        )
    masks = _of_raters(predictions / RATERS, dataset)
    samples = _folders(predictions / SAMPLES)
    annotated = set().union(*drawn.values())
    predicted = set().union(*(_names(f, ending) for f in (predictions, *masks, *samples)))
    cases = {name: name[: -len(ending)] for name in sorted(annotated & predicted)}
    if not cases:
        raise InputError(
            f"{predictions} and the folders of {references} have no {ending} file in common. Give "
            "the raters' label maps of the predicted cases."
        )
    probabilities = read_probabilities and any(
        (predictions / f"{case}.npz").is_file() for case in cases.values()
    )
    found = []
    for name, case in cases.items():
        raters = tuple(rater for rater in dataset.raters if name in drawn.get(rater, ()))
        own = [predictions / RATERS / rater for rater in raters] if masks else [predictions]
        files = _Files(
            case=case,
            raters=raters,
            annotations=tuple(references / rater / name for rater in raters),
            own=tuple(folder / name for folder in own),
            samples=tuple(folder / name for folder in samples),
            probabilities=predictions / f"{case}.npz" if probabilities else None,
            personalised=bool(masks),
        )
        _check_complete(files, predictions)
        found.append(files)
    return found, sorted(name[: -len(ending)] for name in annotated - predicted)


def _check_complete(files: _Files, predictions: Path) -> None:
    probabilities = () if files.probabilities is None else (files.probabilities,)
    for path in (*files.own, *files.samples, *probabilities):
        if not path.is_file():
            raise InputError(
                f"{path} does not exist, but {predictions} has other predictions of this case or "
                "kind. Predict the case again (the masks of raters: with --raters all), or move "
                "away what is left of it."
            )


def _of_raters(parent: Path, dataset: DatasetJson) -> list[Path]:
    """Return the folders in ``parent``, each of a rater."""
    folders = _folders(parent)
    for folder in folders:
        if folder.name not in dataset.raters:
            raise InputError(
                f"{folder} belongs to no rater of dataset.json, which names "
                f"{', '.join(dataset.raters)}. Rename it, or move it away."
            )
    return folders


def _folders(parent: Path) -> list[Path]:
    found = sorted(parent.iterdir()) if parent.is_dir() else []
    return [path for path in found if path.is_dir() and not path.name.startswith(".")]


def _names(folder: Path, ending: str) -> set[str]:
    return {path.name for path in folder.glob(f"*{ending}") if not path.name.startswith(".")}


def _score_case(files: _Files, dataset: DatasetJson, pool: Executor) -> dict[str, Any]:
    """Return the entry of a case in "metric_per_case"."""
    labels = _read_label_maps(files, dataset, pool)
    probabilities, calibrated = None, {}
    if files.probabilities is not None:
        shape = (len(dataset.labels), *labels.shape[1:])
        probabilities = _read_probabilities(files.probabilities, shape)
    elif files.samples:
        samples = labels[-len(files.samples) :]
        probabilities = np.stack([
            (samples == k).mean(0, dtype=np.float32) for k in range(len(dataset.labels))
        ])  # fmt: skip
    if probabilities is not None:
        found = calibration(labels[: len(files.raters)], probabilities)
        calibrated = {"ECE": found.expected, "ACE": found.average}
    labels, probabilities = _without_background(labels, probabilities)
    parts = (len(files.raters), len(labels) - len(files.samples))
    annotations, own, samples = np.split(labels, parts)
    classes = [
        _score_class(
            annotations == label,
            own == label,
            samples == label,
            probability=None if probabilities is None else probabilities[label],
        )
        for label in range(1, len(dataset.labels))
    ]
    score = {
        "case": files.case,
        "n_raters": len(files.raters),
        "n_samples": len(files.samples),
        **_over_raters(files, classes),
    }
    if probabilities is not None:
        score["calibration"] = calibrated | _means([one["soft"] for one in classes])
    if files.samples:
        score["samples"] = _means([one["samples"] for one in classes])
    return score


def _over_raters(files: _Files, classes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a case says of its raters: means over classes of `_score_class`."""
    between = np.mean([one["between"] for one in classes], axis=0)
    own = np.mean([one["own"] for one in classes], axis=0)
    strict = own.diagonal() if files.personalised else own[0]
    score: dict[str, Any] = {
        "raters": {"Dice": dict(zip(files.raters, strict.tolist(), strict=True))},
        "between_raters": {
            f"{files.raters[i]}/{files.raters[j]}": float(between[i, j])
            for i, j in combinations(range(len(files.raters)), 2)
        },
    }
    if files.personalised:
        score["raters"] |= _means([one["set"] for one in classes])
        score["Dice_matrix"] = own.tolist()
    return score


def _score_class(
    annotations: np.ndarray,
    own: np.ndarray,
    samples: np.ndarray,
    *,
    probability: np.ndarray | None,
) -> dict[str, Any]:
    """Score one class of a case.

    Parameters
    ----------
    annotations, own, samples : ndarray, bool, shape (number, voxels)
        As in `_Files`; there may be no sample.
    probability : ndarray, shape (voxels,), optional
        Mean over samples; there is one if there are samples.
    """
    set_of_own = set_dice(annotations, own)
    score: dict[str, Any] = {
        "own": dice_matrix(own, annotations),
        "between": dice_matrix(annotations, annotations),
        "set": {
            "match": set_of_own.match,
            "GED": generalised_energy_distance(annotations, own),
        },
    }
    if probability is not None:
        score["soft"] = {"dice_soft": dice_soft(annotations, probability[None])}
    if len(samples):
        score["samples"] = {
            "GED": generalised_energy_distance(annotations, samples),
            **score["soft"],
            **asdict(set_dice(annotations, samples)),
            "variance_ratio": variance_ratio(annotations, samples),
        }
    return score


def _read_label_maps(files: _Files, dataset: DatasetJson, pool: Executor) -> np.ndarray:
    """Return annotations, own predictions and samples of a case, shape (number, *spatial)."""
    paths = (*files.annotations, *files.own, *files.samples)
    reader = reader_of(dataset)
    first = Case(files.case, paths[:1], None)
    image, properties = read_image(first, reader, num_channels=1)
    legal = dataset.legal_values(files.case)
    labels = np.empty((len(paths), *image.shape[1:]), np.min_scalar_type(len(dataset.labels)))

    def read(index: int) -> None:
        case = replace(first, label=paths[index])
        label = read_label(case, reader, image=image, properties=properties, legal=legal)
        labels[index] = label[0]

    list(pool.map(read, range(len(paths))))
    return labels


def _read_probabilities(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        with np.load(path) as content:
            probabilities: np.ndarray = content["probabilities"]
    except (ValueError, KeyError, OSError, BadZipFile) as error:
        raise InputError(
            f"{path} holds no probabilities ({error}). Predict the case again."
        ) from None
    if probabilities.shape != shape:
        raise InputError(
            f"{path} has the shape {probabilities.shape}, expected {shape}: classes and voxels of "
            "the annotations. Predict the case again, with this dataset.json."
        )
    return probabilities


def _without_background(
    labels: np.ndarray, probabilities: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Leave out voxels at which all are background: they change no score of a class.

    Parameters
    ----------
    labels : ndarray, int, shape (number, *spatial)
    probabilities : ndarray, shape (K, *spatial), optional

    Returns
    -------
    tuple
        The same with shape (number, voxels) and (K, voxels), of one voxel or more.
    """
    shown = labels.any(0)
    if probabilities is not None:
        shown |= (probabilities[1:] > min(THRESHOLDS)).any(0)
    shown.flat[0] = True
    return labels[:, shown], None if probabilities is None else probabilities[:, shown]


def _summarise_raters(
    cases: Sequence[Mapping[str, Any]], raters: Sequence[str], *, personalised: bool
) -> dict[str, Any]:
    scores = [case["raters"]["Dice"] for case in cases]
    means = _means(scores)
    summary = {
        "personalised": personalised,
        "Dice": {rater: means.get(rater, float("nan")) for rater in raters},
        "n_cases": {rater: sum(rater in score for score in scores) for rater in raters},
        "Dice_mean": float(np.mean(list(means.values()))),
    }
    if personalised:
        keys = ("match", "GED")
        summary |= _means([{key: case["raters"][key] for key in keys} for case in cases])
    return summary


def _summarise_pairs(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    scores = [case["between_raters"] for case in cases]
    return {
        pair: {"Dice": dice, "n_cases": sum(pair in score for score in scores)}
        for pair, dice in _means(scores).items()
    }


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each key over the rows where it is defined; NaN if it nowhere is."""
    keys = dict.fromkeys(key for row in rows for key in row)
    defined = {k: [row[k] for row in rows if k in row and not np.isnan(row[k])] for k in keys}
    return {k: float(np.mean(v)) if v else float("nan") for k, v in defined.items()}
