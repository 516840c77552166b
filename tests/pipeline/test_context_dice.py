"""The context_dice command."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.cli import main
from nnmosaic.pipeline.context_dice import _check_model


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
    pattern = "nnUNet_results/*/*/fold_0/validation/context_dice_checkpoint_final.json"
    (path,) = prepared.glob(pattern)
    content = json.loads(path.read_text())
    assert content["cases"] == 1
    assert set(content["dice"]["border"]) == {"bright", "dark"}
    assert content["dice"]["hidden 0.6, in view"]["bright"] > 0.3

    model = path.parents[2]
    splits = prepared / "nnUNet_preprocessed" / "Dataset004_Balls" / "splits_final.json"
    (model / "fold_9").symlink_to("fold_0")
    assert main([*context_dice, "-f", "9"]) == 2
    assert "has 5 folds, none of them 9" in capsys.readouterr().err
    folds = json.loads(splits.read_text())
    folds[0]["val"] = ["gone"]
    splits.write_text(json.dumps(folds))
    assert main(context_dice) == 2
    assert "lacks the validation case gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("patch_size", "previous_stage", "regions", "message"),
    [
        ((8, 8), None, False, "2D configurations"),
        ((8, 8, 8), "3d_lowres", False, "cascades"),
        ((8, 8, 8), None, True, "regions"),
    ],
)
def test_other_models_are_refused(
    patch_size: tuple[int, ...], previous_stage: str | None, regions: bool, message: str
) -> None:
    predictor = SimpleNamespace(
        configuration_manager=SimpleNamespace(
            patch_size=patch_size, previous_stage_name=previous_stage
        ),
        label_manager=SimpleNamespace(has_regions=regions),
        dataset_json={},
    )
    with pytest.raises(InputError, match=f"context_dice does not read {message}"):
        _check_model(predictor, Path("model"))


def test_partial_labels_are_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["context_dice", "-d", "7", "-c", "3d_fullres"]) == 2
    assert "does not read partial labels" in capsys.readouterr().err
