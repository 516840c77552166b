"""Second stage for many raters (multi_rater_personalization.md, 3)."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.plans_section import rater_plan
from nnmosaic.trainers import FIRST_STAGE
from nnmosaic.trainers.checkpoint import read_checkpoint
from nnmosaic.trainers.multi_rater.trainer import MultiRaterTrainer
from nnmosaic.trainers.multi_rater.wanted_masks import WantedMasks
from nnmosaic.trainers.resumable import plain_network

FIRST = FIRST_STAGE["nnUNetTrainerMultiRaterPersonalized"]


class nnUNetTrainerMultiRaterPersonalized(MultiRaterTrainer):
    """Second stage: a head for each rater, on the frozen first stage (3).

    It trains for 50 epochs (7.5), unless told otherwise.
    """

    trains_heads = True
    default_epochs = 50

    stage1_file: Path | None = None
    _stage1: Mapping[str, str] = MappingProxyType({})
    _idle: Sequence[int] = ()

    def initialize(self) -> None:
        """Initialise for one output, at full resolution."""
        self.enable_deep_supervision = False
        super().initialize()

    def on_train_start(self) -> None:
        """Load the first stage before any data, unless a checkpoint has brought it."""
        if not self.was_initialized:
            self.initialize()
        if not self._stage1:
            self._load_stage1()
        super().on_train_start()

    def _load_stage1(self) -> None:
        path = self.stage1_file or stage1_checkpoint(Path(self.output_folder))
        content = read_first_stage(path, self.my_init_kwargs)
        plain_network(self.network).load_state_dict(content["network_weights"])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self._stage1 = {"file": str(path.absolute()), "sha256": digest}
        self.print_to_log_file(f"First stage: {path}")
        if content["init_args"]["fold"] != self.fold:
            self.print_to_log_file(
                f"Warning: it was trained on fold {content['init_args']['fold']}, not {self.fold}: "
                "the validation is not on unseen cases."
            )

    def method_state(self) -> dict[str, Any]:
        """Add which first stage this is made from."""
        return {**super().method_state(), "stage1": dict(self._stage1)}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore which first stage this is made from."""
        super().load_method_state(state)
        self._stage1 = state["stage1"]

    def wanted_masks(self) -> WantedMasks:
        """Return the own mask of every rater."""
        return WantedMasks(raters=self.rater_plan.raters)

    def _terms(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        labels, available = self._annotations(batch)
        logits: Tensor = self.network(batch["data"], of_raters=True)
        total = 0 * logits.sum()
        for r, there in enumerate(available.T):
            if there.any():
                loss = self.segmentation_loss(logits[r, there], labels[there, r : r + 1], batch)
                total = total + there.sum() * loss
        return {"segmentation": total / available.sum()}, logits

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make a step on the heads of the raters who annotated a sample of the batch."""
        present = torch.stack([self._available[name] for name in batch["keys"]]).any(0)
        self._idle = [r for r, there in enumerate(present) if not there]
        return super().train_step(batch)

    def clip_gradients(self) -> None:
        """Leave out the heads that no sample needed, so that no momentum moves them."""
        if not self.is_ddp:  # there, another process may have needed them
            for r in self._idle:
                for parameter in plain_network(self.network).heads[r].parameters():
                    parameter.grad = None
        super().clip_gradients()

    def _pairs(self, answer: Tensor, labels: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        """Return each rater's own mask and annotation."""
        there = available.T
        return answer.argmax(2)[there].flatten(1), labels.transpose(0, 1)[there].flatten(1)


def stage1_checkpoint(fold_folder: Path) -> Path:
    """Return the first stage that belongs to a fold of the second: same plans and fold."""
    model = fold_folder.parent
    name = model.name.replace(nnUNetTrainerMultiRaterPersonalized.__name__, FIRST, 1)
    return model.with_name(name) / fold_folder.name / "checkpoint_final.pth"


def read_first_stage(path: Path, made_with: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint of a first stage that fits a second one.

    Parameters
    ----------
    made_with : dict
        "plans", "configuration" and "dataset_json" of the second stage.

    Raises
    ------
    InputError
        If there is none, or it was trained for other raters, classes or another network.
    """
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: the personalised stage starts from a trained diversified one. "
            f"Train {FIRST} on this fold first, or name its "
            "checkpoint with --stage1."
        )
    content = read_checkpoint(path)
    if content["trainer_name"] != FIRST:
        raise InputError(
            f"{path} was trained by {content['trainer_name']}. Name a checkpoint of "
            f"{FIRST} with --stage1."
        )
    before, now = (_network_of(arguments) for arguments in (content["init_args"], made_with))
    for what in now:
        if before[what] != now[what]:
            raise InputError(
                f"{path} was trained for other {what}: {before[what]}, not {now[what]}. Train the "
                "first stage again, or name another with --stage1."
            )
    return content


def _network_of(arguments: dict[str, Any]) -> dict[str, Any]:
    plans = PlansManager(arguments["plans"])
    configuration = plans.get_configuration(arguments["configuration"])
    schemes = configuration.normalization_schemes
    intensities = arguments["plans"]["foreground_intensity_properties_per_channel"]
    return {
        "raters": ", ".join(rater_plan(arguments["plans"]).raters),
        "classes": arguments["dataset_json"]["labels"],
        "size of the code": rater_plan(arguments["plans"]).latent,
        "channels": arguments["dataset_json"]["channel_names"],
        "network": [configuration.network_arch_class_name, configuration.network_arch_init_kwargs],
        "spacing": list(configuration.spacing),
        # Only CT is normalised by the intensities of the dataset, which every new case changes.
        "normalisation": [
            [scheme, intensities[str(channel)] if scheme == "CTNormalization" else None]
            for channel, scheme in enumerate(schemes)
        ],
    }
