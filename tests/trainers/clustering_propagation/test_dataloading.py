"""Clips of slices (spec 5.2)."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnmosaic.trainers.clustering_propagation.dataloading import (
    LARGEST_GAP_MM,
    ClipLoader,
    draw_slices,
    keep_slices_apart,
)
from nnmosaic.trainers.clustering_propagation.trainer import nnUNetTrainerClusteringPropagation

PATCH = (16, 12)


class Volume:
    """Stands for a stored array: notes which slices are read, and refuses to be read as a whole."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.read: list[int] = []

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        depth = index[1]
        assert depth.stop - depth.start == 1
        self.read.append(depth.start)
        return self.array[index]


class Dataset:
    """Stands for nnU-Net's: each voxel of a case holds the number of its slice."""

    def __init__(self, depth: int, spacing: tuple[float, ...] = (3.0, 1.0, 2.0)) -> None:
        self.identifiers = ["a"]
        volume = np.zeros((1, depth, 20, 24), np.float32)
        volume += np.arange(depth, dtype=np.float32)[:, None, None]
        labels = np.zeros((1, depth, 20, 24), np.int8)
        labels[0, depth - 1, 5:9, 6:10] = 1
        self.data, self.labels = Volume(volume), Volume(labels)
        places = np.argwhere(labels == 1)
        self.properties = {"class_locations": {1: places}, "spacing": spacing}

    def load_case(self, _: str) -> tuple[Any, Any, None, dict[str, Any]]:
        return self.data, self.labels, None, self.properties


@pytest.fixture
def labels() -> LabelManager:
    return LabelManager({"background": 0, "a": 1}, None)


def loader(dataset: Dataset, labels: LabelManager, **options: Any) -> ClipLoader:
    settings = {"slices": 4, "axis": 0, "probabilistic_oversampling": True, **options}
    return ClipLoader(dataset, 2, PATCH, PATCH, labels, **settings)


def test_slices_are_equidistant_in_both_directions_and_show_the_anchor() -> None:
    np.random.seed(0)
    drawn = [draw_slices(7, 20, 2.0, 4) for _ in range(500)]
    assert all(7 in slices and min(slices) >= 0 and max(slices) < 20 for slices in drawn)
    steps = Counter(tuple(np.diff(slices)) for slices in drawn)
    assert set(steps) == {(g, g, g) for g in (-3, -2, -1, 0, 1, 2, 3)}
    assert 5 < steps[0, 0, 0] < 60
    for gap in (-3, -2, -1, 1, 2, 3):
        assert steps[gap, gap, gap] > 40
    assert {slices.index(7) for slices in drawn if slices[1] != 7} == {0, 2, 3}


def test_gaps_are_short_in_millimetres() -> None:
    np.random.seed(0)
    for spacing, largest in ((2.5, 3), (3.0, 2), (LARGEST_GAP_MM + 1, 1)):
        drawn = [draw_slices(10, 30, spacing, 3) for _ in range(200)]
        assert max(abs(np.diff(slices)).max() for slices in drawn) == largest


@pytest.mark.parametrize(("depth", "number"), [(1, 4), (2, 4), (3, 4), (4, 4), (7, 4), (1, 1)])
def test_short_volumes_repeat_slices_at_their_ends(depth: int, number: int) -> None:
    np.random.seed(0)
    for anchor in range(depth):
        for _ in range(50):
            slices = draw_slices(anchor, depth, 1.0, number)
            assert len(slices) == number
            assert anchor in slices
            assert set(slices) <= set(range(depth))
            steps = np.diff(slices)
            assert (steps >= 0).all() or (steps <= 0).all()
            if depth >= number:
                assert len(set(steps)) <= 1


def test_a_clip_is_read_slice_by_slice_in_order(labels: LabelManager) -> None:
    np.random.seed(1)
    dataset = Dataset(9)
    batch = next(loader(dataset, labels))
    assert batch["data"].shape == batch["target"].shape == (2, 1, 4, *PATCH)
    assert batch["target"].dtype == torch.int16
    slices = batch["data"].amax((1, 3, 4))  # outside of the volume there are zeros
    torch.testing.assert_close(batch["positions"], slices * 3.0)
    assert sorted(dataset.data.read) == sorted(z for clip in slices for z in set(clip.tolist()))


def test_the_spacing_is_that_of_the_slice_axis(labels: LabelManager) -> None:
    np.random.seed(1)
    batch = next(loader(Dataset(9), labels, axis=2))
    torch.testing.assert_close(batch["positions"], batch["data"].amax((1, 3, 4)) * 2.0)


def test_foreground_is_in_the_clip_at_any_place(labels: LabelManager) -> None:
    np.random.seed(2)
    dataset = Dataset(9)
    batches = loader(dataset, labels, oversample_foreground_percent=1.0)
    places: Counter[int] = Counter()
    for _ in range(20):
        for clip in next(batches)["target"] == 1:
            shown = clip.flatten(2).any(2)[0].nonzero().flatten().tolist()
            assert shown
            places.update(shown)
    assert {0, 3} <= set(places)  # the last slice of the volume is at one end


def test_a_single_slice_is_a_clip_of_repetitions(labels: LabelManager) -> None:
    batch = next(loader(Dataset(1, (999.0, 1.0, 1.0)), labels))
    assert not batch["positions"].any()
    assert torch.equal(batch["data"][:, :, 0], batch["data"][:, :, 3])


def test_augmentation_is_the_same_for_all_slices_of_a_clip() -> None:
    meaning = {"use_mask_for_norm": [False], "regions": None, "ignore_label": None}
    transforms = nnUNetTrainerClusteringPropagation.get_training_transforms(
        (24, 24), (-3.0, 3.0), None, (0, 1), False, **meaning
    )
    picture = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    np.random.seed(0)
    warped = 0
    for _ in range(30):
        clip = {
            "image": picture.expand(-1, 2, -1, -1).clone(),
            "segmentation": (picture > 0.5).to(torch.int16).expand(-1, 2, -1, -1).clone(),
        }
        found = transforms(**clip)
        assert found["image"].shape == found["segmentation"].shape == (1, 2, 24, 24)
        assert torch.equal(found["segmentation"][:, 0], found["segmentation"][:, 1])
        warped += not torch.equal(
            found["segmentation"][0, 0], clip["segmentation"][0, 0, 4:28, 4:28]
        )
    assert warped > 15


def test_slices_are_not_blurred_into_each_other() -> None:
    transforms = keep_slices_apart(
        nnUNetTrainerClusteringPropagation.__mro__[1].get_training_transforms(
            (1, 24, 24), (-3.0, 3.0), None, (1, 2), True
        )
    )
    (blur,) = [
        step for step in transforms.transforms
        if "Blur" in type(getattr(step, "transform", None)).__name__
    ]  # fmt: skip
    assert blur.apply_probability == 0.2
    blur.apply_probability, blur.transform.p_per_channel = 1.0, 1.0
    clip = torch.zeros(1, 2, 24, 24)
    clip[0, 1, 12, 12] = 1
    found = blur(image=clip.clone())["image"]
    assert not found[0, 0].any()
    assert 0 < found[0, 1, 12, 12] < 1
    assert found[0, 1].sum() == pytest.approx(1, abs=1e-4)


# To end the workers while they hand over a batch is nnU-Net's way, too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.slow
def test_workers_make_clips_of_stored_cases(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(nnUNetTrainerClusteringPropagation, configuration="2d")
    trainer.initialize()
    assert trainer.slices == 4
    batches, _ = trainer.get_dataloaders()
    patch = trainer.configuration_manager.patch_size
    batch = next(batches)
    assert batch["data"].shape == batch["target"].shape == (2, 1, 4, *patch)
    assert set(batch["target"].unique().tolist()) <= {0, 1, 2}
    workers = NonDetMultiThreadedAugmenter(batches.data_loader, None, 1, 1)
    try:
        found = next(workers)
    finally:
        workers._finish()
    assert found["positions"].shape == (2, 4)
    gaps = found["positions"].diff().abs()
    torch.testing.assert_close(gaps, gaps[:, :1].expand(-1, 3), atol=1e-4, rtol=0)
