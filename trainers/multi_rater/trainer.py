"""What the two stages for many raters share (multi_rater_personalization.md, 7.5)."""

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnmosaic.data_conversion.atomic_write import write_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.plans_section import RaterPlan, rater_plan
from nnmosaic.planners.preprocessing import RATER_REFERENCES_FOLDER
from nnmosaic.trainers.base import nnUNetTrainerMosaic, sum_of
from nnmosaic.trainers.multi_rater.dataset import RaterDataset
from nnmosaic.trainers.multi_rater.evaluation import evaluate_raters
from nnmosaic.trainers.multi_rater.export import CaseWriter
from nnmosaic.trainers.multi_rater.network import MultiRaterNet
from nnmosaic.trainers.multi_rater.prediction import RaterPredictor
from nnmosaic.trainers.multi_rater.wanted_masks import WantedMasks
from nnmosaic.trainers.predictor import MosaicPredictor
from nnmosaic.trainers.resumable import plain_network


class MultiRaterTrainer(nnUNetTrainerMosaic):
    """What both stages share: data with a channel for each rater, and a network with opinions.

    By itself the network answers with the mean opinion, so that nnU-Net's tools predict with it.
    """

    trains_heads: ClassVar[bool]
    """Whether the heads of the raters learn, or the rest."""

    @cached_property
    def rater_plan(self) -> RaterPlan:
        """What the plans say of raters."""
        return rater_plan(self.plans_manager.plans)

    def _refuse_what_raters_cannot_have(self) -> None:
        reasons = {
            "regions": self.dataset.has_regions,
            "an ignore label": self.dataset.ignore_label is not None,
            "partial_labels": self.dataset.partial_labels is not None,
            "a cascade": self.is_cascaded,
        }
        for what, present in reasons.items():
            if present:
                raise InputError(
                    f"{type(self).__name__} cannot train with {what}. Train with another trainer, "
                    "or declare the dataset without."
                )
        if self.dataset.raters != self.rater_plan.raters:
            raise InputError(
                f"dataset.json declares the raters {', '.join(self.dataset.raters) or 'none'}, but "
                f"the plans were made for {', '.join(self.rater_plan.raters)}. Run "
                "nnmosaic plan_and_preprocess again."
            )

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Return the plan's U-Net with opinions; parameters as in nnU-Net."""
        unet = nnUNetTrainerMosaic.build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        plan = rater_plan(plans_manager.plans)
        return MultiRaterNet(
            unet,
            channels=num_input_channels,
            classes=num_output_channels,
            raters=len(plan.raters),
            latent=plan.latent,
        )

    @property
    def pretrainable(self) -> nn.Module:
        """What has nnU-Net's own keys, and may begin with weights of a plain model."""
        network = plain_network(self.network)
        return nn.ModuleDict({"encoder": network.encoder, "decoder": network.decoder})

    def initialize(self) -> None:
        """Initialise as nnU-Net does, for cases with the label maps of all raters."""
        self._refuse_what_raters_cannot_have()
        super().initialize()
        self.dataset_class = RaterDataset

    def configure_optimizers(self) -> Any:
        """Freeze what the other stage trains, before DDP looks at it; then as nnU-Net."""
        for name, parameter in plain_network(self.network).named_parameters():
            parameter.requires_grad_(name.startswith("heads.") == self.trains_heads)
        return super().configure_optimizers()

    def get_tr_and_val_datasets(self) -> tuple[RaterDataset, RaterDataset]:
        """Return nnU-Net's datasets, and note who annotated their cases."""
        datasets: tuple[RaterDataset, RaterDataset] = super().get_tr_and_val_datasets()
        self._available: dict[str, Tensor] = {
            name: torch.from_numpy(dataset.available(name))
            for dataset in datasets
            for name in dataset.identifiers
        }
        return datasets

    def on_train_start(self) -> None:
        """Warn of raters of whom nothing can be learnt."""
        super().on_train_start()
        training, _ = self.get_tr_and_val_datasets()
        heard = torch.stack([self._available[name] for name in training.identifiers]).any(0)
        for rater, has_cases in zip(self.rater_plan.raters, heard.tolist(), strict=True):
            if not has_cases:
                self.print_to_log_file(
                    f"Warning: the rater {rater} annotated no training case of fold {self.fold}, "
                    "so this fold learns nothing of this rater. Do not predict such a mask with "
                    "this fold, or leave the rater out (nnmosaic add_raters).",
                    also_print_to_console=True,
                )

    def _annotations(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return labels of the raters at full resolution, (B, R, *spatial), and who is there."""
        target = batch["target"]
        full = target[0] if isinstance(target, list) else target
        available = torch.stack([self._available[name] for name in batch["keys"]])
        return full[:, 1:], available.to(self.device)

    def _terms(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
        """Return weighted loss terms, and what the network answered."""
        raise NotImplementedError

    def _pairs(self, answer: Any, labels: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted and drawn label maps that belong together, each (pairs, voxels)."""
        raise NotImplementedError

    def _first_pass(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self._terms(batch)[0]

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return loss and voxel counts over all pairs of a prediction and a rater."""
        batch = self.on_device(batch)
        with self.autocast():
            terms, answer = self._terms(batch)
        found, drawn = self._pairs(answer, *self._annotations(batch))
        classes = range(1, self.label_manager.num_segmentation_heads)
        here, there = (torch.stack([masks == k for k in classes]) for masks in (found, drawn))
        counts = {"tp_hard": here & there, "fp_hard": here & ~there, "fn_hard": there & ~here}
        numbers = {name: hit.sum((1, 2)).cpu().numpy() for name, hit in counts.items()}
        return {"loss": sum_of(terms).cpu().numpy(), **numbers}

    def wanted_masks(self) -> WantedMasks:
        """Return what the final validation predicts."""
        raise NotImplementedError

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate the mean opinion as nnU-Net does; then the masks of this stage."""
        super().perform_actual_validation(save_probabilities)
        if self.local_rank != 0:
            return
        folder = Path(self.output_folder) / "validation"
        self._predict_validation_cases(folder)
        references = Path(self.preprocessed_dataset_folder_base) / RATER_REFERENCES_FOLDER
        # Its .npz are of the mean opinion.
        summary = evaluate_raters(references, folder, self.dataset, read_probabilities=False)
        write_json(summary, folder / "summary_raters.json")

    def _predict_validation_cases(self, folder: Path) -> None:
        self.set_deep_supervision_enabled(False)
        network = plain_network(self.network).eval()
        on_gpu = self.device.type == "cuda"
        predictor = MosaicPredictor(
            perform_everything_on_device=on_gpu, device=self.device, allow_tqdm=False
        )
        predictor.manual_initialization(
            network, self.plans_manager, self.configuration_manager, None, self.dataset_json,
            type(self).__name__, self.inference_allowed_mirroring_axes,
        )  # fmt: skip
        raters = RaterPredictor(predictor, self.wanted_masks())
        dataset = self.dataset_class(self.preprocessed_dataset_folder, self.do_split()[1])
        for case in dataset.identifiers:
            self.print_to_log_file(f"predicting masks of {case}")
            data, _, _, properties = dataset.load_case(case)
            writer = CaseWriter(folder, case, predictor, properties)
            for kind, name, logits in raters.logits(torch.from_numpy(data[:]), case):
                writer.add(kind, name, logits)
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
