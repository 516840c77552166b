"""The two stages for many raters (multi_rater_personalization.md, 2 and 3)."""

import hashlib
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from nnmosaic.data_conversion.atomic_write import write_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.plans_section import RaterPlan, rater_plan
from nnmosaic.planners.preprocessing import RATER_REFERENCES_FOLDER
from nnmosaic.trainers.base import nnUNetTrainerMosaic, sum_of
from nnmosaic.trainers.checkpoint import read_checkpoint
from nnmosaic.trainers.multi_rater.dataset import RaterDataset
from nnmosaic.trainers.multi_rater.evaluation import evaluate_raters
from nnmosaic.trainers.multi_rater.export import CaseWriter
from nnmosaic.trainers.multi_rater.loss import (
    bound_loss,
    draw_raters,
    energy_set_loss,
    gaussian_kl,
    of_raters,
    posterior_input,
)
from nnmosaic.trainers.multi_rater.network import Diversified, MultiRaterNet
from nnmosaic.trainers.multi_rater.prediction import RaterPredictor
from nnmosaic.trainers.multi_rater.wanted_masks import WantedMasks
from nnmosaic.trainers.predictor import MosaicPredictor
from nnmosaic.trainers.resumable import plain_network

VALIDATION_SAMPLES = 10


class MultiRaterTrainer(nnUNetTrainerMosaic):
    """What both stages share: data with a channel for each rater, and a network with opinions.

    By itself the network answers with the prior's mean, so that nnU-Net's tools predict with it.
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - the signature is nnU-Net's
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.rater_plan: RaterPlan = rater_plan(plans)
        self._refuse_what_raters_cannot_have()
        self._available: dict[str, Tensor] = {}

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

    def initialize(self) -> None:
        """Initialise as nnU-Net does, for cases with the label maps of all raters."""
        super().initialize()
        self.dataset_class = RaterDataset

    def get_tr_and_val_datasets(self) -> tuple[RaterDataset, RaterDataset]:
        """Return nnU-Net's datasets, and note who annotated their cases."""
        datasets: tuple[RaterDataset, RaterDataset] = super().get_tr_and_val_datasets()
        for dataset in datasets:
            for name in dataset.identifiers:
                self._available[name] = torch.from_numpy(dataset.available(name))
        return datasets

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
        """Validate the prior's mean as nnU-Net does; then the masks of this stage."""
        super().perform_actual_validation(save_probabilities)
        if self.local_rank != 0:
            return
        folder = Path(self.output_folder) / "validation"
        self._predict_validation_cases(folder)
        references = Path(self.preprocessed_dataset_folder_base) / RATER_REFERENCES_FOLDER
        summary = evaluate_raters(references, folder, self.dataset)
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


class nnUNetTrainerMultiRaterDiversified(MultiRaterTrainer):
    """First stage: masks as different as the raters are (2.2, generalised as in 2.4)."""

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "kl_weight", "bound_weight", "bound_cross_entropy", "energy_weight", "posterior",
        "rater_draw",
    )  # fmt: skip

    kl_weight: float = 1.0
    bound_weight: float = 0.5
    """Of the union and intersection of the raters; 0 leaves a probabilistic U-Net."""
    bound_cross_entropy: float = 0.0
    """Weight of cross-entropy beside Dice in the bound; 1 is advised for small lesions."""
    energy_weight: float = 0.0
    """Of the energy distance between samples and raters (6), which also sees what lies between."""
    posterior: Literal["all", "sampled"] = "all"
    """Whether the posterior sees every rater, or only the one whose mask is learnt."""
    rater_draw: Literal["uniform", "balanced"] = "uniform"
    """Which rater is learnt: any who annotated the case, or more often those with few cases."""

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Return the network; the heads of the raters wait for the second stage."""
        network = MultiRaterTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels,
            enable_deep_supervision,
        )  # fmt: skip
        network.heads.requires_grad_(False)
        return network

    def _terms(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Diversified]:
        labels, available = self._annotations(batch)
        raters = draw_raters(available, weights=self._weights())
        seen = available
        if self.posterior == "sampled":
            seen = functional.one_hot(raters, available.shape[1]).bool()
        classes = self.label_manager.num_segmentation_heads
        noise = torch.randn(
            1 + self._samples(), len(labels), self.rater_plan.latent, device=self.device
        )
        found: Diversified = self.network(
            batch["data"],
            annotated=posterior_input(batch["data"], labels, seen, classes),
            noise=noise,
        )
        target = batch["target"]
        maps = [level[:, 1:] for level in target] if isinstance(target, list) else target[:, 1:]
        distance = gaussian_kl(*found.posterior, *found.prior).mean()
        terms = {
            "segmentation": self.segmentation_loss(found.logits, of_raters(maps, raters), batch),
            "kl": self.kl_weight * distance,
        }
        if self.bound_weight:
            terms["bound"] = self.bound_weight * bound_loss(
                found.samples.softmax(2), labels, available, cross_entropy=self.bound_cross_entropy
            )
        if self.energy_weight:
            energy = energy_set_loss(found.samples.softmax(2), labels, available)
            terms["energy"] = self.energy_weight * energy
        return terms, found

    def _samples(self) -> int:
        if not self.network.training:
            return VALIDATION_SAMPLES
        if not (self.bound_weight or self.energy_weight):
            return 1
        plan = self.rater_plan
        is_2d = len(self.configuration_manager.patch_size) == 2
        return plan.prior_samples if is_2d else plan.prior_samples_3d

    def _weights(self) -> Tensor | None:
        if self.rater_draw == "uniform":
            return None
        cases = torch.stack(list(self._available.values())).sum(0)
        return 1 / cases.clamp_min(1)

    def _pairs(self, answer: Diversified, labels: Tensor, available: Tensor) -> tuple[Any, Any]:
        """Return the best assignment of a sample to each rater (Dice_match)."""
        classes = self.label_manager.num_segmentation_heads
        samples = answer.samples.argmax(2)  # (M, B, *spatial)
        pairs = []
        for b in range(len(labels)):
            found, drawn = samples[:, b].flatten(1), labels[b, available[b]].flatten(1)
            dice = sum(_dice_of_pairs(drawn == k, found == k) for k in range(1, classes))
            rows, columns = linear_sum_assignment(dice.cpu().numpy(), maximize=True)
            pairs.append((found[columns], drawn[rows]))
        return torch.cat([found for found, _ in pairs]), torch.cat([drawn for _, drawn in pairs])

    def wanted_masks(self) -> WantedMasks:
        """Return samples."""
        return WantedMasks(samples=VALIDATION_SAMPLES)


class nnUNetTrainerMultiRaterPersonalized(MultiRaterTrainer):
    """Second stage: a head for each rater, on the frozen first stage (3)."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - the signature is nnU-Net's
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.stage1_file: Path | None = None
        self._stage1: dict[str, str] = {}

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Return the network, of which only the heads of the raters learn."""
        network = MultiRaterTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels,
            enable_deep_supervision,
        )  # fmt: skip
        network.requires_grad_(False)
        network.heads.requires_grad_(True)
        return network

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

    def method_state(self) -> dict[str, Any]:
        """Add which first stage this is made from."""
        return {**super().method_state(), "stage1": self._stage1}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore which first stage this is made from."""
        super().load_method_state(state)
        self._stage1 = state["stage1"]

    def wanted_masks(self) -> WantedMasks:
        """Return the own mask of every rater."""
        return WantedMasks(raters=self.rater_plan.raters)

    def _terms(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        labels, available = self._annotations(batch)
        size = self.rater_plan.bank, len(labels), self.rater_plan.latent
        # A head that no sample needs gets no gradient; but each process of DDP must use all.
        raters = [r for r, there in enumerate(available.T) if there.any() or self.is_ddp]
        logits: Tensor = self.network(
            batch["data"], bank=torch.randn(size, device=self.device), raters=raters
        )
        total = 0 * logits.sum() if self.is_ddp else logits.new_zeros(())
        for own, r in zip(logits, raters, strict=True):
            there = available[:, r]
            if there.any():
                loss = self.segmentation_loss(own[there], labels[there, r : r + 1], batch)
                total = total + there.sum() * loss
        return {"segmentation": total / available.sum()}, dict(zip(raters, logits, strict=True))

    def _pairs(
        self, answer: dict[int, Tensor], labels: Tensor, available: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return each rater's own mask and annotation."""
        found = [own.argmax(1)[available[:, r]] for r, own in answer.items()]
        drawn = [labels[available[:, r], r] for r in answer]
        return torch.cat(found).flatten(1), torch.cat(drawn).flatten(1)


def stage1_checkpoint(fold_folder: Path) -> Path:
    """Return the first stage that belongs to a fold of the second: same plans and fold."""
    model = fold_folder.parent
    first, second = (
        cls.__name__
        for cls in (nnUNetTrainerMultiRaterDiversified, nnUNetTrainerMultiRaterPersonalized)
    )
    name = model.name.replace(second, first, 1)
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
            f"Train {nnUNetTrainerMultiRaterDiversified.__name__} on this fold first, or name its "
            "checkpoint with --stage1."
        )
    content = read_checkpoint(path)
    if content["trainer_name"] != nnUNetTrainerMultiRaterDiversified.__name__:
        raise InputError(
            f"{path} was trained by {content['trainer_name']}. Name a checkpoint of "
            f"{nnUNetTrainerMultiRaterDiversified.__name__} with --stage1."
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
    return {
        "raters": ", ".join(rater_plan(arguments["plans"]).raters),
        "classes": arguments["dataset_json"]["labels"],
        "size of the code": rater_plan(arguments["plans"]).latent,
        "network": configuration.network_arch_init_kwargs,
        "spacing": list(configuration.spacing),
    }


def _dice_of_pairs(first: Tensor, second: Tensor) -> Tensor:
    """Return Dice of each pair of masks, shape (n, m); 1 where both are empty."""
    a, b = first.float(), second.float()
    common, total = a @ b.T, a.sum(1)[:, None] + b.sum(1)
    return torch.where(total > 0, 2 * common / total.clamp_min(1), 1)
