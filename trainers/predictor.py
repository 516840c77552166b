"""Sliding-window prediction with nnU-Net's predictor, from a trained model folder."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.checkpoint import read_checkpoint
from nnmosaic.trainers.heap import keep_freed_memory
from nnmosaic.trainers.lookup import trainer_class


class MosaicPredictor(nnUNetPredictor):
    """nnU-Net's predictor; on a CPU it predicts mirrored copies of a tile two at a time.

    A single sample uses the cores badly: measured with an 8-feature U-Net on 2 cores, two samples
    together take less time than one. The result is the same up to rounding.
    """

    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        if self.device.type != "cpu" or not (self.use_mirroring and self.allowed_mirroring_axes):
            return super()._internal_maybe_mirror_and_predict(x)
        spatial = [axis + 2 for axis in self.allowed_mirroring_axes]
        flips = [c for n in range(len(spatial) + 1) for c in itertools.combinations(spatial, n)]
        total = torch.zeros(())
        for first, second in zip(flips[::2], flips[1::2], strict=True):  # 2 ** axes of them
            pair = self.network(torch.cat((x.flip(first), x.flip(second))))
            total = total + pair[:1].flip(first) + pair[1:].flip(second)
        return total / len(flips)


def available_folds(model: Path, checkpoint: str) -> list[int | str]:
    """Return the trained folds of a model folder; "all" only if there is no other."""
    names = [path.parent.name.removeprefix("fold_") for path in model.glob(f"fold_*/{checkpoint}")]
    numbers = sorted(int(name) for name in names if name.isdecimal())
    return list(numbers) or [name for name in names if name == "all"]


def load_predictor(
    model: Path,
    *,
    folds: Sequence[int | str] | None,
    checkpoint: str,
    device: torch.device,
    step_size: float,
    mirroring: bool,
) -> MosaicPredictor:
    """Return a predictor with the networks of all folds.

    Parameters
    ----------
    model : Path
        nnU-Net's results folder ``TRAINER__PLANS__CONFIGURATION``.
    folds : sequence, optional
        Default: all that are trained.
    step_size : float
        Step between tiles, in parts of the patch size.

    Raises
    ------
    InputError
        If the folder holds no such model, or weights of another network.
    """
    if not (model / "plans.json").is_file():
        raise InputError(f"{model} is no trained model: it has no plans.json. Train first.")
    folds = folds or available_folds(model, checkpoint)
    if not folds:
        raise InputError(
            f"{model} has no fold with {checkpoint}. Train first, or choose with -chk."
        )
    weights = []
    for fold in folds:  # one at a time: optimizer states are twice as large as the weights
        content = read_checkpoint(model / f"fold_{fold}" / checkpoint)
        weights.append(content["network_weights"])
    plans = PlansManager(read_json(model / "plans.json"))
    dataset_json = read_json(model / "dataset.json")
    configuration = plans.get_configuration(content["init_args"]["configuration"])
    if device.type == "cpu":
        keep_freed_memory()
    network = _network(content["trainer_name"], plans, configuration, dataset_json)
    # nnU-Net's own trainers do not say.
    predictor_class = getattr(
        trainer_class(content["trainer_name"]), "predictor_class", MosaicPredictor
    )
    predictor: MosaicPredictor = predictor_class(
        tile_step_size=step_size,
        use_mirroring=mirroring,
        perform_everything_on_device=device.type == "cuda",
        device=device,
        allow_tqdm=False,
    )
    try:
        network.load_state_dict(weights[0])
    except RuntimeError as error:
        raise InputError(
            f"{model}: its weights do not fit the network of its plans.json, which was changed, or "
            f"made for another version of nnMosaic. Train again. ({error})"
        ) from None
    predictor.manual_initialization(
        network,
        plans,
        configuration,
        weights,
        dataset_json,
        content["trainer_name"],
        content.get("inference_allowed_mirroring_axes"),
    )
    return predictor


def _network(
    trainer: str,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict[str, Any],
) -> torch.nn.Module:
    return trainer_class(trainer).build_network_architecture(
        plans,
        configuration,
        determine_num_input_channels(plans, configuration, dataset_json),
        plans.get_label_manager(dataset_json).num_segmentation_heads,
        enable_deep_supervision=False,
    )
