"""What the sources of a dataset look like: the part of the fingerprint that nnU-Net does not have.

Per source spacings, shapes and intensities, per class numbers and volumes, and who annotates what.
Nothing here reads an image; `nnmosaic.planners.fingerprint` does, once per case.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from nnmosaic.data_conversion.dataset_json import DatasetJson

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES_PER_CASE = 10_000
"""Intensities per case and channel in the statistics of a source."""


@dataclass(frozen=True)
class RaterAgreement:
    """How far the raters of one case agree.

    Attributes
    ----------
    dice : mapping
        "A and B" -> Dice of what the two labelled, where either labelled anything.
    volume_ratio : mapping
        Rater -> labelled volume / mean over the raters of the case.
    """

    dice: Mapping[str, float] = field(default_factory=dict)
    volume_ratio: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CaseFacts:
    """What one reading of a case gave.

    Attributes
    ----------
    shape : tuple of int
        After cropping to the voxels that are not zero.
    spacing : list of float
        In mm, in the order of the array axes.
    intensities : list of ndarray
        Per channel, randomly drawn voxels of the labelled structures.
    lowest : list of float
        Per channel, the smallest value of the whole image.
    relative_size : float
        Voxels after cropping / before.
    objects : mapping of int to (int, int)
        Stored label value -> (voxels, connected components), for the values that occur.
    content : str
        Digest of the bytes of all files of the case.
    agreement : RaterAgreement
        Empty where there are no raters.
    """

    shape: tuple[int, ...]
    spacing: list[float]
    intensities: list[np.ndarray]
    lowest: list[float]
    relative_size: float
    objects: Mapping[int, tuple[int, int]]
    content: str
    agreement: RaterAgreement = field(default_factory=RaterAgreement)


def rater_agreement(masks: Mapping[str, np.ndarray]) -> RaterAgreement:
    """Compare what raters labelled, whatever the class.

    Parameters
    ----------
    masks : mapping of str to ndarray of bool
        Rater -> mask, all of one shape.
    """
    voxels = {rater: int(np.count_nonzero(mask)) for rater, mask in masks.items()}
    mean = sum(voxels.values()) / len(voxels) if voxels else 0
    dice = {
        f"{one} and {other}": 2 * int(np.count_nonzero(masks[one] & masks[other])) / both
        for one, other in combinations(masks, 2)
        if (both := voxels[one] + voxels[other])
    }
    return RaterAgreement(dice, {rater: n / mean for rater, n in voxels.items() if mean})


def intensity_properties(samples: Sequence[np.ndarray]) -> dict[str, float]:
    """Return nnU-Net's numbers for the intensities of one channel; none for no intensities."""
    values = np.concatenate(samples)
    if values.size == 0:
        return {}
    mean, deviation = float(np.mean(values)), float(np.std(values))  # nnU-Net's, in its order
    values.sort()  # numpy sorts 1e8 values in a third of the time of np.percentile
    low, median, high = (_percentile(values, percent) for percent in (0.5, 50.0, 99.5))
    return {
        "mean": mean,
        "median": median,
        "std": deviation,
        "min": float(values[0]),
        "max": float(values[-1]),
        "percentile_99_5": high,
        "percentile_00_5": low,
    }


def source_statistics(
    facts: Mapping[str, CaseFacts], dataset: DatasetJson
) -> dict[str, dict[str, Any]]:
    """Return "sources", "classes" and "class_source_matrix" of the fingerprint.

    Parameters
    ----------
    facts : mapping of str to CaseFacts
        Case -> facts.

    Returns
    -------
    dict
        "sources": source -> number of cases, quantiles of spacing (mm) and shape per axis,
        intensities per channel. "classes": class -> cases that annotate it, cases that show it,
        voxels, quantiles of volume (mm³; mm² in 2D) and of the number of connected components; a
        class within a merged label counts in neither, and overlapping regions have no classes.
        "class_source_matrix": class -> source -> the same counts, with "annotated" "yes", "merged"
        (counts of the union) or "no". "raters", where there are several: quantiles over cases of
        the Dice of every pair and of each rater's volume ratio.
    """
    members: dict[str, list[str]] = {source.source: [] for source in dataset.sources()}
    for case in facts:
        members.setdefault(dataset.source_of(case).source, []).append(case)
    members = {name: cases for name, cases in members.items() if cases}
    return {
        "sources": {
            name: _statistics_of_source([facts[case] for case in cases])
            for name, cases in members.items()
        },
        "classes": {name: _class_statistics(name, facts, dataset) for name in dataset.foreground},
        "class_source_matrix": {
            name: {
                source: _cell(name, {case: facts[case] for case in cases}, dataset)
                for source, cases in members.items()
            }
            for name in dataset.foreground
        },
        **({"raters": _rater_statistics(list(facts.values()))} if dataset.raters else {}),
    }


def _rater_statistics(facts: Sequence[CaseFacts]) -> dict[str, Any]:
    statistics: dict[str, Any] = {}
    for name in ("dice", "volume_ratio"):
        values: dict[str, list[float]] = {}
        for fact in facts:
            for key, value in getattr(fact.agreement, name).items():
                values.setdefault(key, []).append(value)
        statistics[name] = {
            key: {"cases": len(own), **_quantiles(own)} for key, own in values.items()
        }
    return statistics


def _statistics_of_source(facts: Sequence[CaseFacts]) -> dict[str, Any]:
    channels = range(len(facts[0].intensities))
    few = [[fact.intensities[c][:SAMPLES_PER_CASE] for fact in facts] for c in channels]
    return {
        "cases": len(facts),
        "spacing": _quantiles([fact.spacing for fact in facts]),
        "shape_after_crop": _quantiles([fact.shape for fact in facts]),
        "intensities": {
            str(c): {
                **intensity_properties(few[c]),
                "lowest_of_image": float(np.median([fact.lowest[c] for fact in facts])),
            }
            for c in channels
        },
    }


def _class_statistics(
    name: str, facts: Mapping[str, CaseFacts], dataset: DatasetJson
) -> dict[str, Any]:
    annotated = [case for case in facts if _kind(name, case, dataset) == "yes"]
    objects = {
        case: facts[case].objects[dataset.labels[name]]
        for case in annotated
        if dataset.labels[name] in facts[case].objects
    }
    volumes = [n * _voxel_size(facts[case]) for case, (n, _) in objects.items()]
    return {
        "cases_annotated": len(annotated),
        "cases_present": len(objects),
        "voxels": sum(voxels for voxels, _ in objects.values()),
        "volume_mm3": _quantiles(volumes) if volumes else {},
        "components": _quantiles([n for _, n in objects.values()]) if objects else {},
    }


def _voxel_size(fact: CaseFacts) -> float:
    """Return mm³, or mm² for a 2D image: nnU-Net's first axis of that has one slice of 999 mm."""
    return float(np.prod(fact.spacing[1:] if fact.shape[0] == 1 else fact.spacing))


def _cell(name: str, facts: Mapping[str, CaseFacts], dataset: DatasetJson) -> dict[str, Any]:
    kinds = {case: _kind(name, case, dataset) for case in facts}
    value = {
        case: dataset.source_of(case).representatives(dataset.labels)[dataset.labels[name]]
        for case in facts
    }
    voxels = [facts[case].objects.get(value[case], (0, 0))[0] for case in facts if value[case]]
    return {
        "annotated": next((k for k in ("yes", "merged") if k in kinds.values()), "no"),
        "cases": len(facts),
        "present": sum(n > 0 for n in voxels),
        "voxels": sum(voxels),
    }


def _kind(name: str, case: str, dataset: DatasetJson) -> str:
    stored = dataset.source_of(case).representatives(dataset.labels)
    value = stored[dataset.labels[name]]
    return "no" if value == 0 else "yes" if stored.count(value) == 1 else "merged"


def _quantiles(values: Sequence[Any]) -> dict[str, Any]:
    """Return quantile -> value, per axis where the values have axes."""
    return {str(q): np.quantile(np.asarray(values, float), q, axis=0).tolist() for q in QUANTILES}


def _percentile(ordered: np.ndarray, percent: float) -> float:
    """Return what np.percentile interpolates, to the last bit, of values that are sorted."""
    position = percent / 100 * (ordered.size - 1)
    below = int(position)
    lower, upper = ordered[below], ordered[min(below + 1, ordered.size - 1)]
    weight, gap = position - below, float(upper - lower)
    return float(lower) + gap * weight if weight < 0.5 else float(upper) - gap * (1 - weight)
