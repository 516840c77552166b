"""Averaging the probabilities that several models predicted for the same cases."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnmosaic.data_conversion.atomic_write import read_json, replacing, write_json
from nnmosaic.data_conversion.case_check import reader_of
from nnmosaic.data_conversion.dataset_json import DatasetJson, read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.progress import progress


def ensemble(inputs: Sequence[Path], output: Path, *, save_probabilities: bool = False) -> None:
    """Write the label maps of the averaged probabilities, as nnU-Net's ensembling does.

    Geometry comes from the label maps beside the probabilities, so no pickle is read.

    Parameters
    ----------
    inputs : sequence of Path
        Folders that `predict` wrote with ``--save_probabilities``.

    Raises
    ------
    InputError
        If the folders do not hold the same cases and classes.
    """
    dataset = read_dataset_json(inputs[0])
    names = cases_with_probabilities(inputs)
    for folder in inputs[1:]:
        if read_dataset_json(folder).content["labels"] != dataset.content["labels"]:
            raise InputError(f"{folder} and {inputs[0]} were predicted with different labels.")
    plans = read_json(inputs[0] / "plans.json")
    average_cases(names, inputs, output, dataset, plans, keep=save_probabilities)
    write_json(dataset.content, output / "dataset.json")
    write_json(plans, output / "plans.json")


def average_cases(
    names: Sequence[str],
    inputs: Sequence[Path],
    output: Path,
    dataset: DatasetJson,
    plans: dict[str, Any],
    *,
    keep: bool = False,
) -> None:
    """Write the label maps of the averaged probabilities of some cases.

    Parameters
    ----------
    inputs : sequence of Path
        Folders with a label map and an .npz file per case.
    keep : bool
        Also write the averaged probabilities.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    label_manager = PlansManager(plans).get_label_manager(dict(dataset.content))
    output.mkdir(parents=True, exist_ok=True)
    with progress("Averaging", len(names)) as advance:
        for name in names:
            _average(name, inputs, output, dataset, label_manager, keep=keep)
            advance(name)


def cases_with_probabilities(inputs: Sequence[Path]) -> list[str]:
    """Return the cases of folders that all hold the probabilities of the same ones.

    Raises
    ------
    InputError
        If a folder lacks some, or has none.
    """
    names = [{path.stem for path in folder.glob("*.npz")} for folder in inputs]
    for folder, found in zip(inputs, names, strict=True):
        if not found:
            raise InputError(f"{folder} holds no .npz file. Predict with --save_probabilities.")
        missing = sorted(set.union(*names) - found)
        if missing:
            raise InputError(
                f"{folder} lacks {missing[0]}.npz ({len(missing)} missing). Predict it there too."
            )
    return sorted(names[0])


def _average(
    name: str,
    inputs: Sequence[Path],
    output: Path,
    dataset: DatasetJson,
    label_manager: Any,
    *,
    keep: bool,
) -> None:
    total: Any = None
    for folder in inputs:
        path = folder / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as content:
                probabilities = content["probabilities"].astype(np.float32)
        except (ValueError, KeyError, OSError) as error:
            raise InputError(
                f"{path} holds no probabilities ({error}). Predict the case again."
            ) from None
        if total is not None and total.shape != probabilities.shape:
            raise InputError(f"{path} has the shape {probabilities.shape}, expected {total.shape}.")
        total = probabilities if total is None else total + probabilities
    total /= len(inputs)
    reader, ending = reader_of(dataset), dataset.file_ending
    _, properties = reader.read_seg(str(inputs[0] / f"{name}{ending}"))
    segmentation = np.asarray(label_manager.convert_probabilities_to_segmentation(total))
    temporary = output / f".{name}.tmp{ending}"
    reader.write_seg(segmentation, str(temporary), properties)
    temporary.replace(output / f"{name}{ending}")
    if keep:
        with replacing(output / f"{name}.npz") as path, path.open("wb") as file:
            np.savez_compressed(file, probabilities=total)
