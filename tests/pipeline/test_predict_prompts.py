"""predict with a model of clustering propagation: sweeps, prompts, and what is wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch

from nnmosaic.data_conversion.interactions import Mask, Prompts
from nnmosaic.pipeline.cli import main
from nnmosaic.pipeline.prediction_run import PredictionRun
from nnmosaic.pipeline.propagation import state_of
from nnmosaic.trainers.predictor import load_predictor

POINT = {"type": "point", "label": "dark", "coord": [12, 10, 4]}


@pytest.fixture
def folder(propagation_model: Path, tmp_path: Path, save: Callable[..., None]) -> Path:
    """Return a folder with a model, two images and an empty folder for prompts."""
    for seed, name in enumerate(("a", "b")):
        array = np.random.default_rng(seed).normal(100, 20, (9, 22, 25)).astype(np.float32)
        save(tmp_path / "images" / f"{name}_0000.nii.gz", array)
    (tmp_path / "prompts").mkdir()
    return tmp_path


def write(folder: Path, *interactions: Any, name: str = "a.json", **changes: Any) -> None:
    content = {"version": 1, "space": "voxel", "order": "xyz", "interactions": list(interactions)}
    (folder / "prompts" / name).write_text(json.dumps({**content, **changes}))


def predict(folder: Path, output: str, *more: str) -> int:
    folders = ["-i", str(folder / "images"), "-o", str(folder / output)]
    return main(["predict", "-m", str(folder / "model"), *folders, "--disable_tta", *more])


def label_map(folder: Path, output: str, case: str) -> np.ndarray:
    path = folder / output / f"{case}.nii.gz"
    return np.asarray(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))))


def test_prompts_change_their_case_only(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert predict(folder, "automatic") == 0
    prompts = ["--prompts", str(folder / "prompts")]
    assert predict(folder, "none", *prompts) == 0  # nothing was marked
    write(folder)  # nor in this file
    assert predict(folder, "empty", *prompts) == 0
    write(folder, POINT)
    write(folder, POINT, name="gone.json")
    assert predict(folder, "marked", *prompts) == 0
    assert "no image belongs to gone.json" in caplog.text
    for case in ("a", "b"):
        automatic = label_map(folder, "automatic", case)
        for output in ("none", "empty"):
            np.testing.assert_array_equal(label_map(folder, output, case), automatic)
        marked = label_map(folder, "marked", case)
        assert (marked != automatic).any() == (case == "a")
    assert label_map(folder, "marked", "a")[4, 10, 12] == 2


def test_a_mask_is_a_drawing_wherever_its_file_lies(
    folder: Path, save: Callable[..., None]
) -> None:
    assert predict(folder, "automatic") == 0
    drawn = np.zeros((9, 22, 25), np.uint8)
    drawn[3:6, 10, 8:14] = 1
    save(folder / "prompts" / "whole.nii.gz", drawn)
    place = (3.0, -2.0 + 10 * 1.25, 5.0)  # the image begins at -2, its rows are 1.25 mm apart
    save(folder / "prompts" / "row.nii.gz", drawn[:, 10:11], origin=place)
    for name in ("whole", "row"):
        write(folder, {"type": "mask", "label": "dark", "file": f"{name}.nii.gz"})
        assert predict(folder, name, "--prompts", str(folder / "prompts")) == 0
    automatic, whole = (label_map(folder, output, "a") for output in ("automatic", "whole"))
    assert (automatic[drawn > 0] != 2).any()
    assert (whole[drawn > 0] == 2).all()
    assert (whole != automatic)[drawn == 0].any()
    np.testing.assert_array_equal(label_map(folder, "row", "a"), whole)


@pytest.mark.parametrize("system", ["LPS", "RAS"])
def test_points_of_3d_slicer_are_clicks(
    folder: Path, save: Callable[..., None], system: str
) -> None:
    path = folder / "images" / "a_0000.nii.gz"
    array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    save(path, array, direction=(0.6, -0.8, 0, 0.8, 0.6, 0, 0, 0, 1))
    image = SimpleITK.ReadImage(str(path))
    x, y, z = image.TransformIndexToPhysicalPoint(POINT["coord"])
    position = [x, y, z] if system == "LPS" else [-x, -y, z]
    markup = {
        "type": "Fiducial", "coordinateSystem": system, "coordinateUnits": "mm", "name": "dark",
        "controlPoints": [
            {"id": "1", "label": "F-1", "position": position, "positionStatus": "defined"}
        ],
    }  # fmt: skip
    slicers = {"@schema": "markups-schema-v1.0.3.json#", "markups": [markup]}
    (folder / "prompts" / "a.mrk.json").write_text(json.dumps(slicers))
    assert predict(folder, "slicer", "--prompts", str(folder / "prompts")) == 0
    (folder / "prompts" / "a.mrk.json").unlink()
    write(folder, POINT)
    assert predict(folder, "ours", "--prompts", str(folder / "prompts")) == 0
    assert predict(folder, "automatic") == 0
    slicer, ours, automatic = (
        label_map(folder, output, "a") for output in ("slicer", "ours", "automatic")
    )
    np.testing.assert_array_equal(slicer, ours)
    assert slicer[4, 10, 12] == 2
    assert (slicer != automatic).any()


def test_folds_answer_with_the_mean_of_their_logits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path("fold_0", "checkpoint_final.pth")
    content = torch.load(folder / "model" / checkpoint, weights_only=False)
    generator = torch.Generator().manual_seed(1)
    for weight in content["network_weights"].values():
        weight += 0.1 * torch.randn(weight.shape, generator=generator)
    (folder / "model" / "fold_1").mkdir()
    torch.save(content, folder / "model" / "fold_1" / checkpoint.name)
    found: dict[str, np.ndarray] = {}

    def keep(_: PredictionRun, case: Any, logits: np.ndarray, properties: Any) -> None:
        found[case.identifier] = logits.astype(np.float32)

    monkeypatch.setattr(PredictionRun, "write", keep)
    write(folder, POINT)  # in one of the two images
    logits = []
    for folds in (["0"], ["1"], ["0", "1"]):
        chosen = ["-f", *folds, "--prompts", str(folder / "prompts")]
        assert predict(folder, "out", *chosen) == 0
        logits.append(dict(found))
    for case in ("a", "b"):
        one, other, both = (of_folds[case] for of_folds in logits)
        assert np.abs(one - other).max() > 0.1
        np.testing.assert_allclose(both, (one + other) / 2, rtol=2e-3, atol=2e-3)


def header(path: Path) -> dict[str, Any]:
    image = SimpleITK.ReadImage(str(path))
    names = ("Size", "Spacing", "Origin", "Direction", "PixelID")
    return {name: getattr(image, f"Get{name}")() for name in names}


@pytest.mark.parametrize("model", ["propagation_model", "region_propagation_model"])
def test_files_are_those_that_nnunet_writes_for_the_same_logits(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, save: Callable[..., None]
) -> None:
    request.getfixturevalue(model)
    array = np.random.default_rng(0).normal(100, 20, (9, 22, 25)).astype(np.float32)
    array[:, :4] = array[:2] = 0  # is cropped
    geometry = {
        "spacing": (0.9, 1.7, 1.3), "origin": (-40.5, 12.25, 310.0),
        "direction": (0.6, -0.8, 0, 0.8, 0.6, 0, 0, 0, 1),
    }  # fmt: skip
    save(tmp_path / "images" / "a_0000.nii.gz", array, **geometry)
    (tmp_path / "prompts").mkdir()
    write(tmp_path, POINT)
    assert predict(tmp_path, "ours", "--sweep", "none") == 0
    assert predict(tmp_path, "marked", "--prompts", str(tmp_path / "prompts")) == 0
    predictor: Any = load_predictor(
        tmp_path / "model", folds=[0], checkpoint="checkpoint_final.pth",
        device=torch.device("cpu"), step_size=0.5, mirroring=False,
    )  # fmt: skip
    predictor.sweep = "none"  # the only one that needs no distance of the slices
    (tmp_path / "theirs").mkdir()
    predictor.predict_from_files_sequential(str(tmp_path / "images"), str(tmp_path / "theirs"))
    ours, theirs = (label_map(tmp_path, output, "a") for output in ("ours", "theirs"))
    np.testing.assert_array_equal(ours, theirs)
    assert set(np.unique(ours)) == {0, 1, 2}
    expected = header(tmp_path / "theirs" / "a.nii.gz")
    image = header(tmp_path / "images" / "a_0000.nii.gz")
    for output in ("ours", "marked"):
        found = header(tmp_path / output / "a.nii.gz")
        assert found == expected
        for name in ("Size", "Spacing", "Origin", "Direction"):
            assert found[name] == pytest.approx(image[name])


def test_order_and_equal_repetition_in_a_file_do_not_matter(folder: Path) -> None:
    marks = [POINT, {**POINT, "coord": [9, 8, 4]}, {**POINT, "label": "bright", "coord": [4, 5, 4]}]
    maps = []
    for number, order in enumerate((marks, marks[::-1], [*marks, *marks])):
        write(folder, *order)
        assert predict(folder, f"out{number}", "--prompts", str(folder / "prompts")) == 0
        maps.append(label_map(folder, f"out{number}", "a"))
    assert len(np.unique(maps[0])) > 1
    for other in maps[1:]:
        np.testing.assert_array_equal(other, maps[0])


def test_a_changed_prompt_is_predicted_again(folder: Path) -> None:
    prompts = ["--prompts", str(folder / "prompts"), "--continue_prediction"]
    write(folder, POINT)
    assert predict(folder, "out", *prompts) == 0
    first = label_map(folder, "out", "a")
    written = (folder / "out" / "a.nii.gz").stat().st_mtime_ns
    assert predict(folder, "out", *prompts) == 0
    assert (folder / "out" / "a.nii.gz").stat().st_mtime_ns == written
    write(folder, {**POINT, "label": "bright"})
    assert predict(folder, "out", *prompts) == 0
    assert (label_map(folder, "out", "a") != first).any()


def test_a_mask_that_is_drawn_again_changes_prompts(tmp_path: Path) -> None:
    mask = tmp_path / "mask.nii.gz"
    mask.write_bytes(b"first")
    prompts = Prompts("voxel", interactions=(Mask(1, mask),))
    first = state_of(prompts)
    assert state_of(prompts) == first
    mask.write_bytes(b"second")
    assert state_of(prompts) != first


def test_sweeps_differ(folder: Path) -> None:
    sweeps = ("both", "up", "none")
    for sweep in sweeps:
        assert predict(folder, sweep, "--sweep", sweep) == 0
    both, up, none = (label_map(folder, sweep, "a") for sweep in sweeps)
    assert (both != none).any()
    assert (both != up).any()
    assert predict(folder, "default") == 0
    np.testing.assert_array_equal(label_map(folder, "default", "a"), both)


def test_a_prompt_outside_of_its_image_fails_this_case_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, {**POINT, "coord": [12, 10, 40]})
    assert predict(folder, "out", "--prompts", str(folder / "prompts")) == 3
    failures = json.loads((folder / "out" / "failures.json").read_text())
    assert "prompts of a: interactions[0] (point): the position [12.0, 10.0, 40.0]" in failures["a"]
    assert (folder / "out" / "b.nii.gz").is_file()
    assert not (folder / "out" / "a.nii.gz").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 1,', "a.json"),
        ({"label": "liver"}, "unknown label 'liver'. The labels are background (0), bright (1)"),
        ({"coord": [1, 2, "3"]}, "'3' is not a finite number"),
        ({"type": "lasso"}, '"type" must be point or scribble or box or mask'),
    ],
)
def test_a_bad_file_stops_before_anything_is_written(
    folder: Path, content: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(content, str):
        (folder / "prompts" / "a.json").write_text(content)
    else:
        write(folder, {**POINT, **content})
    assert predict(folder, "out", "--prompts", str(folder / "prompts")) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "a.json" in told
    assert not (folder / "out").exists()


def test_flags_that_do_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["--prompts", str(folder / "prompts")]
    assert predict(folder, "out", "--sweep", "up", *prompts) == 2
    assert "--sweep up takes no prompts" in capsys.readouterr().err
    assert predict(folder, "out", "--prompts", str(folder / "nowhere")) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert predict(folder, "out", "--samples", "2") == 2
    assert "knows no raters" in capsys.readouterr().err
    assert not (folder / "out").exists()
