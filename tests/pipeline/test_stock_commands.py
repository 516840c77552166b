"""Plain nnUNetv2_train and nnUNetv2_predict with nothing but nnUNet_extTrainer set."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnmosaic.pipeline.cli import main

TRAINER = "nnUNetTrainerSelfDisambiguationContext"
MODEL = f"nnUNet_results/Dataset007_Merged/{TRAINER}__nnUNetPlans__3d_fullres"

PREDICT = ("nnunetv2.inference.predict_from_raw_data", "predict_entry_point")
WORKERS = ("-device", "cpu", "-npp", "1", "-nps", "1")

# Where torchvision is a CUDA build beside a CPU torch, it misses two operators (see the README).
CURE = """
import torch
try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def stock(module: str, function: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start an entry point of nnU-Net in a process of its own."""
    call = f"import sys; sys.argv[0] = {function!r}; from {module} import {function} as f; f()"
    return subprocess.Popen([sys.executable, "-c", CURE + call, *arguments])


@pytest.fixture(autouse=True)
def known_trainers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tell nnU-Net's commands where our trainers are."""
    capsys.readouterr()
    assert main(["trainer_path"]) == 0
    monkeypatch.setenv("nnUNet_extTrainer", capsys.readouterr().out.strip())


@pytest.mark.slow
def test_stock_commands_train_and_predict_what_ours_do(
    prepared: Path,
    tmp_path: Path,
) -> None:
    plans_file = prepared / "nnUNet_preprocessed" / "Dataset007_Merged" / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    short = {"epochs": 1, "iterations_per_epoch": 30, "val_iterations_per_epoch": 1}
    # So that there is a teacher, and it has learnt as much.
    short["options"] = {
        "few_cases": "1000", "reconstruction_weight": "0.5", "momentum_base": "0.5",
        "source_heads": "true",
    }  # fmt: skip
    plans["nnmosaic"]["run_settings"].update(short)
    plans_file.write_text(json.dumps(plans))
    train = ("nnunetv2.run.run_training", "run_training_entry")
    training = stock(*train, "7", "3d_fullres", "0", "-tr", TRAINER, "-device", "cpu")
    assert training.wait() == 0
    assert (prepared / MODEL / "fold_0" / "validation" / "summary_raw.json").is_file()

    images = prepared / "nnUNet_raw" / "Dataset007_Merged" / "imagesTr"
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model = ("-d", "7", "-c", "3d_fullres", "-tr", TRAINER, "-f", "0")
    model = (*model, "-chk", "checkpoint_teacher_final.pth")
    prediction = stock(*PREDICT, "-i", str(images), "-o", str(theirs), *model, *WORKERS)
    assert main(["predict", "-i", str(images), "-o", str(ours), *model]) == 0
    assert prediction.wait() == 0

    compare(ours, theirs, cases=10)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["Diversified", "Personalized"])
def test_stock_prediction_of_raters_is_the_mask_of_the_mean_opinion(
    both_stages: Path,
    tmp_path: Path,
    stage: str,
) -> None:
    folders = {name: tmp_path / name for name in ("ours", "theirs")}
    model = ("-d", "8", "-c", "3d_fullres", "-tr", f"nnUNetTrainerMultiRater{stage}", "-f", "0")
    images = ("-i", str(both_stages / "images"))
    prediction = stock(*PREDICT, *images, "-o", str(folders["theirs"]), *model, *WORKERS)
    assert main(["predict", *images, "-o", str(folders["ours"]), *model]) == 0
    assert prediction.wait() == 0
    compare(folders["ours"], folders["theirs"], cases=len(list(folders["ours"].glob("*.nii.gz"))))


@pytest.mark.slow
def test_stock_prediction_of_slices_has_no_sweep(
    propagation_model: Path,
    tmp_path: Path,
    save: Callable[..., None],
) -> None:
    array = np.random.default_rng(0).normal(100, 20, (20, 24, 22)).astype(np.float32)
    save(tmp_path / "images" / "a_0000.nii.gz", array)
    folders = {name: tmp_path / name for name in ("ours", "theirs", "swept")}
    model = ("-m", str(propagation_model), "-i", str(tmp_path / "images"))
    module = PREDICT[0]
    prediction = stock(
        module, "predict_entry_point_modelfolder", *model, "-o", str(folders["theirs"]), "-f", "0",
        *WORKERS,
    )  # fmt: skip
    assert main(["predict", *model, "-o", str(folders["ours"]), "--sweep", "none"]) == 0
    assert main(["predict", *model, "-o", str(folders["swept"])]) == 0
    assert prediction.wait() == 0
    compare(folders["ours"], folders["theirs"], cases=1, share=1e-3)  # untrained: near ties
    maps = [
        SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folders[name] / "a.nii.gz")))
        for name in ("swept", "theirs")
    ]
    assert np.mean(maps[0] != maps[1]) > 1e-2


def compare(ours: Path, theirs: Path, *, cases: int, share: float = 1e-5) -> None:
    """Assert that label maps show something, and differ in this share of the voxels at most."""
    differing = voxels = found = 0
    for path in sorted(theirs.glob("*.nii.gz")):
        a, b = (
            SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / path.name)))
            for folder in (ours, theirs)
        )
        differing, voxels = differing + int(np.sum(a != b)), voxels + a.size
        found += int(np.sum(a > 0))
    assert cases > 0
    assert voxels == cases * 20 * 24 * 22
    assert found > 0.01 * voxels
    assert differing <= share * voxels
