"""Both stages learn on toy data (spec 7.8, invariant 15)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnmosaic.pipeline.train import load_pretrained
from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.multi_rater.diversified import nnUNetTrainerMultiRaterDiversified
from nnmosaic.trainers.multi_rater.personalized import nnUNetTrainerMultiRaterPersonalized
from nnmosaic.trainers.multi_rater.set_metrics import dice_matrix, generalised_energy_distance
from nnmosaic.trainers.multi_rater.trainer import MultiRaterTrainer

DATASET = "Dataset008_Raters"
SIZE, BATCH, STEPS, HELD_OUT = 32, 4, 300, 40
CHANGES = (-2, 0, 2)
"""Pixels by which the raters' discs are larger than what is seen."""


def discs(generator: np.random.Generator, cases: int) -> tuple[Tensor, Tensor]:
    """Return noisy images (B, 1, H, W) of a bright and a dark disc, and labels (B, R, H, W)."""
    grid = np.stack(np.mgrid[:SIZE, :SIZE], -1)
    images = 0.3 * generator.standard_normal((cases, 1, SIZE, SIZE))
    labels = np.zeros((cases, len(CHANGES), SIZE, SIZE), np.int64)
    for b in range(cases):
        for k, (column, value) in enumerate(((8, 1), (24, -1)), 1):
            place = np.array([generator.uniform(8, 24), column + generator.uniform(-1, 1)])
            distance = np.sqrt(((grid - place) ** 2).sum(-1))
            radius = generator.uniform(3.5, 5.5)
            images[b, 0][distance < radius] += value
            for r, change in enumerate(CHANGES):
                labels[b, r][distance < radius + change] = k
    return torch.from_numpy(images).float(), torch.from_numpy(labels)


def learn(trainer: Any, seed: int) -> None:
    """Train on discs, each seen once."""
    trainer.network.train()
    trainer._available = {"discs": torch.ones(len(CHANGES), dtype=torch.bool)}
    scales = trainer._get_deep_supervision_scales()
    steps = [1] if scales is None else [round(1 / scale[0]) for scale in scales]
    generator = np.random.default_rng(seed)
    for step in range(STEPS):
        trainer.lr_scheduler.step(step * trainer.num_epochs / STEPS)
        images, labels = discs(generator, BATCH)
        stack = torch.cat([labels[:, 1:2], labels], 1)  # the fused labels come first
        if not isinstance(trainer, MultiRaterTrainer):
            stack = stack[:, :1]
        levels = [stack[..., ::n, ::n] for n in steps]
        target = stack if scales is None else levels
        trainer.train_step({"data": images, "target": target, "keys": ["discs"] * BATCH})
    trainer.network.eval()
    trainer.set_deep_supervision_enabled(False)


def mean_ged(network: Any, images: Tensor, labels: Tensor) -> float:
    """Return GED of 10 samples, mean over classes and cases."""
    noise = torch.randn(10, len(images), network.latent, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prior, features = network.prior(images), network.features(images)[0]
        samples = network.decoder.seg_layers[-1](features, prior.sample(noise), prior.mean)
        samples = samples.argmax(2)
    return float(np.mean([
        generalised_energy_distance((drawn == k).numpy(), (found == k).numpy())
        for k in (1, 2)
        for drawn, found in zip(labels, samples.transpose(0, 1), strict=True)
    ]))  # fmt: skip


def strict_dice(labels: Tensor, predicted: Tensor) -> float:
    """Return the Dice of each mask with its own rater's, mean over classes, raters and cases."""
    pairs = [
        dice_matrix((drawn[r : r + 1] == k).numpy(), (found[r : r + 1] == k).numpy())
        for drawn, found in zip(labels, predicted, strict=True)
        for r in range(len(CHANGES))
        for k in (1, 2)
    ]
    return float(np.mean(pairs))


@pytest.mark.parametrize(("seed", "pretrained"), [(0, False), (1, False), (2, False), (0, True)])
def test_discs(make_trainer: Callable[..., Any], seed: int, pretrained: bool) -> None:
    images, labels = discs(np.random.default_rng(100), HELD_OUT)

    def untrained(cls: type, weights: Path | None = None, **options: str) -> Any:
        trainer = make_trainer(
            cls, DATASET, "2d", seed=seed, options=options, optimizer="adamw", initial_lr=5e-3
        )
        if weights is None:
            trainer.initialize()
        else:
            load_pretrained(trainer, weights)
        return trainer

    weights = None
    if pretrained:
        plain = untrained(nnUNetTrainerMosaic)
        learn(plain, seed)
        weights = Path(plain.output_folder) / "plain.pth"
        plain.save_checkpoint(str(weights))
    first = untrained(nnUNetTrainerMultiRaterDiversified, weights)
    of_peer = dict.fromkeys(("bound_weight", "energy_weight", "mean_opinion_weight"), "0")
    peer = untrained(nnUNetTrainerMultiRaterDiversified, **of_peer)
    for trainer in (first, peer):
        learn(trainer, seed)
    ours, probabilistic = (mean_ged(t.network, images, labels) for t in (first, peer))
    assert ours < probabilistic

    second = untrained(nnUNetTrainerMultiRaterPersonalized)
    second.network.load_state_dict(first.network.state_dict())
    learn(second, seed)
    with torch.no_grad():
        masks = second.network(images, of_raters=True).argmax(2).transpose(0, 1)
    areas = (masks[..., None] == torch.tensor([1, 2])).sum((2, 3))
    assert (areas.diff(dim=1) > 0).all(1).float().mean() > 0.95
    # No single mask is nearer to all raters than the one in the middle, which is exact here.
    fused = labels[:, 1:2].expand_as(labels)
    assert strict_dice(labels, masks) > strict_dice(labels, fused) + 0.03
