"""The few_shot command: folds that train, and the report over draws."""

import json
from pathlib import Path

import numpy as np
import pytest

from nnmosaic.pipeline.cli import main
from nnmosaic.pipeline.few_shot import without_few_shot

MODEL = "nnUNetTrainerMosaic__nnUNetPlans__3d_fullres"
DATASET = "Dataset004_Balls"


def test_folds_are_trained_like_others(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["few_shot", "-d", "4", "--cases", "1", "2", "--draws", "2"]) == 0
    table = capsys.readouterr().out
    assert [line.split()[1:6:2] for line in table.splitlines()[3:7]] == [
        ["5", "1", "0"], ["6", "2", "0"], ["7", "1", "1"], ["8", "2", "1"]
    ]  # fmt: skip
    short = ["--epochs", "1", "--iterations_per_epoch", "1", "--val_iterations_per_epoch", "1"]
    assert main(["train", "4", "3d_fullres", "5", "-tr", "nnUNetTrainerMosaic", *short]) == 0
    model = prepared / "nnUNet_results" / DATASET / MODEL
    log = next((model / "fold_5").glob("training_log_*.txt")).read_text()
    assert "1 training and 1 validation cases" in log

    images = prepared / "nnUNet_raw" / DATASET / "imagesTr"
    predict = [
        "predict",
        "-i",
        str(images),
        "-d",
        "4",
        "-c",
        "3d_fullres",
        "-o",
        str(prepared / "o"),
    ]
    assert main([*predict, "-tr", "nnUNetTrainerMosaic"]) == 2
    assert "has few-shot folds only: 5. Name those" in capsys.readouterr().err
    best = ["find_best", "-d", "4", "-c", "3d_fullres", "-tr", "nnUNetTrainerMosaic"]
    assert main(best) == 2
    assert "No fold is finished for every model" in capsys.readouterr().err
    assert main([*best, "-f", "5"]) == 0
    for few, kept in (([5, 0, 7], [0]), (["all"], ["all"]), (["5", "1"], ["1"])):
        assert without_few_shot(few, prepared / "nnUNet_preprocessed" / DATASET) == kept


def test_the_report_is_the_mean_over_draws(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["few_shot", "-d", "4", "--cases", "1", "2", "--draws", "3"])
    report = ["few_shot", "-d", "4", "--report", "-c", "3d_fullres", "-tr", "nnUNetTrainerMosaic"]
    capsys.readouterr()
    assert main(report) == 2
    assert "No few-shot fold of Dataset004_Balls is trained" in capsys.readouterr().err
    values = {5: 0.5, 7: 0.6, 9: 0.8, 6: 0.9}
    for fold, dice in values.items():
        folder = prepared / "nnUNet_results" / DATASET / MODEL / f"fold_{fold}" / "validation"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"foreground_mean": {"Dice": dice}}))
    assert main(report) == 0
    lines = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in line] for line in lines if len(line) == 5]
    spread = f"{np.std([0.5, 0.6, 0.8], ddof=1):.4f}"
    assert ["1", "nnUNetTrainerMosaic", "0.6333", spread, "0, 1, 2"] in rows
    assert ["2", "nnUNetTrainerMosaic", "0.9000", "", "0"] in rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "9"], "9 cannot be drawn from them"),
        (["--report"], "needs -c, and takes no --draws"),
        (["--cases", "1", "-c", "3d_fullres"], "about few_shot --report only"),
    ],
)
def test_bad_requests_are_refused(
    prepared: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["few_shot", "-d", "4", *arguments]) == 2
    assert message in capsys.readouterr().err
