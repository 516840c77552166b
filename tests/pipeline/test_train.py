"""Training: what is refused before it starts, and that one fold has one training."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from nnmosaic.pipeline.cli import main
from nnmosaic.pipeline.train import _checkpoint
from nnmosaic.planners.ledger import ledger_path

SHORT = ["--epochs", "1", "--iterations_per_epoch", "1", "--val_iterations_per_epoch", "1"]
TRAIN = ["train", "4", "3d_fullres", "0", *SHORT]
MODEL = "nnUNetTrainerSelfDisambiguation__nnUNetPlans__3d_fullres"
FOLD = f"nnUNet_results/Dataset004_Balls/{MODEL}/fold_0"


def message(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_incomplete_preprocessing_is_refused(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepared / "nnUNet_preprocessed" / "Dataset004_Balls" / "nnUNetPlans_3d_fullres"
    ledger = ledger_path(data)
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    line = message(capsys, TRAIN)
    assert "preprocessing is not finished, 1 cases are missing" in line
    assert "nnmosaic plan_and_preprocess -d 4 -c 3d_fullres" in line


@pytest.mark.parametrize("key", ["labels", "partial_labels"])
def test_a_dataset_json_that_changed_after_preprocessing_is_refused(
    prepared: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = prepared / "nnUNet_raw" / "Dataset004_Balls" / "dataset.json"
    content = json.loads(path.read_text())
    content[key] = {**content.get(key, {}), "ignore": 3}
    path.write_text(json.dumps(content))
    line = message(capsys, TRAIN)
    assert f"{path}: {key} changed after preprocessing. Run: nnmosaic plan_and_preprocess" in line


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["entropy=full", "entropy=off"], "--set gives an option twice"),
        (["speed=high"], "has no option 'speed'. It has loss_form (nnunet|authors)"),
    ],
)
def test_wrong_options_are_refused(
    prepared: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    flags = [word for option in options for word in ("--set", option)]
    line = message(capsys, [*TRAIN, *flags])
    assert text in line
    assert not list((prepared / "nnUNet_results").iterdir())


def test_data_of_other_plans_are_refused(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans_file = prepared / "nnUNet_preprocessed" / "Dataset004_Balls" / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    plans_file.write_text(json.dumps(plans))
    line = message(capsys, TRAIN)
    assert "nnUNetPlans_3d_fullres was preprocessed for other plans or labels" in line


def test_unknown_configurations_plans_and_trainers_are_refused(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "has no configuration '4d'" in message(capsys, ["train", "4", "4d", "0"])
    assert "Other.json does not exist" in message(capsys, [*TRAIN, "-p", "Other"])

    def missing(_: str) -> None:
        raise RuntimeError("Could not find requested nnunet trainer")

    monkeypatch.setattr(
        "nnunetv2.utilities.find_objects.recursive_find_trainer_class_by_name", missing
    )
    assert "'NoTrainer' was not found" in message(capsys, [*TRAIN, "-tr", "NoTrainer"])
    line = message(capsys, [*TRAIN, "-tr", "nnUNetTrainer"])
    assert "nnUNetTrainer is not nnMosaic's: it takes none of" in line


def test_a_fold_that_is_being_trained_is_locked(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (prepared / FOLD).mkdir(parents=True)
    with FileLock(prepared / FOLD / ".training.lock"):
        assert "another process trains this fold" in message(capsys, TRAIN)


def test_training_goes_on_from_the_final_or_else_the_newest_checkpoint(tmp_path: Path) -> None:
    for age, name in enumerate(("checkpoint_latest.pth", "checkpoint_best.pth")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (100 + age, 100 + age))
    choose = partial(_checkpoint, tmp_path, resume=False, only_validate=False, finished=False)
    assert choose() == tmp_path / "checkpoint_best.pth"
    os.utime(tmp_path / "checkpoint_latest.pth", (200, 200))
    assert choose() == tmp_path / "checkpoint_latest.pth"
    (tmp_path / "checkpoint_final.pth").touch()
    os.utime(tmp_path / "checkpoint_final.pth", (1, 1))
    assert choose() == tmp_path / "checkpoint_final.pth"


@pytest.mark.slow
def test_continuing_and_validating_need_what_they_continue(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no checkpoint to continue from" in message(capsys, [*TRAIN, "--c"])
    assert "no finished training to validate" in message(capsys, [*TRAIN, "--val"])
    assert main(TRAIN) == 0
    final = prepared / FOLD / "checkpoint_final.pth"
    before = final.read_bytes()
    assert "holds a finished training, which training anew would overwrite" in message(
        capsys, TRAIN
    )
    assert final.read_bytes() == before
    weights = ["-pretrained_weights", str(final)]
    (prepared / FOLD / "validation" / "summary.json").unlink()
    assert "-pretrained_weights begins a training, but" in message(capsys, [*TRAIN, *weights])
    assert main(TRAIN) == 0  # only the validation was missing
    summary = prepared / FOLD / "validation" / "summary.json"
    before = summary.stat().st_mtime_ns
    assert main(["train", "4", "3d_fullres", "0", "--val"]) == 0
    assert summary.stat().st_mtime_ns > before
    line = message(capsys, ["train", "4", "3d_fullres", "0", "--c", "--epochs", "9"])
    assert "was trained with --epochs 1, not 9" in line


@pytest.mark.slow
def test_pretrained_weights_are_taken_over_or_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = next(trained.glob("nnUNet_results/*/*/fold_0/checkpoint_final.pth"))
    command = ["train", "4", "3d_fullres", "0", "-pretrained_weights"]
    bad = tmp_path / "bad.pth"
    content = torch.load(weights, weights_only=False)
    content["network_weights"].popitem()
    content["network_weights"].popitem()
    content["network_weights"].pop("encoder.stages.0.0.convs.0.conv.weight")
    torch.save(content, bad)
    assert "bad.pth does not fit this network" in message(capsys, [*command, str(bad), *SHORT])
    tiny = [*SHORT, "--initial_lr", "1e-12"]
    assert main([*command, str(weights), *tiny]) == 0
    name = "encoder.stages.0.0.convs.0.conv.weight"
    final = torch.load(prepared_final(trained), weights_only=False)["network_weights"][name]
    expected = torch.load(weights, weights_only=False)["network_weights"][name]
    torch.testing.assert_close(final, expected)


def prepared_final(workspace: Path) -> Path:
    return workspace / FOLD / "checkpoint_final.pth"


def test_devices_that_are_not_there_are_refused(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "torch finds no CUDA device here" in message(capsys, [*TRAIN, "--device", "cuda"])
    assert "torch finds no Apple GPU here" in message(capsys, [*TRAIN, "--device", "mps"])
    assert "torch finds no CUDA device" in message(capsys, [*TRAIN, "--num_gpus", "2"])
    line = message(capsys, [*TRAIN, "--num_gpus", "2", "--device", "cpu"])
    assert "--num_gpus above 1 works with --device cuda" in line
    assert not (prepared / "nnUNet_results" / "Dataset004_Balls").exists()
