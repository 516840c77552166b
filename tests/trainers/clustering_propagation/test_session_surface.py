"""What programs written for nnInteractive's sessions ask of one (spec 5.6)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.clustering_propagation.session import ClusteringPropagationSession

CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[int]:
    """Return how many threads torch uses, and leave it so."""
    number = torch.get_num_threads()
    yield number
    torch.set_num_threads(number)


def test_it_is_made_as_viewers_make_it(threads: int, caplog: pytest.LogCaptureFixture) -> None:
    session = ClusteringPropagationSession(
        device=CPU, use_torch_compile=False, torch_n_threads=1, verbose=False, do_autozoom=False,
        interactions_storage="auto",
    )  # fmt: skip
    assert torch.get_num_threads() == 1
    assert caplog.text == ""
    assert session.do_autozoom is False
    session.set_do_autozoom(True)
    assert session.do_autozoom is True
    assert session.original_image_shape is None
    assert session.target_buffer is None
    torch.set_num_threads(2)
    assert ClusteringPropagationSession(CPU, use_torch_compile=True).do_autozoom
    assert torch.get_num_threads() == 2
    assert "use_torch_compile" in caplog.text
    with pytest.raises(ValueError, match="torch_n_threads must be at least 1, got 0"):
        ClusteringPropagationSession(CPU, torch_n_threads=0)


def test_marks_are_no_channels_of_the_network() -> None:
    session = ClusteringPropagationSession(CPU)
    assert session.channel_mapping == {}
    assert session.num_interaction_channels == 0
    assert all(session.supported_interactions.values())


def test_the_network_can_run_once_before_there_is_an_image(propagation_model: Path) -> None:
    session = ClusteringPropagationSession(CPU)
    with pytest.raises(RuntimeError, match="initialize_from_trained_model_folder first"):
        session.warmup()
    session.initialize_from_trained_model_folder(str(propagation_model))
    session.set_active_label("dark")
    network, seen = session.predictor.network, []
    network.encoder.register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    session.warmup()
    patch = session.predictor.configuration_manager.patch_size
    assert [tuple(shape) for shape in seen] == [(1, 1, *patch)]


def test_a_box_may_span_slices(
    propagation_session: Callable[[], ClusteringPropagationSession],
) -> None:
    session = propagation_session()
    box = session.add_bbox_interaction([[4, 8], [6, 12], [8, 20]], True, label="dark")
    assert session.slice_axis == 1
    assert sorted(session.image.volume.marks) == [3, 4, 5, 6, 7, 8]  # the first three are empty
    assert box is not None
    assert session.undo()
    assert session.image.volume.marks == {}


def test_kinds_that_are_switched_off_are_refused(
    propagation_session: Callable[[], ClusteringPropagationSession],
) -> None:
    session = propagation_session()
    before = session.label_map.copy()
    drawn = np.zeros(before.shape, np.uint8)
    drawn[5, 8:12, 9:15] = 1
    dark: dict[str, Any] = {"include_interaction": True, "label": "dark"}
    calls: dict[str, Callable[..., Any]] = {
        "points": lambda **asked: session.add_point_interaction(
            coordinates=(6, 12, 14), **dark, **asked
        ),
        "scribble": lambda **asked: session.add_scribble_interaction(
            scribble_image=drawn, **dark, **asked
        ),
        "lasso": lambda **asked: session.add_lasso_interaction(lasso_image=drawn, **dark, **asked),
        "bbox2d": lambda **asked: session.add_bbox_interaction(
            bbox_coords=[[5, 6], [8, 12], [9, 15]], **dark, **asked
        ),
        "bbox3d": lambda **asked: session.add_bbox_interaction(
            bbox_coords=[[5, 7], [8, 12], [9, 15]], **dark, **asked
        ),
        "initial_label": lambda **asked: session.add_initial_seg_interaction(
            initial_seg=drawn, run_prediction=True, **asked
        ),
    }
    for kind, call in calls.items():
        everything = dict.fromkeys(session.supported_interactions, True)
        session.supported_interactions = {**everything, kind: False}
        session.supports_initial_label = kind != "initial_label"
        with pytest.raises(InputError, match=f"no {kind}.*override_capability_checks"):
            call()
        np.testing.assert_array_equal(session.label_map, before)
        assert not session.undo()
        for other in calls.keys() - {kind} if kind == "bbox3d" else ():
            calls[other](override_capability_checks=False)
            session.undo()
        assert call(override_capability_checks=True) is not None
        session.reset_interactions()
