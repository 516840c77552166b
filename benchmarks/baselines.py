"""Peers of the methods as trainers, for comparison only; nothing in the package uses them.

Importing this module makes them known to the ``nnmosaic`` commands of the same process.
"""

from typing import Any, ClassVar

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn
from torch.nn import functional

from nnmosaic.trainers import TRAINERS
from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.multi_rater.dataset import RaterDataset
from nnmosaic.trainers.multi_rater.loss import draw_raters, of_raters
from nnmosaic.trainers.multi_rater.trainer import MultiRaterTrainer
from nnmosaic.trainers.options import Count
from nnmosaic.trainers.self_disambiguation.loss import (
    group_log_probabilities,
    grouped_cross_entropy,
)
from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation


class MarginalCrossEntropy(nn.Module):
    """Cross-entropy on merged probabilities, without a Dice term (Shi et al., MedIA 2021)."""

    def forward(self, logits: Tensor, target: Tensor, representatives: Tensor) -> Tensor:
        """Return the loss of one resolution; shapes as in `GroupedDiceCELoss`."""
        return grouped_cross_entropy(group_log_probabilities(logits, representatives), target)


class MaskedSigmoidLoss(nn.Module):
    """One sigmoid per class; Dice and binary cross-entropy on what a source annotates only.

    In the manner of MultiTalent (Ulrich et al., MICCAI 2023): Dice over the batch, no term at all
    for a class in the samples of a source that does not annotate it.
    """

    def forward(self, logits: Tensor, target: Tensor, representatives: Tensor) -> Tensor:
        """Return the loss of one resolution; shapes as in `GroupedDiceCELoss`."""
        axes = tuple(range(2, logits.ndim))
        classes = torch.arange(1, representatives.shape[1])
        scored = (representatives[:, 1:] == classes).to(logits)
        truth = torch.cat([(target == int(c)) for c in classes], 1).to(logits)
        z = logits[:, 1:]
        bce = functional.binary_cross_entropy_with_logits(z, truth, reduction="none").mean(axes)
        p = torch.sigmoid(z)
        hits, found, present = ((part.sum(axes) * scored).sum(0) for part in (p * truth, p, truth))
        seen = scored.sum(0) > 0
        dice = ((2 * hits + 1e-5) / (found + present + 1e-5))[seen].mean()
        return (bce * scored).sum() / scored.sum() - dice


class _OtherLoss(nnUNetTrainerSelfDisambiguation):
    """Self-disambiguation's data and sampling with another loss."""

    other_loss: ClassVar[type[nn.Module]]

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if not isinstance(loss, DeepSupervisionWrapper):
            return self.other_loss()
        loss.loss = self.other_loss()
        return loss


class nnUNetTrainerMarginalCrossEntropy(_OtherLoss):
    """The marginal cross-entropy alone."""

    other_loss = MarginalCrossEntropy


class nnUNetTrainerMaskedSigmoid(_OtherLoss):
    """Sigmoids; the background's logit is 0, so that nnU-Net's argmax is their threshold of 0.5."""

    other_loss = MaskedSigmoidLoss

    def initialize(self) -> None:
        """Set the background channel of every output to 0; the loss never changes it."""
        super().initialize()
        network: Any = self.network
        with torch.no_grad():
            for layer in network.decoder.seg_layers:
                layer.weight[0] = 0
                layer.bias[0] = 0


class nnUNetTrainerRandomRater(MultiRaterTrainer):
    """Plain nnU-Net that learns the mask of one rater in each sample, drawn anew each time."""

    trains_heads = False
    build_network_architecture = staticmethod(nnUNetTrainerMosaic.build_network_architecture)
    perform_actual_validation = nnUNetTrainerMosaic.perform_actual_validation

    def _terms(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        raters = draw_raters(self._annotations(batch)[1])
        target = batch["target"]
        maps = [level[:, 1:] for level in target] if isinstance(target, list) else target[:, 1:]
        logits = self.network(batch["data"])
        loss = self.segmentation_loss(logits, of_raters(maps, raters), batch)
        return {"segmentation": loss}, logits[0] if isinstance(logits, list) else logits

    def _pairs(self, answer: Tensor, labels: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        found = answer.argmax(1)[:, None].expand_as(labels)
        return found[available].flatten(1), labels[available].flatten(1)


class nnUNetTrainerOneRater(nnUNetTrainerRandomRater):
    """Plain nnU-Net that learns the masks of one rater, who annotated every case."""

    OPTIONS: ClassVar[tuple[str, ...]] = ("rater",)
    rater: Count = Count(1)

    def get_tr_and_val_datasets(self) -> tuple[RaterDataset, RaterDataset]:
        """Return nnU-Net's datasets, without the other raters."""
        datasets = super().get_tr_and_val_datasets()
        for available in self._available.values():
            available[: self.rater - 1] = False
            available[self.rater :] = False
        return datasets


class SoftLabelLoss(nn.Module):
    """nnU-Net's Dice and cross-entropy on the share of the raters who gave each class."""

    def __init__(self, dice: nn.Module) -> None:
        super().__init__()
        self.dice = dice

    def forward(self, logits: Tensor, shares: Tensor) -> Tensor:
        """Return the loss of one resolution; both are (B, C, *spatial)."""
        loss: Tensor = self.dice(logits, shares) + functional.cross_entropy(logits, shares)
        return loss


class nnUNetTrainerSoftMean(nnUNetTrainerRandomRater):
    """Plain nnU-Net that learns the soft mean of the raters (multi_rater spec, 7.5 e)."""

    def _build_loss(self) -> nn.Module:
        loss: Any = super()._build_loss()
        if not isinstance(loss, DeepSupervisionWrapper):
            return SoftLabelLoss(loss.dc)
        loss.loss = SoftLabelLoss(loss.loss.dc)
        return loss

    def _terms(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        available = self._annotations(batch)[1]
        target = batch["target"]
        levels = target if isinstance(target, list) else [target]
        shares = [self._shares(level[:, 1:], available) for level in levels]
        logits = self.network(batch["data"])
        loss = self.segmentation_loss(
            logits, shares if isinstance(target, list) else shares[0], batch
        )
        return {"segmentation": loss}, logits[0] if isinstance(logits, list) else logits

    def _shares(self, labels: Tensor, available: Tensor) -> Tensor:
        classes = torch.arange(self.label_manager.num_segmentation_heads, device=labels.device)
        there = available.view(*available.shape, *[1] * (labels.dim() - 2))
        return torch.stack([((labels == k) & there).sum(1) / there.sum(1) for k in classes], 1)


for _trainer in (
    nnUNetTrainerMarginalCrossEntropy, nnUNetTrainerMaskedSigmoid, nnUNetTrainerRandomRater,
    nnUNetTrainerOneRater, nnUNetTrainerSoftMean,
):  # fmt: skip
    TRAINERS[_trainer.__name__] = __name__  # type: ignore[index]
