"""Sessions in which a person corrects an image (spec 5.6; invariants 2, 10, 11, 14 and 16)."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.interactions import Scribble
from nnmosaic.data_conversion.prompts import write_prompts
from nnmosaic.pipeline.cli import main
from nnmosaic.trainers.clustering_propagation.session import ClusteringPropagationSession

DIRECTION = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


@pytest.fixture
def image(propagation_image: Path) -> Path:
    return propagation_image


@pytest.fixture
def session(propagation_session: Callable[[], ClusteringPropagationSession]) -> object:
    return propagation_session()


def test_the_automatic_result_is_nnunets_export(session: ClusteringPropagationSession) -> None:
    predictor = session.predictor
    exported = convert_predicted_logits_to_segmentation_with_correct_shape(
        session.image.volume.logits().float(), predictor.plans_manager,
        predictor.configuration_manager, predictor.label_manager, session.image.properties,
    )  # fmt: skip
    np.testing.assert_array_equal(session.label_map, exported)
    assert len(np.unique(exported)) > 1


def test_a_click_changes_what_it_says_it_does(session: ClusteringPropagationSession) -> None:
    before = session.label_map.copy()
    box = session.add_point_interaction((6, 12, 14), True, label="dark")
    assert box is not None
    changed = np.argwhere(session.label_map != before)
    assert changed.min(0).tolist() == [low for low, _ in box]
    assert (changed.max(0) + 1).tolist() == [high for _, high in box]
    first = session.label_map.copy()
    assert session.add_point_interaction((6, 5, 20), False, label=2, run_prediction=False) is None
    np.testing.assert_array_equal(session.label_map, first)
    session.add_scribble([(4, 8, 8), (4, 8, 20)], True, label="bright", radius=0)
    second = session.label_map.copy()
    assert len(session.prompts.interactions) == 3
    assert session.undo()  # both, which were taken into account together
    np.testing.assert_array_equal(session.label_map, first)
    assert session.undo()
    np.testing.assert_array_equal(session.label_map, before)
    assert not session.undo()
    assert session.prompts.interactions == ()

    session.add_point_interaction((6, 12, 14), True, label="dark")
    session.add_point_interaction((6, 5, 20), False, label=2, run_prediction=False)
    session.add_scribble([(4, 8, 8), (4, 8, 20)], True, label="bright", radius=0)
    np.testing.assert_array_equal(session.label_map, second)
    session.reset_interactions()
    np.testing.assert_array_equal(session.label_map, before)


@pytest.mark.parametrize(
    ("place", "label", "message"),
    [
        ((6, 12, 40), "dark", "is not in the image"),
        ((6, 12, float("nan")), "dark", "not a finite number"),
        ((6, 12, 14), "liver", "Unknown label 'liver'. The labels are background, bright, dark"),
    ],
)
def test_a_bad_mark_changes_nothing(
    session: ClusteringPropagationSession, place: Any, label: str, message: str
) -> None:
    before = session.label_map.copy()
    with pytest.raises(InputError, match=message):
        session.add_point_interaction(place, True, label=label)
    np.testing.assert_array_equal(session.label_map, before)
    assert not session.undo()


def test_marks_as_voxels_and_boxes(session: ClusteringPropagationSession) -> None:
    drawn = np.zeros(session.label_map.shape, np.uint8)
    drawn[5, 8:12, 9:15] = 1
    for add in (session.add_lasso_interaction, session.add_scribble_interaction):
        add(drawn, True, label="dark")
        whole = session.label_map.copy()
        assert session.undo()
        part = drawn[5:6, 8:12, 9:15]
        add(part, True, interaction_bbox=[[5, 6], [8, 12], [9, 15]], label="dark")
        np.testing.assert_array_equal(session.label_map, whole)
    session.add_bbox_interaction([[7, 8], [6, 15], [8, 20]], True, label="bright")
    assert (session.label_map != whole).any()
    with pytest.raises(ValueError, match="box must not be empty"):
        session.add_bbox_interaction([[7, 7], [6, 15], [8, 20]], True, label="bright")
    with pytest.raises(ValueError, match="scribble must have shape"):
        session.add_scribble_interaction(drawn[:4], True, label="dark")
    with pytest.raises(InputError, match="The first mark must show a label"):
        session.add_scribble_interaction(drawn, False)
    with pytest.raises(InputError, match="No voxel of the mark"):
        session.add_scribble_interaction(0 * drawn, True, label="dark")


def test_it_starts_from_a_segmentation(session: ClusteringPropagationSession) -> None:
    automatic = session.label_map.copy()
    drawn = np.zeros_like(automatic)
    drawn[4:8, 8:14, 9:16] = 2
    assert session.add_initial_seg_interaction(drawn) is None
    np.testing.assert_array_equal(session.label_map, drawn)
    assert session.undo()
    np.testing.assert_array_equal(session.label_map, automatic)
    session.add_initial_seg_interaction(drawn)
    session.add_point_interaction((6, 18, 20), True, label="bright")
    inside = session.label_map[4:8, 9:13, 10:15]
    assert (inside == 2).mean() > 0.85  # honoured, as far as the grid of the plan allows
    with pytest.raises(InputError, match="shows no label"):
        session.add_initial_seg_interaction(0 * drawn, run_prediction=True)
    session.add_initial_seg_interaction(drawn, run_prediction=True)
    assert (session.label_map[4:8, 9:13, 10:15] == 2).mean() > 0.85


def test_a_viewers_buffer_shows_the_active_label(session: ClusteringPropagationSession) -> None:
    buffer = np.full(session.label_map.shape, 9, np.uint8)
    session.set_target_buffer(buffer)
    np.testing.assert_array_equal(buffer, session.label_map)
    session.multilabel = False
    with pytest.raises(InputError, match="first mark must show a label"):
        session.add_point_interaction((6, 12, 14), False)
    session.add_point_interaction((6, 12, 14), True)  # the likelier one
    assert session.active_label in ("bright", "dark")
    np.testing.assert_array_equal(buffer, session.label_map == session.labels[session.active_label])
    session.set_active_label("dark")
    np.testing.assert_array_equal(buffer, session.label_map == 2)
    before = buffer.copy()
    session.add_scribble([(6, 3, 3), (6, 9, 9)], True, label="dark")
    assert (buffer != before).any()
    session.undo()
    np.testing.assert_array_equal(buffer, before)
    with pytest.raises(ValueError, match="buffer must have shape"):
        session.set_target_buffer(buffer[1:])


def test_a_drawn_line_speaks_for_what_is_around_it_and_the_inside_of_a_lasso_does_not(
    session: ClusteringPropagationSession,
) -> None:
    drawn = np.zeros(session.label_map.shape, np.uint8)
    drawn[6, 12, 9:15] = 1
    found = []
    for add, clicked in (
        (session.add_scribble_interaction, True),
        (session.add_lasso_interaction, False),
    ):
        add(drawn, True, label="dark")
        (marks,) = session.image.volume.marks.values()
        assert marks.on[2].any()
        assert torch.equal(marks.clicked, marks.on[2] & clicked)
        found.append(session.label_map == 2)
        assert session.undo()
    assert (found[0] | ~found[1]).all()
    assert found[0].sum() > found[1].sum()


def test_a_label_that_nobody_chose_is_active_as_long_as_its_mark_counts(
    session: ClusteringPropagationSession,
) -> None:
    session.multilabel = False
    buffer = np.zeros(session.label_map.shape, np.uint8)
    session.set_target_buffer(buffer)
    place = (6, 12, 14)
    for run in (True, False):
        session.add_point_interaction(place, True, run_prediction=run)
        assert session.active_label in ("bright", "dark")
        assert session.undo()
        assert session.active_label is None
        assert not buffer.any()
    session.add_point_interaction(place, True)
    session.reset_interactions()
    assert session.active_label is None
    with pytest.raises(InputError, match="not in the image"):
        session.add_scribble([place, (6, 12, 400)], True)
    session.add_point_interaction(place, True, label="bright")
    assert session.active_label is None
    session.add_point_interaction(place, True)
    assert session.active_label is not None
    session.undo()
    assert session.active_label is None  # the mark that is left named its label

    session.set_active_label("dark")
    session.add_point_interaction(place, True)
    session.reset_interactions()
    assert session.active_label == "dark"


def place_without_background(session: ClusteringPropagationSession) -> tuple[float, float, float]:
    """Return a place where background is the least likely label."""
    for place in product(range(4, 9), range(6, 22), range(6, 26)):
        (voxel,) = session.image.marked_voxels(np.array([place]), 1, positive=False)
        logits = session.image.volume.logits([voxel.slice_index])[:, 0]
        if not logits[:, voxel.rows.round(), voxel.columns.round()].argmin(0).any():
            return place
    raise AssertionError("the random network has another look")


def test_what_is_not_there_is_background_or_the_other_label_that_is_found(
    session: ClusteringPropagationSession,
) -> None:
    place = place_without_background(session)
    drawn = np.zeros(session.label_map.shape, np.uint8)
    drawn[place] = 1
    others = {"bright": "dark", "dark": "bright"}
    for label, other in others.items():
        session.add_point_interaction(place, False, label=label)
        assert session.label_map[place] == 0
        session.undo()
        session.negative_to = "auto"
        for add, where in (
            (session.add_point_interaction, place),
            (session.add_scribble_interaction, drawn),
            (session.add_lasso_interaction, drawn),
        ):
            add(where, False, label=label)
            assert session.label_map[place] == session.labels[other]
            session.undo()
        session.negative_to = "background"
    session.negative_to = "auto"
    session.add_scribble([place, place], False, label="bright", radius=0)
    session.add_bbox_interaction([[int(i), int(i) + 2] for i in place], False, label="bright")
    line, box = session.prompts.interactions
    assert (line.label, line.positive) == (2, True)
    assert (box.label, box.positive) == (1, False)

    before = session.label_map.copy()
    session.negative_to = "other"
    with pytest.raises(ValueError, match='negative_to must be "background" or "auto"'):
        session.add_point_interaction(place, False, label="bright")
    np.testing.assert_array_equal(session.label_map, before)


def test_most_pixels_of_a_mark_say_which_other_label_it_is(
    session: ClusteringPropagationSession,
) -> None:
    (mark, *_) = session.image.marked(Scribble(1, ((6, 12, 6), (6, 12, 26)), 0, positive=False))
    logits = session.image.volume.logits([mark.slice_index])[[0, 2], 0]
    shown = logits[:, mark.rows.round(), mark.columns.round()].argmax(0).float()
    assert 0 < shown.mean() < 1
    expected = (0, 2)[int(shown.mean() > 0.5)]
    assert session.image.likeliest_other([mark]) == expected


def test_a_region_that_is_not_there_leaves_the_others_alone(
    propagation_session: Callable[..., ClusteringPropagationSession],
) -> None:
    session = propagation_session(regions=True)
    found = []
    for way in ("background", "auto"):
        session.negative_to = way
        session.add_point_interaction((6, 12, 14), False, label="dark")
        found.append(session.label_map.copy())
        assert not session.prompts.interactions[-1].positive
        session.undo()
    np.testing.assert_array_equal(*found)


def test_the_next_slice_to_look_at(session: ClusteringPropagationSession) -> None:
    assert session.slice_axis == session.predictor.plans_manager.transpose_forward[0]
    suggested = session.suggest_slice()
    assert suggested is not None
    place = [6.0, 12.0, 14.0]
    place[session.slice_axis] = suggested
    session.add_point_interaction(place, True, label="dark")
    assert session.suggest_slice() != suggested


def test_predict_with_saved_prompts_is_the_session(
    session: ClusteringPropagationSession, propagation_model: Path, image: Path, tmp_path: Path
) -> None:
    session.add_point_interaction((6, 12, 14), True, label="dark", run_prediction=False)
    session.add_scribble([(4, 8, 8), (4, 12, 20)], True, label="bright")
    session.add_point_interaction((5, 15, 21), True, label="dark")  # corrects what came before
    assert [one.round for one in session.prompts.interactions] == [0, 0, 1]
    assert_predict_is(session, propagation_model, image, tmp_path)


def assert_predict_is(
    session: ClusteringPropagationSession, model: Path, image: Path, tmp_path: Path
) -> None:
    """Assert that predict with the prompts of a session writes its label map."""
    (tmp_path / "prompts").mkdir()
    labels = session.predictor.dataset_json["labels"]
    write_prompts(session.prompts, tmp_path / "prompts" / "new.json", labels)
    command = [
        "predict",
        "-m",
        str(model),
        "-i",
        str(image.parent),
        "-o",
        str(tmp_path / "out"),
    ]
    prompts = ["--prompts", str(tmp_path / "prompts")]
    assert main([*command, "--disable_tta", *prompts]) == 0
    written = SimpleITK.ReadImage(str(tmp_path / "out" / "new.nii.gz"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(written), session.label_map)
    assert written.GetDirection() == pytest.approx(DIRECTION)


def test_regions_are_marked_one_by_one(
    region_propagation_model: Path,
    image: Path,
    tmp_path: Path,
    propagation_session: Callable[..., ClusteringPropagationSession],
) -> None:
    session = propagation_session(regions=True)
    assert set(np.unique(session.label_map)) <= {0, 1, 2}
    place = (6, 12, 14)
    found = []
    for label, there in (("both", True), ("dark", True), ("dark", False), ("both", False)):
        session.add_point_interaction(place, there, label=label)
        found.append(int(session.label_map[place]))
    assert found[0] in (1, 2)
    assert found[1:] == [2, 1, 0]
    session.undo()
    assert session.label_map[place] == 1
    assert_predict_is(session, region_propagation_model, image, tmp_path)
