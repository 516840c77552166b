"""Trainer whose network must write hidden organs into its output."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.base import Pass, sum_of
from nnmosaic.trainers.context_reconstruction.loss import ReconstructionForm, reconstruction_loss
from nnmosaic.trainers.context_reconstruction.masking import (
    Fill,
    MaskKind,
    block_size,
    check_ratio,
    draw_mask,
    filler,
    foreground_of_cells,
    to_voxels,
)
from nnmosaic.trainers.context_reconstruction.schedule import cosine_momentum, warmup_momentum
from nnmosaic.trainers.ema_teacher import TeacherTrainer, forgetting_momentum
from nnmosaic.trainers.generator import generator_of
from nnmosaic.trainers.options import Count, Fraction, Positive
from nnmosaic.trainers.resumable import plain_network

MEASURED_WEIGHT = 0.5
"""Of the teacher, in benchmarks/context_reconstruction.py."""
OF_THE_TEACHER = (
    "reconstruction", "reconstruction_goal", "reconstruction_region", "reconstruction_ramp",
    "temperature", "momentum", "momentum_base", "momentum_warmup",
)  # fmt: skip
"""Options that say something about it only."""
RELEASED_WARMUP = 20
"""Epochs: the released code says 10 and counts twice as many iterations as an epoch has (1.5)."""


class nnUNetTrainerContextReconstruction(TeacherTrainer):
    """nnU-Net with a second pass on masked patches (methods/context_reconstruction.md).

    The pass learns from the complete labels (1.4), and, with a `reconstruction_weight`, from a
    moving average of the network that sees the whole patch. Prediction is plain nnU-Net's. With
    both weights 0, or with more than few training cases, this is `nnUNetTrainerMosaic`, bit for
    bit.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "mask_kind", "mask_ratio", "mask_min_cells", "mask_fill", "mask_foreground",
        "mask_per_sample", "mask_curriculum", "masked_weight", "masked_fraction", "every_k",
        "few_cases",
        "reconstruction", "reconstruction_weight", "reconstruction_goal", "reconstruction_region",
        "reconstruction_ramp", "temperature", "momentum", "momentum_base", "momentum_warmup",
    )  # fmt: skip

    mask_kind: MaskKind = "block"
    """Columns through the patch along its first axis, single cells, or columns along any axis."""
    mask_ratio: Fraction = Fraction(0.4)
    """Fraction of the cells that is hidden."""
    mask_min_cells: Count = Count(5)
    """A cell is the largest product of the network's strides that leaves this many per axis."""
    mask_fill: Fill = "foreign"
    """What stands at hidden voxels: 0, noise, or another sample of the batch; of one sample 0."""
    mask_foreground: bool = False
    """Hide cells full of foreground ten times as often as empty ones."""
    mask_per_sample: bool = True
    """Draw for every sample; otherwise one mask for the batch, as released."""
    mask_curriculum: bool = False
    """Let the ratio rise over the training, from a third of itself."""
    masked_weight: float = 1.0
    """Of the labels in the masked pass."""
    masked_fraction: Fraction = Fraction(1.0)
    """Share of the batch that is masked; at least one sample."""
    every_k: Count = Count(2)
    """The masked pass takes place in every k-th iteration."""
    few_cases: Count = Count(4)
    """With more training cases there is no masked pass: with 2 and 4 it gained accuracy, with 8
    none, and with 143 it cost some (benchmarks/results/context_reconstruction.md)."""
    reconstruction: ReconstructionForm = "kl"
    """How student and teacher are compared; see `reconstruction_loss`."""
    reconstruction_weight: float = 0.0
    """Of the teacher in the masked pass; off, since it added nothing to the labels there
    (benchmarks/results/context_reconstruction.md)."""
    reconstruction_goal: Literal["teacher", "complement"] = "teacher"
    """Learn from the teacher; or, without one, from the same patch with the opposite holes (7.5).
    """
    reconstruction_region: Literal["all", "hidden"] = "all"
    """Voxels at which the goal counts."""
    reconstruction_ramp: Fraction = Fraction(0.1)
    """Fraction of the training over which the teacher's weight rises from 0."""
    temperature: Positive = Positive(1.0)
    momentum: Literal["cosine", "mean_teacher", "released"] = "cosine"
    """Of the teacher: from 0 to base, then to 1 (1.5); up to base; or the released code's."""
    momentum_base: Fraction = Fraction(0.996)
    momentum_warmup: Fraction = Fraction(0.01)
    """Fraction of the training over which the momentum rises to its base."""

    def initialize(self) -> None:
        """Initialise, and check what the options ask of plan and batch."""
        super().initialize()
        changed = [n for n in OF_THE_TEACHER if getattr(self, n) != getattr(type(self), n)]
        if changed and self.reconstruction_weight == 0:
            raise InputError(
                f"--set {changed[0]}={getattr(self, changed[0])} changes nothing without a "
                f"teacher. Add reconstruction_weight={MEASURED_WEIGHT}, or leave it out."
            )
        if not self._has_few_cases and (self.masked_weight > 0 or self.reconstruction_weight > 0):
            cases = len(self.do_split()[0])
            self.print_to_log_file(
                f"{cases} training cases, more than few_cases={self.few_cases}: there is no masked "
                f"pass. --set few_cases={cases} turns it on."
            )
        if self._has_masked_pass:
            if self.batch_size < 2 and self._complementary:
                raise InputError(
                    "--set reconstruction_goal=complement needs a batch of at least 2 samples on "
                    "every GPU. Leave it out."
                )
            if self.mask_fill == "foreign" and self.batch_size < 2:
                self.print_to_log_file("A batch of one: hidden voxels are 0, not foreign tissue")
            grid = self._grid
            try:
                for ratio in (self.mask_ratio, self._ratio_at(0)):
                    check_ratio(grid, ratio, self.mask_kind)
            except ValueError as error:
                raise InputError(f"--set mask_ratio={self.mask_ratio:g}: {error}") from None

    # ---------------------------------------------------------------- the masked pass

    @cached_property
    def _has_few_cases(self) -> bool:
        return len(self.do_split()[0]) <= self.few_cases

    @property
    def _has_masked_pass(self) -> bool:
        return self._has_few_cases and (self.masked_weight > 0 or self.reconstruction_weight > 0)

    @property
    def _fill(self) -> Fill:
        return "zero" if self.mask_fill == "foreign" and self.batch_size < 2 else self.mask_fill

    @property
    def _complementary(self) -> bool:
        return self.reconstruction_goal == "complement" and self.reconstruction_weight > 0

    @property
    def _has_teacher_term(self) -> bool:
        has_weight = self._has_few_cases and self.reconstruction_weight > 0
        return has_weight and self.reconstruction_goal == "teacher"

    @cached_property
    def _block(self) -> tuple[int, ...]:
        manager = self.configuration_manager
        return block_size(
            manager.patch_size, manager.pool_op_kernel_sizes, min_cells=self.mask_min_cells
        )

    @cached_property
    def _grid(self) -> tuple[int, ...]:
        patch = self.configuration_manager.patch_size
        return tuple(n // b for n, b in zip(patch, self._block, strict=True))

    def further_passes(self, batch: dict[str, Any]) -> list[Pass]:
        """Add the masked pass, in every k-th iteration."""
        passes = super().further_passes(batch)
        if self._has_masked_pass and self.iteration % self.every_k == 0:
            passes.append(partial(self._masked_pass, batch))
        return passes

    def _masked_pass(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        counter = (self.run_settings.seed or 0, self.local_rank, self.iteration)
        batch = self._some_samples(batch, generator_of(*counter, 0))
        target = batch["target"]
        full_target = target[0] if isinstance(target, list) else target
        hidden = self._hidden(full_target, generator_of(*counter, 1))
        if self._complementary:
            hidden[len(hidden) // 2 :] = ~hidden[: len(hidden) // 2]
        filled = filler(
            batch["data"],
            self._fill,
            generator=lambda: generator_of(*counter, 2, device=self.device),
            others=batch["others"],
            label_channels=len(self.label_manager.foreground_labels) if self.is_cascaded else 0,
        )
        # Before the masked pass, whose activations would stay in memory meanwhile.
        goal = None
        if self.teacher is not None and self._has_teacher_term:
            goal = self.teacher(batch["data"])
        with _frozen_running_statistics(self.network):
            logits = self.network(torch.where(hidden, filled, batch["data"]))
        terms = {}
        if self.masked_weight > 0:
            loss = self.segmentation_loss(logits, target, batch)
            terms["masked"] = self.masked_weight * loss
        elif self.is_ddp and isinstance(logits, list | tuple):
            # DDP waits for a gradient of every parameter, those of the lower resolutions, too.
            terms["masked"] = 0 * sum_of({str(i): level.mean() for i, level in enumerate(logits)})
        full = logits[0] if isinstance(logits, list | tuple) else logits
        if self._complementary:
            goal = full.detach().roll(len(full) // 2, 0)
        if goal is not None:
            value = reconstruction_loss(
                full,
                goal,
                form=self.reconstruction,
                temperature=self.temperature,
                regions=self.label_manager.has_regions,
                where=hidden if self.reconstruction_region == "hidden" else None,
                ddp=self.is_ddp,
            )
            terms["reconstruction"] = (
                self.reconstruction_weight * self._reconstruction_ramp() * value
            )
        return terms

    def _some_samples(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the samples that are masked, each beside the next one of the batch in "others"."""
        data = batch["data"]
        samples = len(data)
        batch = {**batch, "others": data.roll(-1, 0) if self._fill == "foreign" else data}
        number = max(1, round(self.masked_fraction * samples))
        if self._complementary:
            number = max(1, number // 2)
        if number == samples:
            return batch
        chosen = torch.randperm(samples, generator=generator)[:number].sort().values
        if self._complementary:
            chosen = chosen.repeat(2)
        index = chosen.to(data.device)
        target = batch["target"]
        return {
            **batch,
            "data": data[index],
            "others": batch["others"][index],
            "target": [t[index] for t in target] if isinstance(target, list) else target[index],
            "keys": [batch["keys"][i] for i in chosen.tolist()],
        }

    def _hidden(self, target: Tensor, generator: torch.Generator) -> Tensor:
        """Return the hidden voxels, bool of shape (B, 1, *spatial), on the device."""
        samples = len(target) if self.mask_per_sample else 1
        foreground = None
        if self.mask_foreground:
            labels = self.label_manager
            if labels.has_regions and labels.has_ignore_label:
                target = target[:, :-1]  # the last channel says where voxels are ignored
            foreground = foreground_of_cells(target, self._block, ignore_label=labels.ignore_label)
        cells = self._draw(samples, generator, foreground)
        hidden = to_voxels(cells.to(self.device, non_blocking=True), self._block)
        return hidden.repeat(len(target) // samples, *[1] * (hidden.dim() - 1))

    def _draw(self, samples: int, generator: torch.Generator, foreground: Tensor | None) -> Tensor:
        return draw_mask(
            self._grid,
            samples,
            ratio=self._ratio_at(self.progress()),
            kind=self.mask_kind,
            generator=generator,
            foreground=foreground,
        )

    # ---------------------------------------------------------------- schedules

    def _ratio_at(self, progress: float) -> float:
        return self.mask_ratio * ((1 + 2 * progress) / 3 if self.mask_curriculum else 1)

    def _reconstruction_ramp(self) -> float:
        ramp = self.reconstruction_ramp
        return min(1.0, self.progress() / ramp) if ramp else 1.0

    def teacher_momentum(self) -> float | None:
        """Return the momentum of the schedule that was chosen."""
        if not self._has_teacher_term:
            return super().teacher_momentum()
        if self.momentum == "mean_teacher":
            return forgetting_momentum(self.iteration, self.momentum_base)
        if self.momentum == "released":
            in_epoch = self.iteration % self.num_iterations_per_epoch
            warmup = RELEASED_WARMUP * self.num_iterations_per_epoch
            return warmup_momentum(in_epoch, base=self.momentum_base, warmup=warmup)
        total = self.num_epochs * self.num_iterations_per_epoch
        warmup = max(2, round(self.momentum_warmup * total))
        done = max(self.iteration, round(self.progress() * total) - 1)
        return cosine_momentum(done, total, base=self.momentum_base, warmup=warmup)


@contextmanager
def _frozen_running_statistics(network: nn.Module) -> Iterator[None]:
    """Keep masked patches out of the running statistics of batch normalisation."""
    layers = [
        layer
        for layer in plain_network(network).modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
    ]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
