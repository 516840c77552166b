"""The read-out, with networks whose answers are known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nnmosaic.trainers.context_reconstruction.readout import RATIOS, dice_of, readout

PATCH, BLOCK = (8, 16, 16), (2, 2, 2)


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray]:
    """Return an image that equals its label map: one box, nearer to one side."""
    labels = np.zeros((14, 30, 26), np.int16)
    labels[4:10, 8:16, 6:18] = 1
    return labels[None].astype(np.float32), labels


def sees_only(data: Tensor) -> Tensor:
    """Say 1 where the image is bright."""
    return torch.cat([0.5 - data, data - 0.5], 1)


def everything(data: Tensor) -> Tensor:
    """Say 1 everywhere."""
    return torch.cat([torch.zeros_like(data), torch.ones_like(data)], 1)


def counts(network: object, case: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    return readout(
        network, *case, patch_size=PATCH, block=BLOCK, classes=2, device=torch.device("cpu")
    )


def test_who_sees_only_what_is_there_finds_nothing_that_is_hidden(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    dice = dice_of([counts(sees_only, case)] * 2)
    for ratio in RATIOS:
        assert dice[f"hidden {ratio}"].tolist() == [0]
        assert dice[f"hidden {ratio}, in view"].tolist() == [1]
    assert dice["border"].tolist() == [1]
    assert dice["border, in view"].tolist() == [1]


def test_the_masks_are_always_the_same(case: tuple[np.ndarray, np.ndarray]) -> None:
    noise = np.random.default_rng(0).normal(size=case[0].shape).astype(np.float32)
    first, again = (counts(sees_only, (noise, case[1])) for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["hidden 0.4"], first["hidden 0.4, in view"])


def test_voxels_in_and_out_of_view_are_the_same(case: tuple[np.ndarray, np.ndarray]) -> None:
    found = counts(everything, case)
    for name in ("border", *(f"hidden {ratio}" for ratio in RATIOS)):
        assert np.array_equal(found[name], found[f"{name}, in view"])
        tp, fp, fn = found[name][1]
        assert tp > 0
        assert fn == 0
        if name != "border":
            ratio = float(name.split()[1])
            assert tp + fp == int(ratio * np.prod(np.divide(PATCH, BLOCK))) * np.prod(BLOCK)
    tp, fp, _ = found["border"][1]
    # 4 borders, each an eighth of the patch; all lie in the image, and the box is cut by each.
    assert tp + fp == 4 * 2 * 8 * 16
    assert tp == 2 * 2 * 6 * 12 + 2 * 2 * 6 * 8


def test_a_network_that_shuns_borders_is_found_out(case: tuple[np.ndarray, np.ndarray]) -> None:
    def shy(data: Tensor) -> Tensor:
        inner = torch.zeros_like(data)
        inner[..., 2:-2, 2:-2] = data[..., 2:-2, 2:-2]
        return sees_only(inner)

    dice = dice_of([counts(shy, case)])
    assert dice["border"][0] < 0.1
    assert dice["border, in view"][0] == 1


def test_voxels_outside_and_ignored_voxels_do_not_count(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    data, labels = case
    labels = np.where(labels == 0, 2, labels)  # 2: ignored
    labels[:, :9] = -1
    for name, (background, box) in counts(everything, (data, labels)).items():
        assert background.tolist() == [0, 0, 0], name
        assert box[0] > 0, name
        assert box[1:].tolist() == [0, 0], name


def test_dice_is_the_mean_over_cases_that_have_the_class() -> None:
    one = {"a": np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0]])}
    two = {"a": np.array([[0, 0, 0], [1, 0, 0], [0, 0, 4], [0, 0, 0]])}
    dice = dice_of([one, two])["a"]
    assert dice[:2].tolist() == [0.75, 0]
    assert np.isnan(dice[2])
