"""Trainer for many sources that each annotate only some classes, or merged or sparse ones."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import Tensor, nn

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.base import GRADIENT_NORM_LIMIT, Logits
from nnmosaic.trainers.dataloading import Batches, make_loaders
from nnmosaic.trainers.ema_teacher import TeacherTrainer, forgetting_momentum
from nnmosaic.trainers.generator import generator_of
from nnmosaic.trainers.options import Fraction
from nnmosaic.trainers.resumable import plain_network
from nnmosaic.trainers.self_disambiguation.ambiguity import OpenVoxels
from nnmosaic.trainers.self_disambiguation.authors_loss import AuthorsLoss, full_entropy
from nnmosaic.trainers.self_disambiguation.loss import (
    GroupedDiceCELoss,
    group_log_probabilities,
    hard_counts,
)
from nnmosaic.trainers.self_disambiguation.random_contrast import with_random_contrast
from nnmosaic.trainers.self_disambiguation.sampling import (
    SampledCase,
    SourceAwareDataLoader,
    describe,
    mixture,
    pair_probabilities,
)
from nnmosaic.trainers.self_disambiguation.source_heads import (
    SourceHeads,
    consistency_loss,
    own_label_loss,
)

OF_THE_TEACHER = (
    "teacher_weight", "teacher_decay", "teacher_threshold", "teacher_foreground_threshold",
    "teacher_start",
)  # fmt: skip
"""Options that say something about it only."""
CONTRAST = 3
"""Counter of the generator of random contrast, apart from those of context reconstruction."""


class nnUNetTrainerSelfDisambiguation(TeacherTrainer):
    """nnU-Net that knows what each source annotates (methods/self_disambiguation.md, 2.8).

    What a source leaves out is "background or one of these classes" in its cases, never background.
    Where ``dataset.json`` declares no ``partial_labels``, this is `nnUNetTrainerMosaic`, bit for
    bit, whatever the options.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "loss_form", "focal_gamma", "entropy", "entropy_weight", "ramp", "ema_teacher",
        "teacher_weight", "teacher_decay", "teacher_threshold", "teacher_foreground_threshold",
        "teacher_start", "source_heads", "consistency_weight", "sampling", "sampling_cap",
        "random_contrast",
    )  # fmt: skip

    loss_form: Literal["nnunet", "authors"] = "nnunet"
    """nnU-Net's Dice and cross-entropy on groups (2.8), or those of the authors' code (2.2 - 2.4).
    """
    focal_gamma: float = 0.0
    """Exponent of the focal factor of nnU-Net's cross-entropy; the authors': 2, fixed."""
    entropy: Literal["off", "conditional", "full"] = "off"
    """Entropy inside ambiguous groups (2.9), or over all classes and voxels, the authors' (2.5)."""
    entropy_weight: float = 0.1
    ramp: Fraction = Fraction(0.15)
    """Fraction of the training over which entropy, teacher and consistency rise from 0."""
    ema_teacher: bool = False
    """Learn inside ambiguous groups from a moving average of the weights (7.3.2)."""
    teacher_weight: float = 1.0
    teacher_decay: Fraction = Fraction(0.99)
    teacher_threshold: Fraction = Fraction(0.9)
    """Probability inside the group above which the teacher is trusted where it thinks background
    most probable."""
    teacher_foreground_threshold: Fraction = Fraction(0.9)
    """The same where another class is most probable: lower, organs grow sooner."""
    teacher_start: Fraction = Fraction(0)
    """Fraction of the training without the teacher, before its ramp."""
    source_heads: bool = False
    """One head per source, which the main head must agree with on other sources' images (7.1)."""
    consistency_weight: float = 1.0
    sampling: Literal["nnunet", "sqrt", "class_first"] = "sqrt"
    """How case and class of a sample are drawn, where there are several sources (3.3)."""
    sampling_cap: float = 10.0
    """No case is drawn more than this many times as often as under uniform sampling."""
    random_contrast: Fraction = Fraction(0)
    """Part of the patches that get a random contrast: for sources of different sequences."""

    def initialize(self) -> None:
        """Initialise, and wrap the source heads, whose gradients DDP must average, too."""
        self._heads: Any = None
        self._features: Tensor | None = None
        super().initialize()
        self._refuse_options_without_effect()
        if self._heads is not None and self.is_ddp:
            self._heads = nn.parallel.DistributedDataParallel(
                self._heads, device_ids=None if self.device.index is None else [self.device.index]
            )

    def _refuse_options_without_effect(self) -> None:
        changed = [n for n in OF_THE_TEACHER if getattr(self, n) != getattr(type(self), n)]
        if changed and not self.ema_teacher:
            raise InputError(
                f"--set {changed[0]}={getattr(self, changed[0]):g} changes nothing without a "
                "teacher. Add ema_teacher=true, or leave it out."
            )
        start, ramp = self.teacher_start, self.ramp
        if self.ema_teacher and (start + ramp > 1 or start >= 1):
            raise InputError(
                f"--set teacher_start={start:g} and ramp={ramp:g}: the teacher would not count in "
                "full before the training ends. Let them add up to at most 1, with teacher_start "
                "below 1."
            )

    @cached_property
    def _tables(self) -> Tensor:
        """Return, shape (sources, C) on the CPU, the integer each source stores for each class."""
        labels = self.dataset.labels
        return torch.tensor([s.representatives(labels) for s in self.dataset.sources()])

    @property
    def _has_sources(self) -> bool:
        return self.dataset.partial_labels is not None

    # ---------------------------------------------------------------- what is learnt from

    def get_dataloaders(self) -> tuple[Batches, Batches]:
        """Return loaders; the one for training draws case and class together (3.4)."""
        if not self._has_sources or self.sampling == "nnunet":
            return super().get_dataloaders()  # type: ignore[no-any-return]
        if self.dataset_class is None:
            self.dataset_class = self._dataset_class()
        cases = self._sampled_cases()
        if len({case.source for case in cases}) < 2:
            return super().get_dataloaders()  # type: ignore[no-any-return]
        pairs, guaranteed = (
            pair_probabilities(cases, self.sampling, cap=self.sampling_cap, with_background=both)
            for both in (True, self.sampling == "class_first")
        )
        names = {value: name for name, value in self.dataset.labels.items()}
        for line in describe(
            cases, mixture(pairs, guaranteed, self._guaranteed_foreground()), names
        ):
            self.print_to_log_file(f"Sampling ({self.sampling}): {line}")
        loader = partial(SourceAwareDataLoader, pairs=pairs, foreground_pairs=guaranteed)
        return make_loaders(self, loader)

    def _guaranteed_foreground(self) -> float:
        """Return the share of this process's samples in which nnU-Net guarantees foreground."""
        if self.probabilistic_oversampling:
            return float(self.oversample_foreground_percent)
        anywhere = round(self.batch_size * (1 - self.oversample_foreground_percent))
        return 1 - float(anywhere / self.batch_size)

    def augmented(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with random contrast, and the images before as "as_drawn".

        These are what the teacher of this method sees: it is sure of an organ where it knows the
        contrast, and the network learns to find the organ in any.
        """
        batch = super().augmented(batch)
        if not self._has_sources or self.random_contrast <= 0:
            return batch
        counter = (self.run_settings.seed or 0, self.local_rank, self.iteration, CONTRAST)
        target = batch["target"]
        images = with_random_contrast(
            batch["data"],
            target[0] if isinstance(target, list) else target,
            self.random_contrast,
            generator_of(*counter),
            masked=self.configuration_manager.use_mask_for_norm,
            classes=len(self.dataset.labels),
        )
        return {**batch, "data": images, "as_drawn": batch["data"]}

    def _sampled_cases(self) -> list[SampledCase]:
        training, _ = self.get_tr_and_val_datasets()
        cases = []
        for case in training.identifiers:
            properties = training.load_case(case)[3]
            classes = tuple(
                key
                for key, voxels in properties["class_locations"].items()
                if isinstance(key, int) and key > 0 and len(voxels) > 0
            )
            source = self.dataset.source_of(case)
            cases.append(SampledCase(case, source.source, source.modality, classes))
        return cases

    def on_train_start(self) -> None:
        """Say in the log what each source annotates."""
        super().on_train_start()
        for source in self.dataset.sources() if self._has_sources else ():
            merged = [f"{key} = {'+'.join(members)}" for key, members in source.merged.items()]
            self.print_to_log_file(
                f"Source {source.source} annotates: {', '.join([*source.annotated, *merged])}"
            )

    # ---------------------------------------------------------------- losses

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if not self._has_sources:
            return loss
        inner = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
        ignore = self.label_manager.ignore_label
        grouped: nn.Module = AuthorsLoss(ignore_label=ignore, ddp=self.is_ddp)
        if self.loss_form == "nnunet":
            grouped = GroupedDiceCELoss(
                inner,
                batch_dice=self.configuration_manager.batch_dice,
                ddp=self.is_ddp,
                ignore_label=ignore,
                gamma=self.focal_gamma,
            )
        if not isinstance(loss, DeepSupervisionWrapper):
            return grouped
        loss.loss = grouped
        return loss

    def segmentation_loss(
        self, logits: Logits, target: Tensor | list[Tensor], batch: dict[str, Any]
    ) -> Tensor:
        """Return Dice + cross-entropy on the groups that each sample's source annotates."""
        if not self._has_sources:
            return super().segmentation_loss(logits, target, batch)
        table = self._representatives(batch)
        levels = [table] * len(logits) if isinstance(logits, list | tuple) else table
        return self.loss(logits, target, levels)

    def auxiliary_losses(self, batch: dict[str, Any], logits: Logits) -> dict[str, Tensor]:
        """Add the terms that are switched on, at full resolution."""
        terms = super().auxiliary_losses(batch, logits)
        if not self._has_sources:
            return terms
        full = logits[0] if isinstance(logits, list | tuple) else logits
        target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        labels = (target, self._representatives(batch))
        common: dict[str, Any] = {
            "ignore_label": self.label_manager.ignore_label,
            "ddp": self.is_ddp,
        }
        ramp, taught = self._ramp(), self._ramp(self.teacher_start)
        goal = None
        if self.teacher is not None and self._learns_from_teacher and taught > 0:
            # Before the student's softmax, which would stay in memory meanwhile.
            goal = self.teacher(batch.get("as_drawn", batch["data"]))
        if self.entropy == "conditional" or goal is not None:
            inside = OpenVoxels(full, *labels, **common)
        if self.entropy == "conditional":
            terms["conditional_entropy"] = self.entropy_weight * ramp * inside.conditional_entropy()
        elif self.entropy == "full":
            value = full_entropy(full, target, ignore_label=common["ignore_label"])
            terms["full_entropy"] = self.entropy_weight * ramp * value
        if goal is not None:
            value = inside.teacher_cross_entropy(
                goal,
                threshold=self.teacher_threshold,
                foreground_threshold=self.teacher_foreground_threshold,
            )
            terms["teacher"] = self.teacher_weight * taught * value
        if self._heads is not None:
            terms |= self._head_losses(batch, full, *labels, common)
        return terms

    def _head_losses(
        self,
        batch: dict[str, Any],
        logits: Tensor,
        target: Tensor,
        table: Tensor,
        common: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        features: Any = self._features
        self._features = None
        # Every second plane, and the others in the next step: a quarter less time.
        half = (slice(None), slice(None), slice(self.iteration % 2, None, 2))
        features, logits, target = features[half], logits[half], target[half]
        names = [source.source for source in self.dataset.sources()]
        own: list[int | None] = []
        others: list[int | None] = []
        for key, row in zip(batch["keys"], table, strict=True):
            name = self.dataset.source_of(str(key)).source
            s = names.index(name) if name in names else None
            # A case with annotations of its own has no head for them.
            own.append(s if s is not None and torch.equal(self._tables[s], row) else None)
            rest = [k for k in range(len(names)) if k != s]
            others.append(rest[int(torch.randint(len(rest), ()))] if rest else None)
        mine, asked = self._heads(features, own, others)
        groups = plain_network(self._heads).groups
        labelled = own_label_loss(mine, groups, target, own, ddp=common["ddp"])
        agreement = consistency_loss(asked, logits, self._tables, target, table, others, **common)
        return {
            "source_heads": labelled,
            "consistency": self.consistency_weight * self._ramp() * agreement,
        }

    def _ramp(self, start: float = 0.0) -> float:
        done = self.progress() - start
        if done <= 0:
            return 0.0
        return min(1.0, done / self.ramp) if self.ramp else 1.0

    # ---------------------------------------------------------------- teacher and heads

    @property
    def _learns_from_teacher(self) -> bool:
        return self.ema_teacher and self._has_sources

    def teacher_momentum(self) -> float | None:
        """Return the momentum of this option's teacher, which goes before another method's."""
        if self._learns_from_teacher:
            return forgetting_momentum(self.iteration, self.teacher_decay)
        return super().teacher_momentum()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Return optimizer and schedule, also over the source heads."""
        if not (self.source_heads and self._has_sources):
            return super().configure_optimizers()
        last = plain_network(self.network).decoder.seg_layers[-1]
        self._heads = SourceHeads(last.in_channels, self._tables.tolist()).to(self.device)

        def keep_features(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            if layer.training:  # not in a copy of the network, which evaluates only
                self._features = inputs[0]

        last.register_forward_pre_hook(keep_features)
        optimizer, scheduler = super().configure_optimizers()
        optimizer.add_param_group({"params": list(self._heads.parameters())})
        return optimizer, scheduler

    def clip_gradients(self) -> None:
        """Bound the gradients of the network and those of the heads, each by themselves."""
        super().clip_gradients()
        if self._heads is not None:
            nn.utils.clip_grad_norm_(self._heads.parameters(), GRADIENT_NORM_LIMIT)

    def after_step(self) -> None:
        """Let go of the features that a further pass may have left."""
        super().after_step()
        self._features = None

    def method_state(self) -> dict[str, Any]:
        """Return also the heads; they are not needed for prediction."""
        state = super().method_state()
        if self._heads is not None:
            state["source_heads"] = plain_network(self._heads).state_dict()
        return state

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore the heads."""
        super().load_method_state(state)
        if "source_heads" in state:
            plain_network(self._heads).load_state_dict(state["source_heads"])

    # ---------------------------------------------------------------- online validation

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count voxels for the online Dice, only for classes that a sample's source annotates."""
        if not self._has_sources:
            return super().validation_step(batch)  # type: ignore[no-any-return]
        data, target = (
            batch["data"].to(self.device, non_blocking=True),
            self._to_device(batch["target"]),
        )
        with torch.autocast("cuda") if self.device.type == "cuda" else nullcontext():
            logits = self.network(data)
            loss = self.segmentation_loss(logits, target, batch)
        if self.enable_deep_supervision:
            logits, target = logits[0], target[0]
        table = self._representatives(batch)
        scored = (table == torch.arange(table.shape[1])).to(self.device)
        counts = hard_counts(
            group_log_probabilities(logits, table),
            target,
            scored=scored,
            ignore_label=self.label_manager.ignore_label,
        )
        names = ("tp_hard", "fp_hard", "fn_hard")
        values = {name: c.cpu().numpy() for name, c in zip(names, counts, strict=True)}
        return {"loss": loss.detach().cpu().numpy(), **values}

    def _representatives(self, batch: dict[str, Any]) -> Tensor:
        """Return, shape (B, C) on the CPU, the channel that stands for each class of a sample."""
        labels = self.dataset.labels
        rows = [self.dataset.source_of(str(key)).representatives(labels) for key in batch["keys"]]
        return torch.tensor(rows)
