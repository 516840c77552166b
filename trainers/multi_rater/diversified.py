"""First stage for many raters (multi_rater_personalization.md, 2.2, generalised as in 2.4)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from nnmosaic.trainers.multi_rater.loss import (
    bound_loss,
    draw_raters,
    energy_set_loss,
    gaussian_kl,
    of_raters,
    posterior_input,
)
from nnmosaic.trainers.multi_rater.network import Diversified
from nnmosaic.trainers.multi_rater.trainer import MultiRaterTrainer
from nnmosaic.trainers.multi_rater.wanted_masks import WantedMasks
from nnmosaic.trainers.resumable import plain_network

VALIDATION_SAMPLES = 10


class nnUNetTrainerMultiRaterDiversified(MultiRaterTrainer):
    """First stage: masks as different as the raters are (2.2, generalised as in 2.4).

    It trains for 200 epochs (7.5), unless told otherwise, and without the released code's penalty
    on weights beside nnU-Net's weight decay. Three defaults differ from the released code, where
    the divergence drops to 0 within an epoch and the code says nothing of who drew a mask: a
    smaller `kl_weight`, a `posterior` that sees the mask to be learnt, and the `energy_weight`. It
    has no `mean_opinion_weight`, which keeps the mean opinion a good nnU-Net.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "kl_weight", "mean_opinion_weight", "bound_weight", "bound_cross_entropy", "energy_weight",
        "posterior", "rater_draw",
    )  # fmt: skip

    kl_weight: float = 0.01
    """Of the divergence of the posterior from the prior; the other terms are means over voxels."""
    mean_opinion_weight: float = 1.0
    """Of the fused labels in the mean opinion, which is what nnU-Net's tools predict."""
    bound_weight: float = 0.5
    """Of the union and intersection of the raters; without it, the energy and the mean opinion,
    it is a probabilistic U-Net."""
    bound_cross_entropy: float = 0.0
    """Weight of cross-entropy beside Dice in the bound; 1 is advised for small lesions."""
    energy_weight: float = 1.0
    """Of the energy distance between samples and raters (6), which also sees what lies between."""
    posterior: Literal["all", "sampled"] = "sampled"
    """Whether the posterior sees every rater, or only the one whose mask is learnt."""
    rater_draw: Literal["uniform", "balanced"] = "uniform"
    """Which rater is learnt: any who annotated the case, or more often those with few cases."""

    trains_heads = False
    default_epochs = 200

    def take_pretrained(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over the output layers, too, of a model of the same labels."""
        if self.has_same_labels(checkpoint):
            plain_network(self.network).take_output_layers(checkpoint["network_weights"])

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
        drawn = of_raters(batch["target"], 1 + raters)  # the fused labels come first
        distance = gaussian_kl(*found.posterior, *found.prior).mean()
        terms = {
            "segmentation": self.segmentation_loss(found.logits, drawn, batch),
            "kl": self.kl_weight * distance,
        }
        if self.mean_opinion_weight:
            fused = of_raters(batch["target"], torch.zeros_like(raters))
            loss = self.segmentation_loss(found.mean_opinion, fused, batch)
            terms["mean_opinion"] = self.mean_opinion_weight * loss
        probabilities = found.samples.softmax(2)
        if self.bound_weight:
            terms["bound"] = self.bound_weight * bound_loss(
                probabilities, labels, available, cross_entropy=self.bound_cross_entropy
            )
        if self.energy_weight:
            energy = energy_set_loss(probabilities, labels, available)
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


def _dice_of_pairs(first: Tensor, second: Tensor) -> Tensor:
    """Return Dice of each pair of masks, shape (n, m); 1 where both are empty."""
    a, b = first.float(), second.float()
    common, total = a @ b.T, a.sum(1)[:, None] + b.sum(1)
    return torch.where(total > 0, 2 * common / total.clamp_min(1), 1)
