"""Corrections of a volume (spec 3; invariants 1, 2, 7, 10, 11 and 16)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.interactive_volume import (
    UNDO_LEVELS,
    InteractiveVolume,
    Marks,
)
from nnmosaic.trainers.clustering_propagation.network import ClusteringPropagationNet
from nnmosaic.trainers.clustering_propagation.predictor import PropagationPredictor
from nnmosaic.trainers.clustering_propagation.volume_features import (
    VolumeFeatures,
    mirrored_copies,
)

CPU = torch.device("cpu")
SLICES, ROWS, COLUMNS = 13, 16, 20


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, SLICES, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network(
    kind: dict[str, Any], make_network: Callable[..., ClusteringPropagationNet]
) -> ClusteringPropagationNet:
    made = make_network(**kind)
    torch.nn.init.normal_(made.head.from_user.weight, std=0.5)
    return made


def volume(
    network: ClusteringPropagationNet,
    image: Tensor,
    *,
    mirror: bool = False,
    honour: bool = True,
    distance_mm: float = 2.0,
) -> InteractiveVolume:
    copies = mirrored_copies((0, 1) if mirror else ())
    features = VolumeFeatures(network, image, patch_size=(16, 24), copies=copies, device=CPU)
    return InteractiveVolume(features, distance_mm=distance_mm, pixel_mm=0.5, honour_marks=honour)


def click(
    network: ClusteringPropagationNet,
    row: int,
    column: int,
    channel: int = 2,
    *,
    drawn: bool = False,
) -> Marks:
    weights = torch.zeros(len(network.layout.slots), ROWS, COLUMNS)
    weights[channel, row, column] = 1
    on = torch.zeros(network.layout.classes, ROWS, COLUMNS, dtype=torch.bool)
    on[channel, row, column] = True
    return Marks(weights, on, torch.zeros_like(on), on[channel] & (not drawn))


def test_without_marks_it_is_the_automatic_result(
    network: ClusteringPropagationNet, image: Tensor
) -> None:
    predictor = PropagationPredictor(device=CPU, perform_everything_on_device=False)
    predictor.sweep, predictor.slice_distance = "both", 2.0
    found = volume(network, image)
    predictor.volume_features = lambda data: found.features  # type: ignore[method-assign]
    automatic = predictor.predict_sliding_window_return_logits(image)
    assert torch.equal(found.logits(), automatic)
    assert found.add({}) == range(0)
    assert torch.equal(found.logits(), automatic)
    assert found.undo() is None


def test_a_mark_travels_both_ways_and_is_honoured(
    network: ClusteringPropagationNet, image: Tensor
) -> None:
    found = volume(network, image)
    before = found.logits()
    assert found.add({6: click(network, 4, 5, drawn=True)}) == range(SLICES)
    after = found.logits()
    moved = (after - before).flatten(2).abs().amax((0, 2))
    assert (moved[[5, 6, 7]] > 0).all()
    pixel = after[:, 6, 4, 5]
    assert pixel[2] > 0 if network.layout.regions else pixel.argmax() == 2
    unforced = volume(network, image, honour=False)
    unforced.add({6: click(network, 4, 5, drawn=True)})
    differs = (unforced.logits() != after).nonzero()
    assert {tuple(place[1:].tolist()) for place in differs} <= {(6, 4, 5)}


def test_a_click_speaks_for_pixels_around_it_and_a_drawing_does_not(
    network: ClusteringPropagationNet, image: Tensor
) -> None:
    drawn, clicked = (volume(network, image, distance_mm=8.0) for _ in range(2))
    drawn.add({6: click(network, 4, 5, drawn=True)})
    clicked.add({6: click(network, 4, 5)})
    gained = (clicked.logits().float() - drawn.logits().float())[2]
    assert gained.min() > -2e-3
    near = gained[6, 2:7, 3:8]
    assert (near > 0.01).sum() >= 3  # those that look alike to this random network
    assert gained[6, 4, 5] == 0  # it is sure in both
    assert (gained[[5, 7]] > 0.01).any()  # 16 pixels away, of which a quarter counts
    assert (gained[[0, 1, 2, 10, 11, 12]].abs() < 2e-3).all()  # 64 pixels and more


def test_each_class_has_its_reach_and_what_is_not_there_the_least(
    network: ClusteringPropagationNet, image: Tensor
) -> None:
    marks = click(network, 4, 5)
    kinds = {"on": marks}
    if network.layout.regions:
        nothing = torch.zeros_like(marks.on)
        kinds["off"] = Marks(torch.zeros_like(marks.weights), nothing, marks.on, marks.clicked)
    for kind, marks in kinds.items():
        drawn = volume(network, image)
        drawn.add({6: replace(marks, clicked=torch.zeros_like(marks.clicked))})
        for reach, counts in (([0.01, 0.01, 4.0], kind == "on"), ([4.0, 4.0, 0.01], False)):
            network.head.reach.copy_(torch.tensor(reach))
            clicked = volume(network, image)
            clicked.add({6: marks})
            assert (clicked.logits() != drawn.logits()).any() == counts


def test_marks_change_nothing_beyond_their_neighbours(
    network: ClusteringPropagationNet, image: Tensor
) -> None:
    found = volume(network, image)
    found.add({3: click(network, 4, 5), 10: click(network, 9, 12, 1)})
    before = found.logits()
    changed = found.add({7: click(network, 2, 2)})
    assert changed == range(4, 10)
    moved = (found.logits() != before).flatten(2).any(2).any(0).nonzero().flatten().tolist()
    assert 7 in moved
    assert set(moved) <= set(changed)
    again = found.logits()
    assert found.add({3: click(network, 8, 8)}) == range(7)  # marked again: both sides of it
    assert torch.equal(found.logits(range(7, SLICES)), again[:, 7:])


def test_undo_is_exact(network: ClusteringPropagationNet, image: Tensor) -> None:
    found = volume(network, image)
    states = [found.logits()]
    steps = [{6: click(network, 4, 5)}, {2: click(network, 4, 5, 1)}, {6: click(network, 9, 9, 1)}]
    for marks in steps:
        found.add(marks)
        states.append(found.logits())
    for expected in states[-2::-1]:
        assert found.undo() is not None
        assert torch.equal(found.logits(), expected)
    for marks, expected in zip(steps, states[1:], strict=True):
        found.add(marks)
        assert torch.equal(found.logits(), expected)
    for _ in range(UNDO_LEVELS + 1):
        found.add({1: click(network, 1, 1)})
    assert sum(found.undo() is not None for _ in range(UNDO_LEVELS + 1)) == UNDO_LEVELS


def test_nothing_is_left_of_what_was_undone(
    network: ClusteringPropagationNet, image: Tensor
) -> None:
    found, fresh = volume(network, image), volume(network, image)
    found.add({6: click(network, 4, 5)})
    found.undo()
    for one in (found, fresh):
        one.add({2: click(network, 4, 5, 1)})
    assert torch.equal(found.logits(), fresh.logits())


def test_marks_that_fail_change_nothing(
    network: ClusteringPropagationNet, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = volume(network, image)
    found.add({6: click(network, 4, 5)})
    before = found.logits()
    spread = found._spread

    def fail_downwards(sweep: Any, anchor: int, *, new: Any) -> None:
        spread(sweep, anchor, new=new)
        if sweep.step < 0:
            raise RuntimeError("no memory left")

    monkeypatch.setattr(found, "_spread", fail_downwards)
    with pytest.raises(RuntimeError, match="no memory left"):
        found.add({3: click(network, 4, 5, 1), 9: click(network, 2, 2)})
    assert torch.equal(found.logits(), before)
    assert found.undo() == range(SLICES)
    assert found.undo() is None


def test_undo_keeps_no_more_than_what_changed(
    network: ClusteringPropagationNet, image: Tensor
) -> None:
    found = volume(network, image)
    found.add({3: click(network, 4, 5), 5: click(network, 9, 12, 1)})
    found.add({4: click(network, 2, 2)})
    assert [list(kept) for kept in found._undo[-1].overwritten] == [[4], [4]]


def test_repeated_marks_do_not_add_up(network: ClusteringPropagationNet, image: Tensor) -> None:
    results = []
    for times in (1, 8):
        found = volume(network, image)
        for _ in range(times):
            found.add({6: click(network, 4, 5)})
        results.append(found.logits())
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)


def test_the_order_of_marks_does_not_matter(
    network: ClusteringPropagationNet, image: Tensor
) -> None:
    one, other = click(network, 4, 5), click(network, 7, 8, 1)
    results = []
    for marks in ({4: one + other, 9: one}, {9: one, 4: other + one}):
        found = volume(network, image)
        found.add(marks)
        results.append(found.logits())
    assert torch.equal(*results)
    found = volume(network, image)
    found.add({4: one + other + one + other, 9: one + one})  # equally often: the same means
    torch.testing.assert_close(found.logits(), results[0], rtol=2e-3, atol=2e-3)


def test_mirrored_marks_on_a_mirrored_image(
    network: ClusteringPropagationNet, image: Tensor
) -> None:
    image = torch.nn.functional.pad(image, (0, 4))  # as large as the patch
    results = []
    for axes in ((), (2,), (1, 2)):
        found = volume(network, image.flip([axis + 1 for axis in axes]), mirror=True)
        mark = click(network, 4, 5)
        parts = (
            torch.nn.functional.pad(part, (0, 4)).flip([axis - 3 for axis in axes])
            for part in vars(mark).values()
        )
        found.add({6: Marks(*parts)})
        results.append(found.logits().flip([axis + 1 for axis in axes]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=5e-3, atol=5e-3)


def test_flipped_marks_in_a_flipped_volume(
    network: ClusteringPropagationNet, image: Tensor
) -> None:
    steps = [{3: click(network, 4, 5), 8: click(network, 9, 12, 1)}, {5: click(network, 2, 2)}]
    found, flipped = volume(network, image), volume(network, image.flip(1))
    automatic = found.logits()
    for marks in steps:
        found.add(marks)
        flipped.add({SLICES - 1 - index: of_slice for index, of_slice in marks.items()})
    torch.testing.assert_close(flipped.logits().flip(1), found.logits(), rtol=2e-3, atol=2e-3)
    assert (found.logits() - automatic).abs().max() > 0.05


def test_the_doubtful_slice_has_no_marks(network: ClusteringPropagationNet, image: Tensor) -> None:
    found = volume(network, image)
    first = found.doubtful_slice()
    assert first is not None
    found.add({first: click(network, 4, 5)})
    assert found.doubtful_slice() not in (None, first)
    found.add({index: click(network, 4, 5) for index in range(SLICES)})
    assert found.doubtful_slice() is None


def test_anchors_weigh_the_sweeps_by_distance(
    network: ClusteringPropagationNet, image: Tensor
) -> None:
    found = volume(network, image)
    assert {found._weight_of_up(index) for index in range(SLICES)} == {0.5}
    found.add({3: click(network, 4, 5), 7: click(network, 4, 5)})
    weights = [found._weight_of_up(index) for index in range(SLICES)]
    assert weights[3:8] == [0.5, 0.75, 0.5, 0.25, 0.5]
    assert weights[:3] == [0.375, 0.25, 0.125]  # near the anchor, what comes down from it
    assert weights[8] == 1 - 0.5 / 6
    assert weights[12] == 1 - 2.5 / 6
