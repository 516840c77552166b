"""The read-out of context on the validation cases of a fold."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.device import choose_device
from nnmosaic.pipeline.text_table import as_text
from nnmosaic.pipeline.train import model_folder
from nnmosaic.pipeline.workspace import Workspace
from nnmosaic.trainers.context_reconstruction.masking import block_size
from nnmosaic.trainers.context_reconstruction.readout import Counts, dice_of, readout
from nnmosaic.trainers.predictor import MosaicPredictor, load_predictor


def context_dice(
    workspace: Workspace,
    identifier: str,
    configuration: str,
    fold: int,
    *,
    trainer: str,
    plans_name: str,
    checkpoint: str,
    device: str | None,
) -> str:
    """Measure, write ``validation/context_dice_CHECKPOINT.json``, and return a table.

    Raises
    ------
    InputError
        If the model is not trained or not a complete-label 3D model without cascade and regions, or
        the fold has no preprocessed validation case with foreground.
    """
    model = model_folder(workspace, identifier, configuration, trainer, plans_name)
    predictor = load_predictor(
        model, folds=[fold], checkpoint=checkpoint, device=choose_device(device), step_size=0.5,
        mirroring=False,
    )  # fmt: skip
    _check_model(predictor, model)
    labels = {v: name for name, v in predictor.dataset_json["labels"].items() if name != "ignore"}
    names = [labels[value] for value in sorted(labels)]
    counts = _counts(predictor, workspace.preprocessed / workspace.dataset(identifier), fold, names)
    dice = dice_of(counts)
    content = {
        voxels: {
            name: None if np.isnan(value) else float(value)
            for name, value in zip(names[1:], of_classes, strict=True)
        }
        for voxels, of_classes in dice.items()
    }
    name = f"context_dice_{Path(checkpoint).stem}.json"
    target = model / f"fold_{fold}" / "validation" / name
    target.parent.mkdir(exist_ok=True)
    write_json({"cases": len(counts), "dice": content}, target)
    table = Table("voxels", *names[1:], "mean")
    for voxels, of_classes in dice.items():
        known = of_classes[~np.isnan(of_classes)]
        cells = [*of_classes, known.mean() if len(known) else np.nan]
        table.add_row(voxels, *(f"{value:.3f}" for value in cells))
    return f"{as_text(table)}\nDice in {len(counts)} validation cases; {target}"


def _check_model(predictor: MosaicPredictor, model: Path) -> None:
    manager = predictor.configuration_manager
    for what, found in (
        ("2D configurations", len(manager.patch_size) == 2),
        ("cascades", manager.previous_stage_name is not None),
        ("regions", predictor.label_manager.has_regions),
        ("partial labels", "partial_labels" in predictor.dataset_json),
    ):
        if found:
            raise InputError(
                f"{model}: context_dice does not read {what}. Give a 3D model of a dataset with "
                "complete labels."
            )


def _counts(
    predictor: MosaicPredictor, preprocessed: Path, fold: int, names: list[str]
) -> list[Counts]:
    """Return the read-out of every validation case with foreground."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    splits: list[Any] = read_json(preprocessed / "splits_final.json")
    if fold >= len(splits):
        raise InputError(
            f"{preprocessed / 'splits_final.json'} has {len(splits)} folds, none of them {fold}."
        )
    manager = predictor.configuration_manager
    folder = preprocessed / manager.data_identifier
    dataset_class = infer_dataset_class(str(folder))
    missing = sorted(set(splits[fold]["val"]) - set(dataset_class.get_identifiers(str(folder))))
    if missing:
        raise InputError(
            f"{folder} lacks the validation case {missing[0]}. Run plan_and_preprocess again."
        )
    network = predictor.network.to(predictor.device).eval()
    block = block_size(manager.patch_size, manager.pool_op_kernel_sizes)
    counts = []
    stored = dataset_class(str(folder), splits[fold]["val"])
    for case in splits[fold]["val"]:
        data, segmentation, _, _ = stored.load_case(case)
        labels = np.asarray(segmentation[0])
        if ((labels > 0) & (labels < len(names))).any():
            counts.append(
                readout(
                    network, np.asarray(data), labels, patch_size=manager.patch_size, block=block,
                    classes=len(names), device=predictor.device,
                )
            )  # fmt: skip
    if not counts:
        raise InputError(f"No validation case of fold {fold} in {folder} has foreground.")
    return counts
