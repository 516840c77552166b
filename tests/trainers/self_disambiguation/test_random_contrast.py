"""Random contrast: what it keeps, what it changes, and who sees it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnmosaic.trainers.generator import generator_of
from nnmosaic.trainers.self_disambiguation.random_contrast import (
    AIR,
    CUT,
    OWN_MEAN,
    OWN_SPREAD,
    on_curve,
    with_own_intensities,
    with_random_contrast,
)
from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation
from nnmosaic.trainers.self_disambiguation_context import nnUNetTrainerSelfDisambiguationContext

MIDDLE = torch.tensor([0.5])
UP_AND_DOWN = torch.tensor([0, 1, 0.2])


@pytest.fixture
def image() -> Tensor:
    """Air and three tissues, of which the second and third are near each other."""
    channel = torch.full((16, 16, 16), -1.0)
    channel[4:, :, :], channel[8:, :, :], channel[12:, :, :] = 0.5, 0.6, 3.0
    return channel


def test_a_curve_sets_every_tissue_and_keeps_air_and_moments(image: Tensor) -> None:
    # The median of what is not air is the second tissue: it becomes the brightest.
    new = on_curve(image, MIDDLE, UP_AND_DOWN)
    levels = [new[plane, 0, 0].item() for plane in (0, 4, 8, 12)]
    assert levels[0] == new.min()
    assert levels[2] == new.max()
    assert levels[3] < levels[1] < levels[2]
    assert new.mean().item() == pytest.approx(image.mean().item(), abs=1e-5)
    assert new.std().item() == pytest.approx(image.std().item(), rel=1e-4)
    share = (levels[3] - levels[0]) / (levels[2] - levels[0])
    assert share == pytest.approx(0.2, abs=1e-3)


def test_a_few_outliers_do_not_matter(image: Tensor) -> None:
    new = on_curve(image, MIDDLE, UP_AND_DOWN)
    image[15, 0, :5] = 1e4
    with_outliers = on_curve(image, MIDDLE, UP_AND_DOWN)
    correlation = torch.corrcoef(torch.stack([new.flatten(), with_outliers.flatten()]))[0, 1]
    assert correlation > 0.999


def test_a_curve_is_that_of_numpy_through_quantiles_of_tissue() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(20, 20, 20, generator=generator).exp()
    values = torch.tensor([0, 0.9, 0.1, 0.5])
    old = image.numpy()
    low, high = np.quantile(old, [CUT, 1 - CUT])
    tissue = old[old > low + AIR * (high - low)]
    knots = [low, *np.quantile(tissue, [0.2, 0.6]), high]
    expected = np.interp(old, knots, values.numpy())
    expected = (expected - expected.mean()) / expected.std() * old.std() + old.mean()
    got = on_curve(image, torch.tensor([0.2, 0.6]), values).numpy()
    assert np.abs(got - expected).max() < 0.02 * old.std()


def test_outside_of_a_mask_all_stays_zero(image: Tensor) -> None:
    outside = torch.zeros_like(image)
    padded = torch.cat([image, outside])
    new = on_curve(padded, MIDDLE, UP_AND_DOWN, masked=True)
    assert torch.equal(new[16:], outside)
    torch.testing.assert_close(new[:16], on_curve(image, MIDDLE, UP_AND_DOWN))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_an_image_without_contrast_stays(value: float, masked: bool) -> None:
    flat = torch.full((4, 4), value)
    assert torch.equal(on_curve(flat, MIDDLE, UP_AND_DOWN, masked=masked), flat)


def test_some_structures_get_an_intensity_of_their_own(image: Tensor) -> None:
    image = image + 0.1 * torch.randn(image.shape, generator=generator_of(1))
    labels = torch.zeros_like(image)
    labels[5:7], labels[9:11], labels[13:15] = 1, 2, 9  # 9: to be ignored, or of another dataset
    changed: dict[int, list[bool]] = {1: [], 2: []}
    for n in range(60):
        new = with_own_intensities(image, labels, 4, generator_of(n))  # there is no class 3 here
        assert torch.equal(new[(labels == 0) | (labels == 9)], image[(labels == 0) | (labels == 9)])
        for c, found in changed.items():
            here = labels == c
            found.append(not torch.equal(new[here], image[here]))
            if found[-1]:
                level = (new[here].mean() - image.mean()) / image.std()
                assert OWN_MEAN[0] - 1e-4 <= level <= OWN_MEAN[1] + 1e-4
                factor = new[here].std() / image[here].std()
                assert OWN_SPREAD[0] - 1e-3 <= factor <= OWN_SPREAD[1] + 1e-3
    for found in changed.values():
        assert 15 < sum(found) < 45
    assert changed[1] != changed[2]


def test_outside_of_a_mask_labels_change_nothing(image: Tensor) -> None:
    image[:8] = 0
    labels = torch.ones_like(image)
    changed = [
        with_own_intensities(image, labels, 2, generator_of(n), masked=True) for n in range(8)
    ]
    assert all(torch.equal(new[:8], image[:8]) for new in changed)
    assert any(not torch.equal(new[8:], image[8:]) for new in changed)


def test_images_and_channels_have_contrasts_of_their_own(image: Tensor) -> None:
    batch = image.repeat(40, 3, 1, 1, 1)
    labels = (batch[:, :1] > 1).float()
    before = batch.clone()

    def contrast(images: Tensor, y: Tensor, share: float) -> Tensor:  # channel 3 is a cascade's
        return with_random_contrast(
            images, y, share, generator_of(0), masked=[False, False], classes=2
        )

    found = contrast(batch, labels, 0.25)
    assert torch.equal(batch, before)
    assert torch.equal(found[:, 2], batch[:, 2])
    changed = [not torch.equal(one, other) for one, other in zip(found, batch, strict=True)]
    assert 3 < sum(changed) < 20
    first = found[changed.index(True)]
    assert not torch.allclose(first[0], first[1])
    assert torch.equal(contrast(batch, labels, 0.25), found)
    assert not torch.equal(contrast(batch, torch.zeros_like(labels), 0.25), found)
    half = contrast(batch[..., 0].half(), labels[..., 0], 1.0)
    assert half.dtype == torch.float16
    assert torch.isfinite(half).all()


@pytest.mark.parametrize("dataset", ["Dataset007_Merged", "Dataset004_Balls"])
@pytest.mark.parametrize(
    "trainer_class", [nnUNetTrainerSelfDisambiguation, nnUNetTrainerSelfDisambiguationContext]
)
def test_the_network_sees_it_where_sources_are_declared_and_the_teacher_does_not(
    make_trainer: Callable[..., Any], trainer_class: type, dataset: str
) -> None:
    options = {"random_contrast": "1", "ema_teacher": "true", "ramp": "0"}
    trainer = make_trainer(trainer_class, dataset, options=options)
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    seen: dict[str, Tensor] = {}
    trainer.network.register_forward_pre_hook(lambda _, inputs: seen.setdefault("net", inputs[0]))
    if trainer.teacher is not None:
        teacher = trainer.teacher.network
        teacher.register_forward_pre_hook(lambda _, inputs: seen.setdefault("teacher", inputs[0]))
    trainer.train_step(batch)
    if dataset == "Dataset004_Balls":
        assert list(seen) == ["net"]
        assert torch.equal(seen["net"], batch["data"])
        return
    assert torch.equal(seen["teacher"], batch["data"])
    assert not torch.allclose(seen["net"], batch["data"])
