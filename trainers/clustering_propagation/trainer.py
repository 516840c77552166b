"""Trainer of a 2D network whose class centres travel from slice to slice."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.plans_section import ClusteringPlan, read_section, write_section
from nnmosaic.trainers.base import nnUNetTrainerMosaic, sum_of
from nnmosaic.trainers.clustering_propagation.clip import Clip, ClipResult
from nnmosaic.trainers.clustering_propagation.dataloading import ClipLoader, keep_slices_apart
from nnmosaic.trainers.clustering_propagation.loss import clip_losses
from nnmosaic.trainers.clustering_propagation.network import ClusteringPropagationNet
from nnmosaic.trainers.clustering_propagation.optimisation import (
    WarmUpPolyScheduler,
    parameter_groups,
)
from nnmosaic.trainers.clustering_propagation.predictor import PropagationPredictor
from nnmosaic.trainers.clustering_propagation.reach import clicked_slices, reaches
from nnmosaic.trainers.clustering_propagation.simulated_user import SimulatedUser
from nnmosaic.trainers.clustering_propagation.truth import Truth, pixel_counts
from nnmosaic.trainers.clustering_propagation.validation import (
    predict_validation_cases,
    write_summary,
)
from nnmosaic.trainers.dataloading import Batches, make_loaders
from nnmosaic.trainers.options import Count, Fraction
from nnmosaic.trainers.resumable import plain_network

CORRECTIONS = 2
"""At most, per clip with a user."""
GIVEN_GATE, GIVEN_GATE_UNTIL = 0.2, 0.1
"""Share of the steps, in this first part of the training, whose memory is written by the labels."""
GRADIENT_NORM_LIMIT = 1.0
OTHER_LABELS_LR_FACTOR = 0.1


class nnUNetTrainerClusteringPropagation(nnUNetTrainerMosaic):
    """Learns to segment clips of slices, by itself and with a simulated user.

    methods/clustering_propagation.md: a design of our own in the spirit of Ding et al. (CVPR 2024).
    nnU-Net's tools predict with it slice by slice, without memory. A batch holds about as many
    slices as planned, in at least two clips.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "memory", "clip_slices", "interactive_fraction", "unet_lr_factor",
    )  # fmt: skip

    memory: Literal["gru", "last", "window"] = "gru"
    """How a centre remembers earlier slices: a gated unit, the last one, or the last four."""
    clip_slices: Count = Count(4)
    """Slices of a clip; 1 trains without memory."""
    interactive_fraction: Fraction = Fraction(0.5)
    """Share of the clips on which a user is simulated."""
    unet_lr_factor: Fraction = Fraction(1.0)
    """Learning rate of the U-Net relative to the new parts. Unless it is given, after
    ``-pretrained_weights`` 0, where the U-Net stays as it was; 0.1 if they are of other labels."""

    adamw_initial_lr = 3e-4
    predictor_class = PropagationPredictor
    batch_size: int

    # ---------------------------------------------------------------- set-up

    def prepare(self) -> None:
        """Refuse what has no slices, and note in the plans what the network is built from."""
        super().prepare()
        if len(self.configuration_manager.patch_size) != 2:
            raise InputError(
                f"{type(self).__name__} trains on slices, not with {self.configuration_name}. "
                "Choose the configuration 2d."
            )
        self.enable_deep_supervision = False
        self.probabilistic_oversampling = True  # exact shares in a batch of few clips
        settings = self.run_settings
        if not self._is_sgd:
            self.initial_lr = settings.initial_lr or self.adamw_initial_lr
        elif float(self.unet_lr_factor) not in (0.0, 1.0):
            raise InputError(
                "--set unet_lr_factor: with --optimizer sgd only 0 and 1 have a meaning."
            )
        if self.pretrained is not None and "unet_lr_factor" not in (settings.options or {}):
            same = self.has_same_labels(self.pretrained)
            slowly = Fraction(1.0 if self._is_sgd else OTHER_LABELS_LR_FACTOR)
            self.unet_lr_factor = Fraction(0.0) if same else slowly
            self.print_to_log_file(
                f"Pretrained for {'the same' if same else 'other'} labels: unet_lr_factor is "
                f"{self.unet_lr_factor:g}"
            )
        plans = self.plans_manager.plans
        plan = ClusteringPlan(self.memory, self.label_manager.has_regions)
        write_section(plans, replace(read_section(plans), clustering=plan))
        self._refuse_other_folds(plan)
        depth = round(self.plans_manager.original_median_shape_after_transp[0])
        self.slices = min(self.clip_slices, max(2, depth))

    def _refuse_other_folds(self, plan: ClusteringPlan) -> None:
        """Raise `InputError` if a fold beside this one is another network: they share one plan."""
        path = Path(self.output_folder_base) / "plans.json"
        other = read_section(read_json(path)).clustering if path.is_file() else None
        if other not in (None, plan) and any(path.parent.glob("fold_*/checkpoint_*.pth")):
            raise InputError(
                f"{path.parent} holds folds of {other}, and this one would be {plan}. Train all "
                "folds alike, or move that folder away."
            )

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Return the plan's U-Net with travelling centres; parameters as in nnU-Net."""
        unet = nnUNetTrainerMosaic.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, False
        )
        if not hasattr(getattr(unet, "decoder", None), "transpconvs"):
            raise InputError(
                f"{configuration_manager.network_arch_class_name} is no U-Net, whose decoder this "
                "trainer needs. Plan with another planner."
            )
        plan = read_section(plans_manager.plans).clustering or ClusteringPlan()
        return ClusteringPropagationNet(
            unet, classes=num_output_channels, regions=plan.regions, memory=plan.memory
        )

    def take_pretrained(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over the output layer, too, of a model of the same labels."""
        if self.has_same_labels(checkpoint):
            plain_network(self.network).take_output_layer(checkpoint["network_weights"])

    def _do_i_compile(self) -> bool:
        return False  # only the encoder: see `initialize`

    def initialize(self) -> None:
        """Initialise, and compile the encoder where nnU-Net compiles the network."""
        super().initialize()
        if super()._do_i_compile():
            plain_network(self.network).encoder.compile()

    def _set_batch_size_and_oversample(self) -> None:
        super()._set_batch_size_and_oversample()
        least = 1 if self.is_ddp else 2
        self.batch_size = max(least, self.batch_size // self.slices)

    @property
    def _is_sgd(self) -> bool:
        return self.run_settings.optimizer == "sgd"

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Return AdamW with a warm-up; nnU-Net's SGD if it is asked for."""
        network = plain_network(self.network)
        # DDP asks for a gradient of all that learns.
        network.requires_grad_(self.unet_lr_factor > 0)
        network.head.requires_grad_(True)
        for part in (network.head.memory, network.head.hint):
            part.requires_grad_(self.slices > 1)
        if self._is_sgd:
            return super().configure_optimizers()
        groups = parameter_groups(
            network,
            new="decoder.seg_layers.",
            factor=self.unet_lr_factor,
            weight_decay=self.weight_decay,
        )
        optimizer = torch.optim.AdamW(groups, self.initial_lr)
        return optimizer, WarmUpPolyScheduler(
            optimizer, self.initial_lr, self.num_epochs, self._spent_budget
        )

    def clip_gradients(self) -> None:
        """Bound the norm of the gradients; for AdamW more tightly than nnU-Net."""
        if self._is_sgd:
            super().clip_gradients()
            return
        nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_NORM_LIMIT)

    # ---------------------------------------------------------------- data

    @staticmethod
    def get_training_transforms(
        patch_size: Sequence[int],
        rotation_for_DA: Any,  # noqa: N803 - the name is nnU-Net's
        deep_supervision_scales: Any,
        mirror_axes: Sequence[int] | None,
        do_dummy_2d_data_aug: bool,
        **meaning: Any,
    ) -> BasicTransform:
        """Return nnU-Net's augmentation of thick slices: one warp for all slices of a clip."""
        axes = tuple(axis + 1 for axis in mirror_axes or ())
        return keep_slices_apart(
            nnUNetTrainerMosaic.get_training_transforms(
                (1, *patch_size), rotation_for_DA, deep_supervision_scales, axes, True, **meaning
            )
        )

    def get_dataloaders(self) -> tuple[Batches, Batches]:
        """Return loaders of clips."""
        axis = self.plans_manager.transpose_forward[0]
        loader = partial(ClipLoader, slices=self.slices, axis=axis)
        return make_loaders(self, loader, loader)

    def on_train_start(self) -> None:
        """Measure how far clicks will reach (see `reach`)."""
        super().on_train_start()
        manager = self.label_manager
        keys = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        classes = {key: i for i, key in enumerate(keys, 0 if manager.has_regions else 1)}
        training, _ = self.get_tr_and_val_datasets()
        reach = plain_network(self.network).head.reach
        slices = clicked_slices(training, classes, manager.ignore_label)
        reach.copy_(reaches(slices, len(reach)))
        self.print_to_log_file("Reach of clicks:", [round(length, 2) for length in reach.tolist()])

    # ---------------------------------------------------------------- one step

    def _first_pass(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        generator = self._generator()
        truth, user = self._user(batch, generator)
        clips = np.flatnonzero(generator.uniform(size=len(truth.masks)) < self.interactive_fraction)
        rounds = generator.integers(0, CORRECTIONS + 1, len(clips))
        clip = user.begin(user.silent(), clips.tolist())
        if self.progress() < GIVEN_GATE_UNTIL and generator.uniform() < GIVEN_GATE:
            clip = clip._replace(gate=truth.masks.flatten(3).any(3))
        corrections = [
            partial(user.correct, clips=clips[rounds > i].tolist())
            for i in range(rounds.max(initial=0))
        ]
        result = self.network(batch["data"].transpose(1, 2), clip, corrections)
        return self._losses(result, batch, truth)

    def _generator(self, *purpose: int) -> np.random.Generator:
        """Return a generator for this iteration: an epoch that is repeated draws the same."""
        seed = self.run_settings.seed or 0
        return np.random.default_rng([seed, self.local_rank, self.iteration, *purpose])

    def _user(
        self, batch: dict[str, Any], generator: np.random.Generator
    ) -> tuple[Truth, SimulatedUser]:
        layout = plain_network(self.network).layout
        truth = Truth.of(
            batch["target"].transpose(1, 2),
            layout.classes,
            regions=layout.regions,
            ignore_label=self.label_manager.ignore_label,
        )
        positions = batch["positions"].to(self.device)
        return truth, SimulatedUser(truth, positions, layout, generator)

    def _losses(self, result: ClipResult, batch: dict[str, Any], truth: Truth) -> dict[str, Tensor]:
        return clip_losses(
            result,
            batch["target"].transpose(1, 2),
            truth,
            lambda logits, target: self.segmentation_loss(logits, target, batch),
            regions=self.label_manager.has_regions,
        )

    # ---------------------------------------------------------------- online validation

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return loss and pixel counts of propagation by itself, and counts after clicks."""
        batch = self.on_device(batch)
        truth, user = self._user(batch, self._generator(1))
        automatic: list[ClipResult] = []

        def click(result: ClipResult) -> Clip:
            automatic.append(result)
            return user.click_each_class(result.clip)

        with self.autocast():
            clicked = self.network(batch["data"].transpose(1, 2), user.silent(), [click])
            loss = sum_of(self._losses(automatic[0], batch, truth))
        counts = {"loss": loss.cpu().numpy()}
        for name, result in (("hard", automatic[0]), ("clicked", clicked)):
            found = pixel_counts(result.logits, truth, regions=self.label_manager.has_regions)
            counts |= {f"{key}_{name}": number.cpu().numpy() for key, number in found.items()}
        return counts

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log Dice after one click per class as text: nnU-Net's logger knows its own names only."""
        tp, fp, fn = (
            np.sum([output.pop(f"{key}_clicked") for output in val_outputs], 0)
            for key in ("tp", "fp", "fn")
        )
        super().on_validation_epoch_end(val_outputs)
        dice = 2 * tp / np.maximum(2 * tp + fp + fn, 1)
        self.print_to_log_file("Pseudo dice, one click per class", np.round(dice, decimals=4))

    # ---------------------------------------------------------------- final validation

    def predict_and_score_validation(self, save_probabilities: bool) -> None:
        """Predict the validation cases with propagation, and score them as nnU-Net does."""
        folder = Path(self.output_folder) / "validation"
        predict_validation_cases(self, folder, save_probabilities=save_probabilities)
        if self.is_ddp:
            torch.distributed.barrier()
        if self.local_rank != 0:
            return
        summary = write_summary(self, folder)
        for label, scores in summary["mean"].items():
            self.logger.log_summary(f"final_val/class_{label}_dice", scores["Dice"])
        mean = summary["foreground_mean"]["Dice"]
        self.logger.log_summary("final_val/foreground_dice", mean)
        self.print_to_log_file("Mean Validation Dice: ", mean, also_print_to_console=True)
