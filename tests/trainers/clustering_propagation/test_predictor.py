"""Sweeps over volumes (spec 3; invariants 3, 4, 7, 8 and 15)."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nnmosaic.trainers.clustering_propagation.network import (
    ClusteringPropagationNet,
    SliceBefore,
)
from nnmosaic.trainers.clustering_propagation.predictor import PropagationPredictor
from nnmosaic.trainers.clustering_propagation.sweeps import SWEEPS
from nnmosaic.trainers.clustering_propagation.travel import travel
from nnmosaic.trainers.clustering_propagation.volume_features import VolumeFeatures

CPU = torch.device("cpu")
HALF = {"rtol": 2e-3, "atol": 2e-3}
"""Logits are kept in half precision."""


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 19, 15, 22, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def predictor(
    kind: dict[str, Any], make_network: Callable[..., ClusteringPropagationNet]
) -> PropagationPredictor:
    made = PropagationPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=CPU, allow_tqdm=False
    )
    made.network = make_network(**kind)
    made.configuration_manager = SimpleNamespace(patch_size=(16, 24))
    made.allowed_mirroring_axes = (0, 1)
    made.slice_distance = 3.0
    return made


def predict(predictor: PropagationPredictor, image: Tensor, sweep: str = "both") -> Tensor:
    predictor.sweep = sweep  # type: ignore[assignment]
    return predictor.predict_sliding_window_return_logits(image).float()


def test_without_a_sweep_each_slice_is_by_itself(
    predictor: PropagationPredictor, image: Tensor
) -> None:
    found = predict(predictor, image, "none")
    padded = functional.pad(image, (1, 1, 0, 1))  # as nnU-Net does: the smaller half comes first
    with torch.no_grad():
        direct = predictor.network(padded.transpose(0, 1))[..., :15, 1:-1].transpose(0, 1)
    torch.testing.assert_close(found, direct, **HALF)
    order = torch.randperm(19)
    torch.testing.assert_close(predict(predictor, image[:, order], "none"), found[:, order], **HALF)


def averaged_with_neighbours(slices: Tensor) -> Tensor:
    """Return slices (K, Z, H, W) of which each counts for 1, and those beside it for a third."""
    number = slices.shape[1]
    weights = torch.eye(number)
    for i in range(number - 1):
        weights[i, i + 1] = weights[i + 1, i] = 1 / 3
    weights = weights / weights.sum(1, keepdim=True)
    return torch.einsum("yz,kzhw->kyhw", weights, slices)


@torch.no_grad()
def test_a_sweep_up_is_the_loop_over_slices(predictor: PropagationPredictor, image: Tensor) -> None:
    network = predictor.network
    padded = functional.pad(image, (1, 1, 0, 1))
    state, before, found = network.initial_state(1), None, []
    for z in range(image.shape[1]):
        centres = network.initial_centres(state)
        result = network.decode(network.encode(padded[None, :, z]), centres, before)
        found.append(result.logits[..., :15, 1:-1])
        before = SliceBefore(functional.pad(found[-1], (1, 1, 0, 1)), torch.tensor([3.0]))
        state = network.update_state(state, result, torch.tensor([3.0]))
    up = averaged_with_neighbours(torch.cat(found).transpose(0, 1))
    torch.testing.assert_close(predict(predictor, image, "up"), up, **HALF)
    none = averaged_with_neighbours(predict(predictor, image, "none"))
    assert (up - none).abs().max() > 0.05
    torch.testing.assert_close(
        predict(predictor, image[:, :1], "up"), predict(predictor, image[:, :1], "none")
    )


def test_a_flipped_volume_gives_flipped_results(
    predictor: PropagationPredictor, image: Tensor
) -> None:
    both = predict(predictor, image)
    torch.testing.assert_close(predict(predictor, image.flip(1)).flip(1), both, **HALF)
    up, down = (predict(predictor, image, sweep) for sweep in ("up", "down"))
    torch.testing.assert_close(both, (up + down) / 2, **HALF)
    torch.testing.assert_close(predict(predictor, image.flip(1), "down").flip(1), up, **HALF)
    predictor.use_mirroring = True
    image = functional.pad(image, (0, 2, 0, 1))  # as large as the patch, or padding is lopsided
    mirrored = predict(predictor, image)
    for axes in ((2,), (3,), (2, 3)):
        torch.testing.assert_close(
            predict(predictor, image.flip(axes)).flip(axes), mirrored, **HALF
        )


def test_from_the_fullest_slice_to_both_ends(
    predictor: PropagationPredictor, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "_fullest", lambda features: 8)
    out = predict(predictor, image, "centre_out")
    up, down = (
        predict(predictor, *part) for part in ((image[:, 8:], "up"), (image[:, :9], "down"))
    )
    # At the fullest slice itself, neighbours of both sides are averaged.
    torch.testing.assert_close(out[:, 9:], up[:, 1:], **HALF)
    torch.testing.assert_close(out[:, :8], down[:, :-1], **HALF)


def test_the_fullest_slice_shows_most(predictor: PropagationPredictor, image: Tensor) -> None:
    features = predictor.volume_features(image)
    found = predictor._fullest(features)
    assert found % 4 == 0
    empty = predictor.network.initial_state(1)
    regions = predictor.network.layout.regions
    scores = []
    for z in range(0, 19, 4):
        ((_, result, _, _),) = travel(features, [z], empty, distance_mm=0)
        logits, presence = result.logits[0], result.presence[0].sigmoid()
        masks = logits > 0 if regions else [logits.argmax(0) == k for k in range(3)]
        shown = (0, 1, 2) if regions else (1, 2)  # of labels, the first one is the background
        scores.append(sum(float(presence[k]) * int(masks[k].sum()) for k in shown))
    assert found == 4 * max(range(5), key=lambda i: scores[i])


@pytest.mark.parametrize("sweep", SWEEPS)
def test_kept_features_do_not_grow_with_the_volume(
    predictor: PropagationPredictor, image: Tensor, sweep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predict(predictor, image, sweep)
    kept: list[int] = []
    get = VolumeFeatures.__getitem__

    def count(self: VolumeFeatures, index: int) -> Any:
        found = get(self, index)
        kept.append(len(self._blocks))
        return found

    monkeypatch.setattr(VolumeFeatures, "__getitem__", count)
    monkeypatch.setattr(
        predictor, "volume_features", partial(predictor.volume_features, most_bytes=1)
    )
    assert torch.equal(predict(predictor, image, sweep), expected)
    assert max(kept) == 1


def test_new_features_take_the_memory_of_those_that_go(
    predictor: PropagationPredictor, image: Tensor
) -> None:
    features = predictor.volume_features(image[:, :16], most_bytes=1)
    assert len({features[index].mask_map.data_ptr() for index in range(16)}) == 8


def test_one_slice_has_no_neighbours(predictor: PropagationPredictor, image: Tensor) -> None:
    alone = predict(predictor, image[:, :1], "none")
    for sweep in SWEEPS:
        assert torch.equal(predict(predictor, image[:, :1], sweep), alone)
