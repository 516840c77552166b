"""The read-out of context on the validation cases of a fold."""

import numpy as np
from rich.table import Table

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.device import choose_device
from nnmosaic.pipeline.text_table import as_text
from nnmosaic.pipeline.train import model_folder
from nnmosaic.pipeline.workspace import Workspace
from nnmosaic.trainers.context_reconstruction.masking import block_size
from nnmosaic.trainers.context_reconstruction.readout import dice_of, readout
from nnmosaic.trainers.predictor import load_predictor


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
    """Measure, write ``validation/context_dice.json``, and return a table.

    Raises
    ------
    InputError
        If the model is not trained, is part of a cascade, has regions or partial labels, or the
        fold has no preprocessed validation case with foreground.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    model = model_folder(workspace, identifier, configuration, trainer, plans_name)
    predictor = load_predictor(
        model, folds=[fold], checkpoint=checkpoint, device=choose_device(device), step_size=0.5,
        mirroring=False,
    )  # fmt: skip
    manager, labels = predictor.configuration_manager, predictor.label_manager
    if manager.previous_stage_name is not None or labels.has_regions:
        raise InputError(f"{model}: context_dice reads neither cascades nor regions.")
    if "partial_labels" in predictor.dataset_json:
        raise InputError(
            f"{model}: context_dice needs complete labels, and this dataset has partial ones."
        )
    dataset = workspace.preprocessed / workspace.dataset(identifier)
    cases = read_json(dataset / "splits_final.json")[fold]["val"]
    folder = dataset / manager.data_identifier
    stored = infer_dataset_class(str(folder))(str(folder), cases)
    network = predictor.network.to(predictor.device).eval()
    values = {v: name for name, v in predictor.dataset_json["labels"].items() if name != "ignore"}
    names = [values[value] for value in sorted(values)]
    counts = []
    for case in cases:
        data, segmentation, _, _ = stored.load_case(case)
        if (segmentation[0] > 0).any():
            counts.append(
                readout(
                    network, np.asarray(data), np.asarray(segmentation[0]),
                    patch_size=manager.patch_size,
                    block=block_size(manager.patch_size, manager.pool_op_kernel_sizes),
                    classes=len(names), device=predictor.device,
                )
            )  # fmt: skip
    if not counts:
        raise InputError(f"No validation case of fold {fold} in {folder} has foreground.")
    dice = dice_of(counts)
    target = model / f"fold_{fold}" / "validation" / "context_dice.json"
    target.parent.mkdir(exist_ok=True)
    content = {
        name: dict(zip(names[1:], of_classes.tolist(), strict=True))
        for name, of_classes in dice.items()
    }
    write_json({"checkpoint": checkpoint, "cases": len(counts), "dice": content}, target)
    table = Table("voxels", *names[1:], "mean")
    for name, of_classes in dice.items():
        cells = [*of_classes, np.nanmean(of_classes)]
        table.add_row(name, *(f"{value:.3f}" for value in cells))
    return f"{as_text(table)}\nDice in {len(counts)} validation cases; {target}"
