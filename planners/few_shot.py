"""Folds with few training cases, beside those of the cross-validation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import DatasetJson
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners import NUM_FOLDS
from nnmosaic.planners.splits import SEED

KEY = "few_shot"
"""Beside "train" and "val", all that nnU-Net reads of a fold in ``splits_final.json``."""


def nested_cases(cases: Sequence[str], dataset: DatasetJson, draw: int) -> list[str]:
    """Return the cases in the order of a draw: the first n of them are the few-shot set of size n.

    A subject gives a second case only when every subject has given one.
    """
    subjects = sorted({dataset.subject_of(case) for case in cases})
    order = np.random.default_rng([SEED, draw]).permutation(len(subjects))
    rank = {subject: int(order[i]) for i, subject in enumerate(subjects)}
    given: dict[str, int] = {}
    keys = {}
    for case in sorted(cases):
        subject = dataset.subject_of(case)
        given[subject] = given.get(subject, 0) + 1
        keys[case] = (given[subject], rank[subject])
    return sorted(cases, key=keys.__getitem__)


def add_few_shot_folds(
    path: Path, dataset: DatasetJson, *, numbers: Sequence[int], draws: int
) -> dict[int, dict[str, int]]:
    """Append a fold for each number of cases and draw, and return fold -> {"cases", "draw"}.

    All of them train on cases of fold 0 and validate on those of fold 0. Existing folds stay as
    they are; one that was asked for before keeps its number.

    Parameters
    ----------
    path : Path
        ``splits_final.json``.
    numbers : sequence of int
        Training cases.
    draws : int
        Sets of each size. Within a draw, smaller sets are parts of larger ones.

    Raises
    ------
    InputError
        If there is no such file, it lacks folds, or fold 0 has too few training cases.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist. Run plan_and_preprocess first.")
    splits: list[dict[str, Any]] = read_json(path)
    if len(splits) < NUM_FOLDS:
        raise InputError(
            f"{path} has {len(splits)} folds. Few-shot folds come after {NUM_FOLDS} others, which "
            "run and find_best take for the cross-validation. Add the missing ones."
        )
    pool = splits[0]["train"]
    if max(numbers) > len(pool):
        raise InputError(
            f"Fold 0 of {path} trains on {len(pool)} cases; {max(numbers)} cannot be drawn from "
            "them. Ask for fewer with --cases."
        )
    known = few_shot_folds(path)
    for draw in range(draws):
        order = nested_cases(pool, dataset, draw)
        for number in sorted(set(numbers)):
            wanted = {"cases": number, "draw": draw}
            if wanted not in known.values():
                known[len(splits)] = wanted
                splits.append({"train": order[:number], "val": list(splits[0]["val"]), KEY: wanted})
    write_json(splits, path)
    return known


def few_shot_folds(path: Path) -> dict[int, dict[str, int]]:
    """Return fold -> {"cases", "draw"} of the few-shot folds in ``splits_final.json``."""
    splits = read_json(path) if path.is_file() else []
    return {fold: split[KEY] for fold, split in enumerate(splits) if KEY in split}
