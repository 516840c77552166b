"""One more rater for a trained model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from nnmosaic.pipeline.cli import main
from nnmosaic.trainers.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow
SECOND = "nnUNetTrainerMultiRaterPersonalized"


@pytest.fixture
def command(both_stages: Path) -> list[str]:
    """Return the command for a rater who draws as "large" does, but calls dark balls bright."""
    raw = both_stages / "nnUNet_raw" / "Dataset008_Raters"
    for name in ("case00.nii.gz", "case02.nii.gz"):
        label = SimpleITK.ReadImage(str(raw / "labelsTr_raters" / "large" / name))
        (both_stages / "anna").mkdir(exist_ok=True)
        SimpleITK.WriteImage(
            SimpleITK.Cast(label > 0, SimpleITK.sitkUInt8), str(both_stages / "anna" / name)
        )
    (model,) = (both_stages / "nnUNet_results" / "Dataset008_Raters").glob(f"{SECOND}__*")
    folders = ["-m", str(model), "-i", str(raw / "imagesTr"), "-l", str(both_stages / "anna")]
    return ["add_rater_head", *folders, "-o", str(both_stages / "new"), "--rater", "anna"]


def weights(model: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")
    found: dict[str, torch.Tensor] = checkpoint["network_weights"]
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_a_head_is_new(
    command: list[str], both_stages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--steps", "12"]) == 0
    told = capsys.readouterr().out
    assert "2 cases of anna" in told
    before, after = (float(word) for word in told.split("loss ")[1].split()[:3:2])
    assert after < before
    old, new = Path(command[2]), both_stages / "new"
    before_, after_ = weights(old), weights(new)
    added = set(after_) - set(before_)
    wider = "posterior.features.0.weight"  # 3 classes of 4 raters instead of 3
    assert after_.pop(wider).shape[1] == before_.pop(wider).shape[1] + 3
    assert {name.split(".")[1] for name in added} == {"3"}
    assert all(torch.equal(value, after_[name]) for name, value in before_.items())
    assert json.loads((new / "dataset.json").read_text())["multirater"]["raters"][-1] == "anna"

    images = str(both_stages / "images")
    for model, raters in ((old, ["small", "large"]), (new, ["small", "large", "anna"])):
        output = str(both_stages / f"out_{len(raters)}")
        wanted = ["predict", "-m", str(model), "-i", images, "-o", output]
        assert main([*wanted, "--disable_tta", "--raters", *raters]) == 0
    one, other = both_stages / "out_2" / "raters", both_stages / "out_3" / "raters"
    for rater in ("small", "large"):
        assert files(one / rater) == files(other / rater)
    assert files(other / "anna").keys() == files(one / "large").keys()

    again = [str(both_stages / "again") if word == str(new) else word for word in command]
    assert main([*again, "--steps", "12"]) == 0
    assert all(torch.equal(after_[name], weights(both_stages / "again")[name]) for name in added)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("anna", "small"), "the model knows small already"),
        (("anna", "all"), "predict --raters all means everyone"),
        (("anna", "Small"), "small and Small differ only in upper and lower case"),
        (("new", "images"), "exists already"),
        (("l", "empty"), "holds no label map for an image"),
        (("tr", "nnUNetTrainerMultiRaterDiversified"), "has no heads of raters"),
        (("value", "7"), "case00.nii.gz holds the label value 7"),
    ],
)
def test_bad_input_leaves_nothing(
    command: list[str],
    both_stages: Path,
    change: tuple[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    what, value = change
    if what == "tr":
        command[2] = command[2].replace(SECOND, value)
    elif what == "l":
        shutil.rmtree(both_stages / "anna")
        (both_stages / "anna").mkdir()
    elif what == "value":
        path = both_stages / "anna" / "case00.nii.gz"
        label = SimpleITK.ReadImage(str(path))
        array = np.full(label.GetSize()[::-1], int(value), np.uint8)
        wrong = SimpleITK.GetImageFromArray(array)
        wrong.CopyInformation(label)
        SimpleITK.WriteImage(wrong, str(path))
    elif what == "anna":
        command[-1] = value
    else:
        command[-3] = str(both_stages / value)
    before = sorted(both_stages.rglob("*"))
    assert main([*command, "--steps", "1"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(both_stages.rglob("*")) == before
