"""The context_dice command."""

import json
from pathlib import Path

import pytest

from nnmosaic.pipeline.cli import main


def test_a_trained_fold_is_read_out(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context_dice = ["context_dice", "-d", "4", "-c", "3d_fullres", "-tr", "nnUNetTrainerMosaic"]
    assert main(context_dice) == 2
    assert "is no trained model" in capsys.readouterr().err
    short = ["--epochs", "1", "--val_iterations_per_epoch", "1", "--iterations_per_epoch", "25"]
    train = ["train", "4", "3d_fullres", "0", "-tr", "nnUNetTrainerMosaic"]
    assert main([*train, "--seed", "0", *short]) == 0
    capsys.readouterr()
    assert main(context_dice) == 0
    shown = capsys.readouterr().out
    assert "hidden 0.4, in view" in shown
    (path,) = prepared.glob("nnUNet_results/*/*/fold_0/validation/context_dice.json")
    content = json.loads(path.read_text())
    assert content["cases"] == 1
    assert set(content["dice"]["border"]) == {"bright", "dark"}
    assert content["dice"]["hidden 0.6, in view"]["bright"] > 0.3


def test_partial_labels_are_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["context_dice", "-d", "7", "-c", "3d_fullres"]) == 2
    assert "needs complete labels" in capsys.readouterr().err
