"""Random contrast: what it keeps, what it changes, and who sees it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nnmosaic.trainers.generator import generator_of
from nnmosaic.trainers.self_disambiguation import random_contrast
from nnmosaic.trainers.self_disambiguation.random_contrast import (
    AIR,
    CUT,
    OWN_MEAN,
    OWN_SPREAD,
    _random_curve,
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


def test_outside_of_a_mask_nothing_counts_for_levels(image: Tensor) -> None:
    inside = image[4:8, ::2] + 0.1 * torch.randn(4, 8, 16, generator=generator_of(1))
    image.zero_()
    image[4:8, ::2] = inside  # 12.5 %
    labels = torch.zeros_like(image)
    labels[4:6] = 1  # also where the mask is not
    here = (labels == 1) & (image != 0)
    levels = []
    for n in range(60):
        new = with_own_intensities(image, labels, 2, generator_of(n), masked=True)
        if not torch.equal(new, image):
            levels.append(((new[here].mean() - inside.mean()) / inside.std()).item())
    assert OWN_MEAN[0] - 1e-2 <= min(levels) < OWN_MEAN[0] + 1
    assert OWN_MEAN[1] - 1 < max(levels) <= OWN_MEAN[1] + 1e-2


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_mask_that_holds_nothing_is_no_trouble(value: float) -> None:
    channel = torch.zeros(4, 4)
    channel[0, 0] = value
    for n in range(8):
        new = with_own_intensities(
            channel, torch.ones_like(channel), 2, generator_of(n), masked=True
        )
        assert torch.isfinite(new).all()
        assert torch.equal(new[1:], channel[1:])


class Counted(TorchDispatchMode):
    """Counts the operations of torch."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_classes_that_are_absent_cost_nothing_and_shift_no_draw(
    image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_contrast, "OWN", 1.0)
    counts, states = [], []
    for classes, present in ((3, (1, 2)), (105, (50, 104)), (105, (50,))):
        labels = torch.zeros_like(image)
        for plane, c in enumerate(present):
            labels[5 + plane] = c
        generator = generator_of(0)
        with Counted() as counted:
            with_own_intensities(image, labels, classes, generator)
        counts.append(counted.number)
        states.append(generator.get_state())
    assert counts[2] < counts[0] == counts[1]
    assert torch.equal(states[1], states[2])


@pytest.mark.parametrize("masked", [True, False])
def test_the_image_keeps_its_moments_though_a_large_structure_changes(
    image: Tensor, masked: bool
) -> None:
    image += 0.1 * torch.randn(image.shape, generator=generator_of(1))
    labels = torch.zeros_like(image)
    labels[6:] = 1
    if masked:
        image[:, :4] = 0
    inside = image != 0
    for n in range(10):
        new = with_random_contrast(
            image[None, None], labels[None, None], 1.0, generator_of(n), masked=[masked], classes=2
        )[0, 0]
        assert not torch.allclose(new, image, atol=0.1)
        assert torch.equal(new[~inside], image[~inside])
        assert new[inside].mean().item() == pytest.approx(image[inside].mean().item(), abs=1e-4)
        assert new[inside].std().item() == pytest.approx(image[inside].std().item(), rel=1e-3)


def test_a_structure_in_an_image_without_contrast_stays() -> None:
    """The curve cannot be drawn there, so mean and deviation could not be kept."""
    flat = torch.full((16, 16, 16), 2.5)
    flat[0, 0, :5] = 9
    labels = (flat == 9).float()
    for n in range(8):
        new = with_random_contrast(
            flat[None, None], labels[None, None], 1.0, generator_of(n), masked=[False], classes=2
        )
        assert torch.equal(new[0, 0], flat)


def test_curves_have_all_powers_and_numbers_of_points(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = [_random_curve(generator_of(n)) for n in range(100)]
    monkeypatch.setattr(random_contrast, "POWERS", (1.0, 1.0))
    straight = [_random_curve(generator_of(n)) for n in range(100)]
    powers = []
    for (inner, values), (same, plain) in zip(curves, straight, strict=True):
        assert torch.equal(inner, same)
        assert torch.equal(inner, inner.sort().values)
        assert values[0] == 0
        greatest = plain.argmax()
        powers.append((values[greatest].log() / plain[greatest].log()).item())
        torch.testing.assert_close(values, plain ** powers[-1], rtol=1e-3, atol=1e-6)
    assert 0.499 < min(powers) < 0.7
    assert 12 < max(powers) < 16.01
    assert 1.5 < np.median(powers) < 5  # as often below as above their geometric mean
    assert {len(values) for _, values in curves} == {4, 5, 6, 7, 8, 9}


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


def test_the_trainer_says_which_voxels_are_of_which_class(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(
        nnUNetTrainerSelfDisambiguation, "Dataset007_Merged", options={"random_contrast": "1"}
    )
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    target = batch["target"][0].zero_()
    for c in (1, 2, 3):  # there are two classes and background; 3 is what "ignore" would be
        target[:, :, 2 * c : 2 * c + 2] = c
    monkeypatch.setattr(random_contrast, "on_curve", lambda channel, *_, **__: channel)
    changed = {1: False, 2: False}
    for trainer.iteration in range(8):
        new = trainer.augmented(batch)["data"]
        for c in (0, 3):
            assert torch.equal(new[target == c], batch["data"][target == c])
        for c in changed:
            changed[c] |= not torch.equal(new[target == c], batch["data"][target == c])
    assert all(changed.values())


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
