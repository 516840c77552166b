"""Folder prediction: nnU-Net's label maps, and a broken case that stops no other."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnmosaic.pipeline.cli import main
from nnmosaic.trainers.lookup import trainer_class

MODEL = "nnUNet_results/Dataset007_Merged/nnUNetTrainerSelfDisambiguation__nnUNetPlans__3d_fullres"


def read(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_label_maps_and_probabilities_equal_nnunets(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["predict", "-i", str(trained / "images"), "-d", "7", "-c", "3d_fullres"]
    ours, theirs = tmp_path / "ours ü", tmp_path / "theirs"
    assert main([*command, "-o", str(ours), "--save_probabilities"]) == 0
    monkeypatch.setattr(  # nnU-Net's lookup would need a torchvision that fits
        "nnunetv2.inference.predict_from_raw_data.recursive_find_trainer_class_by_name",
        trainer_class,
    )
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(
        str(trained / MODEL), (0, 1), "checkpoint_final.pth"
    )
    theirs.mkdir()
    predictor.predict_from_files_sequential(
        str(trained / "images"), str(theirs), save_probabilities=True
    )
    expected = {f"new{i}{ending}" for i in range(3) for ending in (".nii.gz", ".npz", ".pkl")}
    assert names(ours) == expected | {"dataset.json", "plans.json", "prediction.json"}
    for i in range(3):
        a, b = (read(folder / f"new{i}.nii.gz") for folder in (ours, theirs))
        assert np.array_equal(a, b)
        assert set(np.unique(a)) == {0, 1, 2}
        one, other = (np.load(f / f"new{i}.npz")["probabilities"] for f in (ours, theirs))
        np.testing.assert_allclose(one, other, atol=1e-2)  # nnU-Net sums logits in half precision
        image = SimpleITK.ReadImage(str(trained / "images" / f"new{i}_0000.nii.gz"))
        result = SimpleITK.ReadImage(str(ours / f"new{i}.nii.gz"))
        assert result.GetSpacing() == pytest.approx(image.GetSpacing())
        assert result.GetOrigin() == pytest.approx(image.GetOrigin())
        assert result.GetDirection() == pytest.approx(image.GetDirection())


@pytest.mark.slow
def test_broken_cases_are_listed_and_the_others_finished(
    trained: Path, tmp_path: Path, save: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    images, output = trained / "images", tmp_path / "out"
    (images / "cut_0000.nii.gz").write_bytes((images / "new0_0000.nii.gz").read_bytes()[:900])
    save(images / "nan_0000.nii.gz", np.full((8, 8, 8), np.nan, np.float32))
    save(images / "two_0000.nii.gz", np.ones((8, 8, 8), np.float32))
    save(images / "two_0001.nii.gz", np.ones((8, 8, 8), np.float32))
    save(images / "unnumbered.nii.gz", np.ones((8, 8, 8), np.float32))
    (images / "notes.txt").write_text("stray")
    command = ["predict", "-i", str(images), "-o", str(output), "-m", str(trained / MODEL)]
    assert main([*command, "-f", "0", "--disable_tta"]) == 3
    failures = json.loads((output / "failures.json").read_text())
    assert set(failures) == {"cut", "nan", "two", "unnumbered.nii.gz"}
    assert "cut_0000.nii.gz cannot be read" in failures["cut"]
    assert "NaN or infinite" in failures["nan"]
    assert "has the channels [0, 1]" in failures["two"]
    done = {f"new{i}.nii.gz" for i in range(3)}
    kept = {"dataset.json", "plans.json", "prediction.json"}
    assert names(output) == done | kept | {"failures.json"}
    assert f"4 case(s) failed; the reasons are in {output / 'failures.json'}" in caplog.messages

    for path in images.iterdir():
        if not path.name.startswith("new"):
            path.unlink()
    (output / "new1.nii.gz").unlink()
    times = {name: (output / name).stat().st_mtime_ns for name in done - {"new1.nii.gz"}}
    assert main([*command, "-f", "0", "--disable_tta", "--continue_prediction"]) == 0
    assert {name: (output / name).stat().st_mtime_ns for name in times} == times
    assert names(output) == done | kept
    # Label maps of another model are not kept.
    assert main([*command, "-f", "1", "--disable_tta", "--continue_prediction"]) == 0
    assert all((output / name).stat().st_mtime_ns > time for name, time in times.items())


@pytest.mark.slow
def test_a_case_that_fails_while_it_is_written_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.inference import export_prediction

    export = export_prediction.export_prediction_from_logits

    def full_disk(*arguments: object, **options: object) -> None:
        target = str(arguments[5])
        if target.endswith("new1"):
            Path(f"{target}.nii.gz").write_bytes(b"half")
            raise OSError("No space left on device")
        export(*arguments, **options)

    monkeypatch.setattr(export_prediction, "export_prediction_from_logits", full_disk)
    command = ["predict", "-i", str(trained / "images"), "-o", str(tmp_path / "out")]
    assert main([*command, "-m", str(trained / MODEL), "-f", "0", "--disable_tta"]) == 3
    failures = json.loads((tmp_path / "out" / "failures.json").read_text())
    assert failures == {"new1": "OSError: No space left on device"}
    maps = {name for name in names(tmp_path / "out") if name.endswith(".nii.gz")}
    assert maps == {"new0.nii.gz", "new2.nii.gz"}


def test_an_unusable_model_or_folder_is_refused_at_once(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = trained / MODEL, trained / "images"
    (tmp_path / "empty").mkdir()
    for arguments, text in (
        (["-i", str(tmp_path / "empty"), "-m", str(model)], "holds no image that ends with"),
        (["-i", str(images), "-m", str(model), "-f", "4"], "fold_4/checkpoint_final.pth does not"),
        (["-i", str(images), "-m", str(model), "-chk", "x.pth"], "has no fold with x.pth"),
    ):
        assert main(["predict", "-o", str(tmp_path / "out"), *arguments]) == 2
        assert text in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
