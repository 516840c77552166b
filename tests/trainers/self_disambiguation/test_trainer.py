"""The trainer for partial labels: its loss, what it counts, and that it learns both classes."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.self_disambiguation.loss import GroupedDiceCELoss
from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation

PARTIAL = "Dataset007_Merged"
Make = Callable[..., Any]


@pytest.fixture
def started(make_trainer: Make) -> Any:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL)
    trainer.on_train_start()
    return trainer


def test_the_loss_of_a_batch_is_the_weighted_grouped_loss(started: Any) -> None:
    batch = next(started.dataloader_train)
    logits = started.network(batch["data"])
    grouped = started.loss.loss
    assert isinstance(grouped, GroupedDiceCELoss)
    table = torch.tensor(
        [[0, 1, 0] if key.startswith("Bright") else [0, 0, 2] for key in batch["keys"]]
    )
    levels = len(logits)
    weights = np.array([0.5**i for i in range(levels)])
    weights[-1] = 0  # nnU-Net leaves out the lowest resolution
    weights /= weights.sum()
    expected = sum(
        w * grouped(level, target, table)
        for w, level, target in zip(weights, logits, batch["target"], strict=True)
        if w
    )
    got = started.segmentation_loss(logits, batch["target"], batch)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    stock = nnUNetTrainerMosaic._build_loss(started)(logits, batch["target"])
    assert abs(stock.item() - got.item()) > 0.01


def test_online_dice_counts_a_class_only_in_its_source(started: Any) -> None:
    batch = next(started.dataloader_train)
    keys = [f"{source}_case00" for source in ("Bright", "Dark")]
    target = [level.clone().zero_() for level in batch["target"]]
    target[0][0, 0, :3], target[0][1, 0, :3] = 1, 2
    logits = torch.zeros(2, 3, *target[0].shape[2:])
    logits[:, 1, 3:6], logits[:, 2, 6:9], logits[:, 0, 9:] = 1, 1, 1
    logits[0, 1, :3], logits[1, 2, :3] = 1, 1
    started.network = lambda _: [logits, *([logits[..., ::2, ::2, ::2]] * (len(target) - 1))]
    started.segmentation_loss = lambda *_: torch.zeros(())
    counts = started.validation_step({"data": batch["data"], "target": target, "keys": keys})
    plane = target[0][0, 0, 0].numel()
    # Planes 3-5 say "bright", 6-8 "dark"; each is wrong only where that class was looked for.
    assert counts["tp_hard"].tolist() == [3 * plane, 3 * plane]
    assert counts["fp_hard"].tolist() == [3 * plane, 3 * plane]
    assert counts["fn_hard"].tolist() == [0, 0]


def test_conditional_entropy_is_a_term_only_when_switched_on(started: Any) -> None:
    batch = next(started.dataloader_train)
    logits = [level.detach().requires_grad_() for level in started.network(batch["data"])]
    assert started.auxiliary_losses(batch, logits) == {}
    started.conditional_entropy_weight, started.conditional_entropy_ramp = 2.0, 1.0
    first = started.auxiliary_losses(batch, logits)["conditional_entropy"]
    started.current_epoch = started.num_epochs - 1
    last = started.auxiliary_losses(batch, logits)["conditional_entropy"]
    assert 0 < first.item() < last.item() <= 2 * np.log(2) + 1e-6
    assert last.item() == pytest.approx(first.item() * started.num_epochs)


@pytest.mark.slow
def test_both_classes_are_learnt_from_two_half_labelled_sources(make_trainer: Make) -> None:
    """T21: the argmax holds both classes on both sources; plain nnU-Net loses them."""
    dice = {}
    for cls in (nnUNetTrainerSelfDisambiguation, nnUNetTrainerMosaic):
        trainer = make_trainer(
            cls,
            PARTIAL,
            epochs=3,
            iterations_per_epoch=30,
            optimizer="adamw",
            initial_lr=1e-2,
            seed=4,
        )
        trainer.run_training()
        trainer.set_deep_supervision_enabled(False)
        trainer.network.eval()
        dice[cls] = full_dice(trainer)
    assert dice[nnUNetTrainerSelfDisambiguation].min() > 0.6
    assert dice[nnUNetTrainerMosaic].min() < 0.4


def full_dice(trainer: Any) -> np.ndarray:
    """Return Dice of (source, class) against what can be seen: bright > 150, dark < 70."""
    batches: dict[str, list[torch.Tensor]] = {"Bright": [], "Dark": []}
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder)
    for key in dataset.identifiers:
        data, _, _, _ = dataset.load_case(key)
        batches[key.split("_")[0]].append(torch.from_numpy(data[:].astype(np.float32))[None])
    scores = np.zeros((2, 2))
    for row, images in enumerate(batches.values()):
        for image in images:
            size = [16 * (n // 16) for n in image.shape[2:]]
            image = image[..., : size[0], : size[1], : size[2]]
            with torch.no_grad():
                found = trainer.network(image).argmax(1)[0]
            values = image[0, 0]
            for column, truth in enumerate((values > 1.5, values < -1.5)):
                hit = found == column + 1
                overlap = (hit & truth).sum().item()
                scores[row, column] += 2 * overlap / (hit.sum() + truth.sum()).item() / len(images)
    return scores
