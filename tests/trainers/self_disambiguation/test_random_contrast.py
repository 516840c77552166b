"""Random contrast: what it keeps, what it changes, and who sees it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnmosaic.trainers.self_disambiguation.random_contrast import AIR, mapped, random_contrast
from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation


@pytest.fixture
def image() -> Tensor:
    """Air and three tissues, of which the second and third are near each other."""
    channel = torch.full((16, 16, 16), -1.0)
    channel[4:, :, :], channel[8:, :, :], channel[12:, :, :] = 0.5, 0.6, 3.0
    return channel


def test_a_curve_sets_every_tissue_and_keeps_air_and_moments(image: Tensor) -> None:
    # The median of what is not air is the second tissue: it becomes the brightest.
    new = mapped(image, torch.tensor([0, 0.5, 1]), torch.tensor([0, 1, 0.2]))
    levels = [new[plane, 0, 0].item() for plane in (0, 4, 8, 12)]
    assert levels[0] == new.min()
    assert levels[2] == new.max()
    assert levels[3] < levels[1] < levels[2]
    assert new.mean().item() == pytest.approx(image.mean().item(), abs=1e-5)
    assert new.std().item() == pytest.approx(image.std().item(), rel=1e-4)
    share = (levels[3] - levels[0]) / (levels[2] - levels[0])
    assert share == pytest.approx(0.2, abs=1e-3)


def test_a_curve_is_that_of_numpy_through_quantiles_of_tissue() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(20, 30, 40, generator=generator).exp()
    fractions, values = torch.tensor([0, 0.2, 0.6, 1]), torch.tensor([0, 0.9, 0.1, 0.5])
    old = image.numpy()
    tissue = old[old > old.min() + AIR * (old.max() - old.min())]
    knots = [old.min(), *np.quantile(tissue, [0.2, 0.6]), old.max()]
    expected = np.interp(old, knots, values.numpy())
    expected = (expected - expected.mean()) / expected.std() * old.std() + old.mean()
    difference = np.abs(mapped(image, fractions, values).numpy() - expected)
    assert np.median(difference) < 0.01 * old.std()
    assert np.quantile(difference, 0.99) < 0.1 * old.std()


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_an_image_without_contrast_stays(value: float) -> None:
    flat = torch.full((4, 4), value)
    assert torch.equal(mapped(flat, torch.tensor([0, 0.5, 1]), torch.tensor([0, 1, 0.5])), flat)


def test_images_and_channels_have_curves_of_their_own(image: Tensor) -> None:
    batch = image.repeat(40, 2, 1, 1, 1)
    torch.manual_seed(0)
    found = random_contrast(batch, 0.25)
    changed = [not torch.equal(one, image.repeat(2, 1, 1, 1)) for one in found]
    assert 3 < sum(changed) < 20
    first = found[changed.index(True)]
    assert not torch.allclose(*first)
    torch.manual_seed(0)
    assert torch.equal(random_contrast(batch, 0.25), found)
    assert torch.equal(random_contrast(batch, 0.0), batch)
    assert random_contrast(batch[..., 0].half(), 1.0).dtype == torch.float16


@pytest.mark.parametrize("dataset", ["Dataset007_Merged", "Dataset004_Balls"])
def test_the_network_sees_it_where_sources_are_declared_and_the_teacher_does_not(
    make_trainer: Callable[..., Any], dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"random_contrast": "1", "ema_teacher": "true", "ramp": "0"}
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, dataset, options=options)
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    seen: dict[str, Tensor] = {}
    trainer.network.register_forward_pre_hook(lambda _, inputs: seen.update(network=inputs[0]))
    if trainer.teacher is not None:
        teacher = trainer.teacher.network
        teacher.register_forward_pre_hook(lambda _, inputs: seen.update(teacher=inputs[0]))
    trainer.train_step(batch)
    if dataset == "Dataset004_Balls":
        assert list(seen) == ["network"]
        assert torch.equal(seen["network"], batch["data"])
        return
    assert torch.equal(seen["teacher"], batch["data"])
    assert not torch.allclose(seen["network"], batch["data"])
