"""From training both stages to masks, samples and maps, as a user would."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from scipy.ndimage import binary_dilation

from nnmosaic.pipeline.cli import main
from nnmosaic.pipeline.run import _stages
from nnmosaic.planners.plans_section import RunSettings

pytestmark = pytest.mark.slow
FIRST, SECOND = "nnUNetTrainerMultiRaterDiversified", "nnUNetTrainerMultiRaterPersonalized"
PREDICT = ["predict", "-d", "8", "-c", "3d_fullres", "-f", "0"]
MAPS = ("entropy", "mutual_information", "variance")


def train(trainer: str, steps: str, *more: str) -> int:
    length = ["--epochs", "1", "--iterations_per_epoch", steps, "--val_iterations_per_epoch", "1"]
    return main(["train", "8", "3d_fullres", "0", "-tr", trainer, "--seed", "0", *length, *more])


def predict(workspace: Path, output: str, *more: str, trainer: str = SECOND) -> int:
    folders = ["-i", str(workspace / "images"), "-o", str(workspace / output)]
    return main([*PREDICT, *folders, "-tr", trainer, *more])


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "prediction.json"
    }


def array(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def test_everything_of_a_second_stage(both_stages: Path) -> None:
    wanted = ["--raters", "all", "--samples", "4", "--uncertainty"]
    assert predict(both_stages, "out", *wanted) == 0
    output = both_stages / "out"
    masks = [f"raters/{r}" for r in ("small", "exact", "large")]
    masks += [f"samples/{i:03d}" for i in range(4)]
    image = SimpleITK.ReadImage(str(both_stages / "images" / "case00_0000.nii.gz"))
    for folder in (".", *masks, *MAPS):
        found = SimpleITK.ReadImage(str(output / folder / "case00.nii.gz"))
        assert found.GetSize() == image.GetSize()
        for one, other in (
            (found.GetSpacing(), image.GetSpacing()),
            (found.GetOrigin(), image.GetOrigin()),
            (found.GetDirection(), image.GetDirection()),
        ):
            assert one == pytest.approx(other)
    entropy, disagreement, variance = (array(output / m / "case00.nii.gz") for m in MAPS)
    assert entropy.dtype == np.float32
    assert entropy.max() <= np.log(3) + 1e-4
    assert (disagreement >= 0).all()
    assert (disagreement <= entropy + 1e-5).all()
    assert 0 < variance.max() <= 0.5
    # The maps lie where the balls are: no axis is flipped or swapped.
    label = array(both_stages / "nnUNet_raw/Dataset008_Raters/labelsTr/case00.nii.gz")
    mean = array(output / "case00.nii.gz")
    assert (mean > 0).sum() > 100
    assert (label[mean > 0] > 0).mean() > 0.9
    around = binary_dilation(label > 0, iterations=3)
    assert around.mean() < 0.5
    for values in (entropy, disagreement, variance):
        assert around[values > values.max() / 2].mean() > 0.9
    latents = json.loads((output / "latents" / "case00.json").read_text())
    assert latents["raters"] == ["small", "exact", "large"]
    (network,) = latents["networks"]
    assert np.array(network["samples"]).shape == (4, 6)
    assert np.array(network["raters"]).shape == (3, 6)
    assert not list(output.glob(".nnmosaic_partial*"))


def test_the_same_seed_gives_the_same_files(both_stages: Path) -> None:
    wanted = [
        "--raters",
        "large",
        "small",
        "--samples",
        "3",
        "--uncertainty",
        "--save_probabilities",
    ]
    assert predict(both_stages, "one", *wanted) == 0
    (both_stages / "images" / "case00_0000.nii.gz").rename(both_stages / "away.nii.gz")
    assert predict(both_stages, "two", *wanted) == 0
    one, two = files(both_stages / "one"), files(both_stages / "two")
    assert {name for name in one if "case00" not in name} == set(two)
    for name, content in two.items():
        assert content == one[name]
    assert predict(both_stages, "three", *wanted, "--seed", "1") == 0
    three = files(both_stages / "three")
    assert three["samples/000/case03.nii.gz"] != one["samples/000/case03.nii.gz"]
    with np.load(both_stages / "two" / "case03.npz") as found:
        mean = found["probabilities"]
    np.testing.assert_allclose(mean.sum(0), 1, atol=1e-5)
    assert np.array_equal(mean.argmax(0), array(both_stages / "two" / "case03.nii.gz"))


def test_nothing_is_left_of_other_masks(both_stages: Path) -> None:
    output = both_stages / "out"
    assert predict(both_stages, "out", "--raters", "all", "--samples", "2", "--uncertainty") == 0
    (both_stages / "images" / "case00_0000.nii.gz").unlink()
    notes = output / "case03.txt"
    notes.write_text("not ours")
    assert predict(both_stages, "out", "--samples", "1", "--continue_prediction") == 0
    notes.unlink()  # it was left alone
    left = {str(p.relative_to(output)) for p in output.rglob("*case03*") if p.is_file()}
    assert left == {"case03.nii.gz", "latents/case03.json", "samples/000/case03.nii.gz"}
    assert (output / "samples" / "001" / "case00.nii.gz").is_file()  # not asked for now
    before = (output / "case03.nii.gz").stat().st_mtime_ns
    assert predict(both_stages, "out", "--samples", "1", "--continue_prediction") == 0
    assert (output / "case03.nii.gz").stat().st_mtime_ns == before


def test_a_first_stage_gives_samples_and_no_raters(
    both_stages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(both_stages, "out", "--samples", "2", trainer=FIRST) == 0
    assert (both_stages / "out" / "samples" / "001" / "case03.nii.gz").is_file()
    assert not (both_stages / "out" / "raters").exists()
    assert predict(both_stages, "none", "--raters", "all", trainer=FIRST) == 2
    assert "has not learnt the masks of single raters" in capsys.readouterr().err
    assert predict(both_stages, "none", "--raters", "anna") == 2
    assert "does not know anna. It knows small, exact, large" in capsys.readouterr().err
    assert predict(both_stages, "none", "--raters", "all", "--uncertainty") == 2
    assert "add --samples 16" in capsys.readouterr().err
    assert not (both_stages / "none").exists()


def test_the_validation_scores_what_a_stage_is_for(both_stages: Path) -> None:
    results = both_stages / "nnUNet_results" / "Dataset008_Raters"
    first, second = (
        json.loads(path.read_text())
        for trainer in (FIRST, SECOND)
        for path in results.glob(f"{trainer}__*/fold_0/validation/summary_raters.json")
    )
    assert first["samples"]["number"] == 10
    assert 0 <= first["samples"]["GED"] < 2
    assert second["raters"]["personalised"]
    assert set(second["raters"]["Dice"]) == {"small", "exact", "large"}


def test_stage1_is_a_file_or_found(both_stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = both_stages / "nnUNet_results" / "Dataset008_Raters"
    checkpoint = next(results.glob(f"{FIRST}__*/fold_0/checkpoint_final.pth"))
    moved = both_stages / "first.pth"
    checkpoint.rename(moved)
    shutil.rmtree(next(results.glob(f"{SECOND}__*")))
    assert train(SECOND, "1") == 2
    assert "checkpoint_final.pth does not exist" in capsys.readouterr().err
    assert train(FIRST, "1", "--stage1", str(moved)) == 2
    assert "has no first stage" in capsys.readouterr().err
    assert train(SECOND, "1", "--stage1", str(moved)) == 0
    assert train(SECOND, "1", "--c", "--stage1", str(moved)) == 2
    assert "--stage1 begins a training" in capsys.readouterr().err
    assert train(SECOND, "1", "-pretrained_weights", str(moved)) == 2
    assert f"Give the weights to {FIRST}" in capsys.readouterr().err


def test_run_gives_options_to_the_stage_that_has_them(
    both_stages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = _stages(SECOND, RunSettings(seed=1, options={"bound_weight": "1"}))
    assert list(stages) == ["nnUNetTrainerMosaic", FIRST, SECOND]
    assert stages[FIRST].options == {"bound_weight": "1"}
    assert stages[SECOND] == RunSettings(seed=1)
    folders = ["-i", str(both_stages / "images"), "-o", str(both_stages / "out")]
    run = ["run", "-d", "8", "-c", "3d_fullres", *folders, "-tr", SECOND]
    assert main([*run, "--set", "bond_weight=1"]) == 2
    assert "nnUNetTrainerMultiRaterPersonalized has an option 'bond_weight'" in (
        capsys.readouterr().err
    )
    assert main([*run, "--minutes", "5", "--device", "cpu"]) == 2
    assert "--minutes cannot plan" in capsys.readouterr().err


def test_run_goes_through_both_stages(both_stages: Path) -> None:
    results = both_stages / "nnUNet_results" / "Dataset008_Raters"
    shutil.rmtree(next(results.glob(f"{SECOND}__*")))
    first = next(results.glob(f"{FIRST}__*/fold_0/checkpoint_final.pth"))
    before = first.stat().st_mtime_ns
    (both_stages / "images" / "case00_0000.nii.gz").unlink()
    folders = ["-i", str(both_stages / "images"), "-o", str(both_stages / "out")]
    short = ["--epochs", "1", "--val_iterations_per_epoch", "1", "--iterations_per_epoch"]
    run = ["run", "-d", "8", "-c", "3d_fullres", "-f", "0", *folders, "-tr", SECOND]
    assert main([*run, "--seed", "0", *short, "40"]) == 0  # as the first stage was trained
    assert first.stat().st_mtime_ns == before
    assert not list(results.glob("nnUNetTrainerMosaic__*"))  # the first stage has begun without it
    assert next(results.glob(f"{SECOND}__*/fold_0/checkpoint_final.pth"))
    for folder in ("raters/small", "samples/015", "entropy", "."):
        assert (both_stages / "out" / folder / "case03.nii.gz").is_file()
