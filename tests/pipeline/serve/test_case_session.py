"""The page's session with a real model, on files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from nnmosaic.data_conversion.case_check import reader_of
from nnmosaic.data_conversion.dataset_json import parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.prompts import parse_prompts
from nnmosaic.pipeline.serve.case_session import CaseSession
from nnmosaic.pipeline.serve.geometry import Grid
from nnmosaic.pipeline.serve.marks import marks

DIRECTION = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


@pytest.fixture
def session(propagation_model: Path) -> CaseSession:
    return CaseSession(
        propagation_model, checkpoint="checkpoint_final.pth", device=torch.device("cpu")
    )


def test_a_case_is_opened_corrected_and_saved(
    session: CaseSession, tmp_path: Path, save: Callable[..., None]
) -> None:
    assert session.labels == {"bright": 1, "dark": 2}
    array = np.random.default_rng(0).normal(100, 20, (9, 22, 25)).astype(np.float32)
    save(tmp_path / "new_0000.nii.gz", array, direction=DIRECTION)
    session.open([tmp_path / "new_0000.nii.gz"])
    automatic = session.label_map().copy()
    assert automatic.shape == array.shape
    assert session.suggest_slice() is not None
    session.add_point((4.0, 10.0, 12.0), "dark", True)
    session.add_scribble([(6.0, 5.0, 5.0), (6.0, 5.0, 15.0)], "bright", True, 1.0)
    corrected = session.label_map().copy()
    assert (corrected != automatic).any()
    labels = {"background": 0, **session.labels}
    parsed = parse_prompts(session.prompts(), labels, where="page", folder=tmp_path)
    assert [type(one).__name__ for one in parsed.interactions] == ["Point", "Scribble"]
    session.save(tmp_path / "saved.nii.gz")
    written = SimpleITK.ReadImage(str(tmp_path / "saved.nii.gz"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(written), corrected)
    assert written.GetDirection() == pytest.approx(DIRECTION)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model", "new_0000.nii.gz", "saved.nii.gz"
    }  # fmt: skip
    assert session.undo()
    session.reset()
    np.testing.assert_array_equal(session.label_map(), automatic)


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_a_click_is_drawn_where_it_was_made_in_an_image_that_is_turned_round(
    reader: str, propagation_model: Path, tmp_path: Path, save: Callable[..., None]
) -> None:
    path = propagation_model / "dataset.json"
    content = {**json.loads(path.read_text()), "overwrite_image_reader_writer": reader}
    path.write_text(json.dumps(content))
    session = CaseSession(
        propagation_model, checkpoint="checkpoint_final.pth", device=torch.device("cpu")
    )
    array = np.random.default_rng(0).normal(100, 20, (9, 22, 25)).astype(np.float32)
    save(tmp_path / "new_0000.nii.gz", array, direction=DIRECTION)
    session.open([tmp_path / "new_0000.nii.gz"])
    dataset = parse_dataset_json(content)
    turned, properties = reader_of(dataset).read_images([str(tmp_path / "new_0000.nii.gz")])
    grid = Grid.from_properties(properties, turned.shape[1:])
    session.add_point((2.0, 5.0, 20.0), "dark", True)
    (mark,) = marks(session.prompts(), session.labels, grid)
    drawn = tuple(np.rint(mark["points"][0]).astype(int))
    assert grid.to_display(turned[0])[drawn] == turned[0, 2, 5, 20]


def test_the_order_of_names_in_the_dataset_does_not_matter(propagation_model: Path) -> None:
    path = propagation_model / "dataset.json"
    content = json.loads(path.read_text())
    content["labels"] = {"background": 0, "dark": 2, "bright": 1}
    path.write_text(json.dumps(content))
    made = CaseSession(
        propagation_model, checkpoint="checkpoint_final.pth", device=torch.device("cpu")
    )
    assert list(made.labels.items()) == [("bright", 1), ("dark", 2)]


def test_a_broken_image_and_another_kind_of_model(
    session: CaseSession, tmp_path: Path, propagation_model: Path
) -> None:
    (tmp_path / "broken_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken_0000\.nii\.gz"):
        session.open([tmp_path / "broken_0000.nii.gz"])
    (propagation_model / "plans.json").unlink()
    with pytest.raises(InputError, match="is no trained model"):
        CaseSession(
            propagation_model, checkpoint="checkpoint_final.pth", device=torch.device("cpu")
        )
