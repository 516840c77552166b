"""What predicting with clustering propagation needs beyond other models: sweeps and prompts."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.dataset_json import DatasetJson
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.interactions import Mask, Prompts
from nnmosaic.data_conversion.prompts import find_prompts, read_prompts
from nnmosaic.data_conversion.raw_dataset import Case

logger = logging.getLogger(__name__)


def propagates(predictor: Any, *, sweep: str | None, prompts: Path | None) -> bool:
    """Return whether a predictor carries centres from slice to slice.

    Raises
    ------
    InputError
        If it does not, but a sweep or prompts are given.
    """
    from nnmosaic.trainers.clustering_propagation.predictor import PropagationPredictor

    if isinstance(predictor, PropagationPredictor):
        if prompts is not None and sweep not in (None, "both"):
            raise InputError(f"--sweep {sweep} takes no prompts: they travel both ways.")
        return True
    if sweep is not None or prompts is not None:
        raise InputError(
            f"{predictor.trainer_name} does not go from slice to slice: --sweep and --prompts are "
            "for models of nnUNetTrainerClusteringPropagation."
        )
    return False


def read_all_prompts(
    folder: Path, cases: Sequence[Case], dataset: DatasetJson
) -> dict[str, Prompts]:
    """Return what was marked, case by case; files of other cases are named in a warning.

    Raises
    ------
    InputError
        If the folder does not exist, or one of its files of a case cannot be used.
    """
    if not folder.is_dir():
        raise InputError(f"--prompts: {folder} does not exist or is not a folder.")
    files = {case.identifier: find_prompts(folder, case.identifier) for case in cases}
    labels = dataset.content["labels"]
    found = {case: read_prompts(path, labels) for case, path in files.items() if path is not None}
    used = {path for path in files.values() if path is not None}
    unused = sorted(path.name for path in folder.glob("*.json") if path not in used)
    if unused:
        logger.warning("--prompts: no image belongs to %s", ", ".join(unused))
    return found


def state_of(prompts: Prompts) -> str:
    """Return a text that changes whenever prompts do, or a mask that they name is drawn again."""
    masks = [one.file for one in prompts.interactions if isinstance(one, Mask)]
    files = [(file.stat().st_size, file.stat().st_mtime_ns) for file in masks]
    return f"{prompts} {files}"
