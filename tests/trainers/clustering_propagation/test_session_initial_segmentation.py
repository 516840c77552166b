"""Sessions that begin with a segmentation (spec 5.6, `add_initial_seg_interaction`)."""

from collections.abc import Callable

import numpy as np
import pytest

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.clustering_propagation.session import ClusteringPropagationSession

KEPT = (slice(2, 11), slice(3, 25), slice(4, 29))
"""The part of the image that is not empty, which the network sees."""


@pytest.fixture
def session(propagation_session: Callable[[], ClusteringPropagationSession]) -> object:
    return propagation_session()


@pytest.fixture
def drawn(session: ClusteringPropagationSession) -> np.ndarray:
    """Return a label map with a block of "dark" that reaches into the empty rim."""
    block = np.zeros_like(session.label_map)
    block[0:8, 0:8, 2:16] = 2
    return block


def beside(label_map: np.ndarray) -> np.ndarray:
    """Return a label map without what is in the part that was kept."""
    rim = label_map.copy()
    rim[KEPT] = 0
    return rim


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((255,), r"shows 255, .* labels are background \(0\), bright \(1\), dark \(2\)\."),
        ((-1, 3), "shows -1, 3, "),
        ((1.5, np.nan), "shows 1.5, nan, "),
    ],
)
def test_labels_that_the_model_does_not_know_change_nothing(
    session: ClusteringPropagationSession, values: tuple[float, ...], message: str
) -> None:
    session.add_point_interaction((6, 12, 14), True, label="dark")
    before = session.label_map.copy()
    wrong = np.zeros(before.shape, np.float64 if isinstance(values[0], float) else np.int64)
    wrong[4, 8, 8:14] = 1
    wrong[5, 8, 8 : 8 + len(values)] = values
    for run in (False, True):
        with pytest.raises(InputError, match=message):
            session.add_initial_seg_interaction(wrong, run_prediction=run)
        np.testing.assert_array_equal(session.label_map, before)
    assert len(session.prompts.interactions) == 1
    assert session.undo()


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint16, np.float32])
def test_a_label_map_may_have_any_type(
    session: ClusteringPropagationSession, dtype: type[np.generic]
) -> None:
    drawn = np.zeros(session.label_map.shape, dtype)
    drawn[4:8, 8:14, 9:16] = 1
    session.add_initial_seg_interaction(drawn)
    assert session.label_map.dtype == np.uint8
    np.testing.assert_array_equal(session.label_map, drawn)
    session.add_point_interaction((6, 20, 20), True, label="dark")
    assert (session.label_map[4:8, 9:13, 10:15] == 1).mean() > 0.85


def test_the_empty_rim_is_background_after_the_next_mark(
    session: ClusteringPropagationSession, drawn: np.ndarray
) -> None:
    automatic = session.label_map.copy()
    session.add_initial_seg_interaction(drawn)
    np.testing.assert_array_equal(session.label_map, drawn)
    box = session.add_point_interaction((6, 18, 20), True, label="bright")
    assert not beside(session.label_map).any()
    changed = np.argwhere(session.label_map != drawn)
    assert box == [
        [int(a), int(b) + 1] for a, b in zip(changed.min(0), changed.max(0), strict=True)
    ]
    assert session.undo()
    np.testing.assert_array_equal(session.label_map, automatic)

    session.add_initial_seg_interaction(drawn, run_prediction=True)
    assert not beside(session.label_map).any()
    assert (session.label_map[3:7, 3:8, 5:15] == 2).mean() > 0.85


def test_a_viewer_may_give_its_own_buffer(
    session: ClusteringPropagationSession, drawn: np.ndarray
) -> None:
    buffer = np.zeros_like(session.label_map)
    session.set_target_buffer(buffer)
    buffer[:] = drawn
    session.add_initial_seg_interaction(buffer)
    np.testing.assert_array_equal(session.label_map, drawn)
    np.testing.assert_array_equal(buffer, drawn)


def test_reset_forgets_what_was_shown_in_the_empty_rim(
    session: ClusteringPropagationSession, drawn: np.ndarray
) -> None:
    automatic = session.label_map.copy()
    session.add_initial_seg_interaction(drawn)
    session.reset_interactions()
    np.testing.assert_array_equal(session.label_map, automatic)


def test_only_what_the_network_sees_is_marked(
    session: ClusteringPropagationSession, drawn: np.ndarray
) -> None:
    session.add_initial_seg_interaction(drawn, run_prediction=True)
    with_rim = session.label_map.copy()
    session.add_initial_seg_interaction(drawn - beside(drawn), run_prediction=True)
    np.testing.assert_array_equal(session.label_map, with_rim)
    with pytest.raises(InputError, match="only where the image is empty"):
        session.add_initial_seg_interaction(beside(drawn))
    np.testing.assert_array_equal(session.label_map, with_rim)
    assert session.undo()


def test_regions_are_made_of_the_labels_that_a_segmentation_shows(
    propagation_session: Callable[..., ClusteringPropagationSession],
) -> None:
    session = propagation_session(regions=True)
    drawn = np.zeros(session.label_map.shape, np.int32)
    drawn[4:8, 8:14, 9:16] = 1
    drawn[4:8, 16:22, 9:16] = 2
    session.add_initial_seg_interaction(drawn, run_prediction=True)
    assert (session.label_map[4:8, 9:13, 10:15] > 0).mean() > 0.85
    assert (session.label_map[4:8, 17:21, 10:15] == 2).mean() > 0.85
    drawn[5, 10, 10] = 3
    with pytest.raises(InputError, match=r"shows 3, .*both \(1, 2\), dark \(2\)"):
        session.add_initial_seg_interaction(drawn)
