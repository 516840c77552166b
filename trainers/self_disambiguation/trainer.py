"""Trainer for many sources that each annotate only some classes, or merged ones."""

from contextlib import nullcontext
from typing import Any

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn

from nnmosaic.trainers.base import Logits, nnUNetTrainerMosaic
from nnmosaic.trainers.self_disambiguation.loss import (
    GroupedDiceCELoss,
    conditional_entropy,
    group_log_probabilities,
    hard_counts,
)


class nnUNetTrainerSelfDisambiguation(nnUNetTrainerMosaic):
    """nnU-Net that knows what each source annotates (methods/self_disambiguation.md, 2.8).

    What a source leaves out is "background or one of these classes" in its cases, never background.
    Where ``dataset.json`` declares no ``partial_labels``, this is `nnUNetTrainerMosaic`, bit for
    bit.
    """

    conditional_entropy_weight: float = 0.0
    """Weight of the entropy inside ambiguous groups (2.9); off until its use has been measured."""
    conditional_entropy_ramp: float = 0.15
    """Fraction of the epochs over which that weight rises from 0."""

    def on_train_start(self) -> None:
        """Say in the log what each source annotates."""
        super().on_train_start()
        for source in self.dataset.sources() if self.dataset.partial_labels else ():
            merged = [f"{key} = {'+'.join(members)}" for key, members in source.merged.items()]
            self.print_to_log_file(
                f"Source {source.source} annotates: {', '.join([*source.annotated, *merged])}"
            )

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if self.dataset.partial_labels is None:
            return loss
        inner = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
        grouped = GroupedDiceCELoss(
            inner,
            batch_dice=self.configuration_manager.batch_dice,
            ddp=self.is_ddp,
            ignore_label=self.label_manager.ignore_label,
        )
        if not isinstance(loss, DeepSupervisionWrapper):
            return grouped
        loss.loss = grouped
        return loss

    def segmentation_loss(
        self, logits: Logits, target: Tensor | list[Tensor], batch: dict[str, Any]
    ) -> Tensor:
        """Return Dice + cross-entropy on the groups that each sample's source annotates."""
        if self.dataset.partial_labels is None:
            return super().segmentation_loss(logits, target, batch)
        table = self._representatives(batch)
        levels = [table] * len(logits) if isinstance(logits, list | tuple) else table
        return self.loss(logits, target, levels)

    def auxiliary_losses(self, batch: dict[str, Any], logits: Logits) -> dict[str, Tensor]:
        """Add the conditional entropy at full resolution, where it is switched on."""
        terms = super().auxiliary_losses(batch, logits)
        if self.conditional_entropy_weight > 0 and self.dataset.partial_labels is not None:
            full = logits[0] if isinstance(logits, list | tuple) else logits
            target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
            entropy, ambiguous = conditional_entropy(
                full,
                target,
                self._representatives(batch).to(full.device),
                ignore_label=self.label_manager.ignore_label,
            )
            ramp = min(
                1.0, (self.current_epoch + 1) / (self.conditional_entropy_ramp * self.num_epochs)
            )
            mean = entropy.sum() / ambiguous.sum().clamp_min(1)
            terms["conditional_entropy"] = self.conditional_entropy_weight * ramp * mean
        return terms

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Count voxels for the online Dice, only for classes that a sample's source annotates."""
        if self.dataset.partial_labels is None:
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
