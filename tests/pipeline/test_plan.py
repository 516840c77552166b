"""The plan commands: what they print, keep and measure."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnmosaic.pipeline import measured_plans as module
from nnmosaic.pipeline.cli import main
from nnmosaic.planners.cpu_budget import Speed
from nnmosaic.planners.ledger import Ledger, configuration_digest, ledger_path

DATASET = "Dataset004_Balls"
FOLDER = Path("nnUNet_preprocessed") / DATASET
CPU = ["-d", "4", "-c", "3d_fullres", "--device", "cpu"]


def plans_in(workspace: Path, name: str = "nnUNetPlans") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((workspace / FOLDER / f"{name}.json").read_text())
    return content


@pytest.mark.slow
def test_plan_prints_a_table_with_a_reason_for_every_decision(
    workspace: Path, make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(workspace / "nnUNet_raw" / DATASET, cases=2)
    assert main(["plan", "-d", "4"]) == 0
    brief = capsys.readouterr().out
    row = next(line for line in brief.splitlines() if line.split()[:1] == ["3d_fullres"])
    configuration = plans_in(workspace)["configurations"]["3d_fullres"]
    assert " x ".join(map(str, configuration["patch_size"])) in row
    assert "PlainConvUNet" in row
    assert " M " in row
    assert "GB" in row
    assert "target spacing: 1.25 x 0.8 x 1 mm (median over all cases)" in brief
    assert "normalisation of channel 0: ZScoreNormalization" in brief
    assert not (workspace / FOLDER / "nnUNetPlans_3d_fullres").exists()
    assert main(["plan", "-d", "4", "--explain", "--memory_gb", "2"]) == 0
    explained = capsys.readouterr().out
    assert '"median_spacing": [1.25, 0.8' in explained
    assert "features: from 16 (2 GB are less than nnU-Net's presets need)" in explained


@pytest.mark.slow
def test_a_plans_file_edited_by_hand_is_kept(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepared / FOLDER / "nnUNetPlans.json"
    plans = plans_in(prepared)
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    path.write_text(json.dumps(plans))
    command = ["plan_and_preprocess", "-d", "4", "-c", "3d_fullres"]
    assert main([*command, "--keep_plans"]) == 0
    assert plans_in(prepared) == plans
    ledger = Ledger(ledger_path(prepared / FOLDER / "nnUNetPlans_3d_fullres"))
    declared = json.loads((prepared / FOLDER / "dataset.json").read_text())
    assert len(ledger.finished(configuration_digest(plans, "3d_fullres", declared))) == 5
    assert main([*command, "--keep_plans", "-overwrite_plans_name", "Other"]) == 2
    shutil.copyfile(path, path.with_name("Copy.json"))  # but it calls itself nnUNetPlans
    assert main([*command, "--keep_plans", "-overwrite_plans_name", "Copy"]) == 2
    assert "Set it to 'Copy'" in capsys.readouterr().err
    assert plans_in(prepared) == plans
    raw = prepared / "nnUNet_raw" / DATASET / "dataset.json"
    raw.write_text(json.dumps({**json.loads(raw.read_text()), "subjects": {"case00": "x"}}))
    assert main([*command, "--keep_plans"]) == 0
    assert json.loads((prepared / FOLDER / "dataset.json").read_text())["subjects"]


@pytest.mark.slow
def test_minutes_are_measured_once_and_kept(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run must not choose another network under folds that are trained."""
    measured = []

    def measure(plans: dict[str, Any], *_: object) -> Speed:
        assert plans["nnmosaic"]["budget"]["cores"] == 1
        measured.append(plans["configurations"]["3d_fullres"]["patch_size"])
        return Speed(1.0, 0.01 * 4 ** len(measured), 0.01, 0.5, 0.1, 0.7)

    monkeypatch.setattr(module, "measure_speed", measure)
    command = ["plan_and_preprocess", *CPU, "--minutes", "10", "--folds", "2", "--cores", "1"]
    assert main(command) == 0
    first = plans_in(prepared)
    assert len(measured) == 2
    out = capsys.readouterr().out
    assert "10.0 minutes expected for 2 fold(s)" in out.replace("9.9 minutes", "10.0 minutes")
    features = first["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"][
        "features_per_stage"
    ]
    assert f"from {features[0]}" in out
    assert first["nnmosaic"]["run_settings"]["iterations_per_epoch"] > 20
    assert main(command) == 0
    assert plans_in(prepared) == first
    assert len(measured) == 2
    assert main([*command, "-c", "2d"]) == 2
    assert "Give the plans of 2d another name" in capsys.readouterr().err
    assert main([*command, "--minutes", "20"]) == 0
    assert len(measured) > 2
    assert plans_in(prepared)["nnmosaic"]["budget"]["minutes"] == 20


@pytest.mark.slow
def test_trained_folds_keep_their_network(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = plans_in(prepared)
    model = "nnUNetTrainerMosaic__nnUNetPlans__3d_fullres"
    fold = prepared / "nnUNet_results" / DATASET / model / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").write_bytes(b"")
    assert main(["plan", "-d", "4"]) == 2  # a GPU's plan, where the one for a CPU was trained
    message = capsys.readouterr().err
    assert str(fold) in message
    assert "--keep_plans" in message
    assert plans_in(prepared) == before
    assert main(["plan", "-d", "4", "--device", "cpu"]) == 0
    assert main(["plan", "-d", "4", "-overwrite_plans_name", "Other"]) == 0
    images = ["-i", str(prepared), "-o", str(prepared / "out"), "-tr", "nnUNetTrainerMosaic"]
    assert main(["run", *CPU, "--minutes", "5", *images]) == 2
    assert "was planned for no minutes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_smaller_patch_preprocesses_what_depends_on_it(
    workspace: Path,
    make_dataset: Callable[..., Path],
    save: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The spacing of 3d_lowres follows from the patch."""
    folder = make_dataset(workspace / "nnUNet_raw" / DATASET, cases=1)
    rng = np.random.default_rng(0)
    save(folder / "imagesTr" / "case00_0000.nii.gz", rng.random((90, 120, 120), np.float32))
    label = np.zeros((90, 120, 120), np.uint8)
    label[30:50, 30:50, 30:50] = 1
    label[60:70, 60:70, 60:70] = 2
    save(folder / "labelsTr" / "case00.nii.gz", label)
    monkeypatch.setattr(module, "measure_speed", lambda *_: Speed(1.0, 0.3, 0.01, 0.1, 0.1, 0.7))
    command = ["plan_and_preprocess", "-d", "4", "-c", "3d_lowres", "--device", "cpu"]
    assert main([*command, "--minutes", "2", "--folds", "1"]) == 0
    plans = plans_in(workspace)
    ledger = Ledger(ledger_path(workspace / FOLDER / "nnUNetPlans_3d_lowres"))
    declared = json.loads((workspace / FOLDER / "dataset.json").read_text())
    assert list(ledger.finished(configuration_digest(plans, "3d_lowres", declared))) == ["case00"]
    assert main([*command, "--minutes", "2", "--folds", "1"]) == 0
    assert plans_in(workspace) == plans


@pytest.mark.slow
def test_measured_steps_are_in_the_table(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real steps are measured by the README's commands, see test_readme.py."""
    monkeypatch.setattr(module, "measure_speed", lambda *_: Speed(1.0, 0.5, 0.2, 3.0, 0.1, 0.7))
    assert main(["plan_and_preprocess", *CPU, "--measure"]) == 0
    row = next(
        line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["3d_fullres"]
    )
    assert row.split()[-4:] == ["0.7", "GB", f"{50 * 0.5 + 5 * 0.2 + 3:.0f}", "s"]
    assert plans_in(prepared)["nnmosaic"]["expected"]["3d_fullres"]["per_step"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "5"], "add --device cpu"),
        (["--device", "cpu", "--minutes", "5", "-c", "2d", "3d_fullres"], "exactly one with -c"),
        (["--device", "cpu", "--cores", "1"], "give both"),
        (["--device", "cpu", "--minutes", "5", "--cores", "1000"], "this machine has"),
        (["--device", "cpu", "--memory_gb", "5"], "leave -pl and --memory_gb out"),
        (["--keep_plans", "-pl", "MosaicPlanner"], "takes the plans file as it is"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(
    workspace: Path,
    make_dataset: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    make_dataset(workspace / "nnUNet_raw" / DATASET, cases=1)
    assert main(["plan_and_preprocess", "-d", "4", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (workspace / FOLDER).exists()
