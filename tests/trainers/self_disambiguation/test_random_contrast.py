"""Random contrast: what it keeps, what it changes, and where it stands in the augmentation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from nnmosaic.trainers.self_disambiguation.random_contrast import RandomContrastTransform, mapped
from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation


@pytest.fixture
def image() -> torch.Tensor:
    """Air and three tissues, of which the second and third are near each other."""
    channel = torch.full((16, 16, 16), -1.0)
    channel[4:, :, :], channel[8:, :, :], channel[12:, :, :] = 0.5, 0.6, 3.0
    return channel


def test_a_curve_sets_every_tissue_and_keeps_air_and_moments(image: torch.Tensor) -> None:
    # The median of what is not air is the second tissue: it becomes the brightest.
    new = mapped(image, np.array([0, 0.5, 1]), np.array([0, 1, 0.2]))
    levels = [new[plane, 0, 0].item() for plane in (0, 4, 8, 12)]
    assert levels[0] == new.min()
    assert levels[2] == new.max()
    assert levels[3] < levels[1]
    assert new.mean().item() == pytest.approx(image.mean().item(), abs=1e-5)
    assert new.std().item() == pytest.approx(image.std().item(), rel=1e-3)
    share = (levels[3] - levels[0]) / (levels[2] - levels[0])
    assert share == pytest.approx(0.2, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_an_image_without_contrast_stays(value: float) -> None:
    flat = torch.full((4, 4), value)
    assert torch.equal(mapped(flat, np.array([0, 0.5, 1]), np.array([0, 1, 0.5])), flat)


def test_channels_have_curves_of_their_own(image: torch.Tensor) -> None:
    torch.manual_seed(0)
    segmentation = torch.ones(1, 16, 16, 16)
    found = RandomContrastTransform()(image=torch.stack([image, image]), segmentation=segmentation)
    assert found["image"].shape == (2, 16, 16, 16)
    assert not torch.allclose(*found["image"])
    assert torch.equal(found["segmentation"], segmentation)
    torch.manual_seed(0)
    again = RandomContrastTransform()(image=torch.stack([image, image]))
    assert torch.equal(again["image"], found["image"])


@pytest.mark.parametrize(
    ("dataset", "probability"), [("Dataset007_Merged", 0.5), ("Dataset004_Balls", None)]
)
def test_it_follows_the_spatial_part_where_sources_are_declared(
    make_trainer: Callable[..., Any], dataset: str, probability: float | None
) -> None:
    options = {"random_contrast": "0.5"}
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, dataset, options=options)
    trainer.initialize()
    training, _ = trainer.get_dataloaders()
    steps = training.data_loader.transforms.transforms
    found = {
        type(step.transform).__name__: (place, step.apply_probability)
        for place, step in enumerate(steps)
        if isinstance(step, RandomTransform)
    }
    if probability is None:
        assert "RandomContrastTransform" not in found
        return
    place, chance = found["RandomContrastTransform"]
    assert chance == probability
    assert type(steps[place - 1]).__name__ == "SpatialTransform"
    assert place < found["GaussianNoiseTransform"][0]
