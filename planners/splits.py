"""Folds for cross-validation: by subject, and with every source in every fold."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2.utilities.crossval_split import generate_crossval_split
from sklearn.model_selection import StratifiedGroupKFold

from nnmosaic.data_conversion.atomic_write import write_json
from nnmosaic.data_conversion.dataset_json import DatasetJson
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners import NUM_FOLDS

SEED = 12345
"""nnU-Net's own."""

Splits = list[dict[str, list[str]]]


def make_splits(cases: Sequence[str], dataset: DatasetJson) -> Splits:
    """Return five folds, grouped by subject and stratified by source (spec 6.4).

    A dataset that declares neither subjects nor sources gets exactly nnU-Net's folds.

    Raises
    ------
    InputError
        If there are fewer subjects than folds.
    """
    names = sorted(cases)
    subjects = [dataset.subject_of(case) for case in names]
    if len(set(subjects)) < NUM_FOLDS:
        raise InputError(
            f"{len(set(subjects))} subjects cannot make {NUM_FOLDS} folds. Train with fold 'all', "
            "or write splits_final.json yourself."
        )
    if dataset.partial_labels is None and not dataset.subjects:
        stock: Splits = generate_crossval_split(names, seed=SEED, n_splits=NUM_FOLDS)
        return [{part: [str(c) for c in fold[part]] for part in ("train", "val")} for fold in stock]
    sources = [dataset.source_of(case).source for case in names]
    with warnings.catch_warnings():
        # A source with fewer cases than folds cannot be in every fold; that is not an error here.
        warnings.simplefilter("ignore", UserWarning)
        folds = list(
            StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=SEED).split(
                np.zeros(len(names)), sources, subjects
            )
        )
    return [
        {"train": [names[i] for i in train], "val": [names[i] for i in val]} for train, val in folds
    ]


def ensure_splits(path: Path, cases: Sequence[str], dataset: DatasetJson) -> None:
    """Write ``splits_final.json`` if there is none; an existing file is never touched."""
    if not path.exists():
        write_json(make_splits(cases, dataset), path)
