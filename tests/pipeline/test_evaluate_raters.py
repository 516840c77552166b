"""The evaluate_raters command: its tables, summary_raters.json, and what it says of bad input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnmosaic.pipeline.cli import main

CONTENT: dict[str, Any] = {
    "channel_names": {"0": "T1"},
    "labels": {"background": 0, "lesion": 1},
    "file_ending": ".png",
    "multirater": {"raters": ["small", "large", "absent"], "identity": "persistent"},
}


@pytest.fixture
def command(tmp_path: Path, save: Callable[..., None]) -> list[str]:
    """Raters who draw 1 and 3 of 4 rows, each predicted exactly; a sample of each, and nothing."""
    rows = np.arange(4)[:, None] * np.ones((1, 5))
    small, large = ((rows < n).astype(np.uint8) for n in (1, 3))
    files = {
        "labels/small/c1": small, "labels/large/c1": large, "labels/small/c2": small,
        "out/c1": small, "out/raters/small/c1": small, "out/raters/large/c1": large,
        "out/samples/000/c1": small, "out/samples/001/c1": large,
        "out/samples/002/c1": np.zeros_like(small),
    }  # fmt: skip
    for name, label in files.items():
        save(tmp_path / f"{name}.png", label)
    (tmp_path / "dataset.json").write_text(json.dumps(CONTENT))
    folders = [str(tmp_path / name) for name in ("labels", "out")]
    return ["evaluate_raters", *folders, "-djfile", str(tmp_path / "dataset.json")]


def lines(text: str) -> list[list[str]]:
    """Return the words of every line, without the frame of the table."""
    return [line.translate(str.maketrans("│┃", "  ")).split() for line in text.splitlines()]


def test_raters_and_samples_are_printed(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    out = capsys.readouterr().out
    printed = lines(out)
    assert "Mask of each rater\n" in out
    assert ["rater", "Dice", "cases", "other", "raters"] in printed
    assert ["small", "1.000", "1", "0.500"] in printed
    assert ["large", "1.000", "1", "0.500"] in printed
    assert ["absent", "-", "0", "-"] in printed
    assert ["mean", "1.000"] in printed
    assert ["best", "assignment", "1.000"] in printed
    assert "GED of the raters' masks: 0.000" in out
    assert (
        "identified by its mask: 1.000 (by chance 0.500, with swapped names 0.000 to 1.000)" in out
    )
    assert "Annotated, but not predicted: 1 cases" in out
    # Rows 0 to 2 are predicted with 2/3, and so many of their six annotations agree.
    assert "Share of samples: ECE 0.000, ACE 0.000, soft Dice 0.600" in out
    # d(small, large) = 2/3, d(., nothing) = 1. Across: (2/3 + 2/3 + 1 + 1) / 6 = 5/9; within the
    # raters 1/3; within the samples 2 (2/3 + 1 + 1) / 9 = 16/27. GED 10/9 - 9/27 - 16/27 = 5/27.
    # Soft Dice: 2/3 of the samples show row 0, 1/3 rows 1 and 2; annotations 1 and 1/2. Only above
    # 0.1, 0.3 and 0.5 (row 0) do they agree; above 0.7 and 0.9 no sample is left: 3/5.
    # Best for a sample: 1, 1, 0. Variance, per column: 3 * 2/9 over 2 * 1/4.
    scores = ["3", "0.185", "0.600", "1.000", "0.667", "1.000", "1.000", "1.333"]
    assert scores in printed
    summary = json.loads((tmp_path / "out" / "summary_raters.json").read_text())
    assert summary["samples"]["GED"] == pytest.approx(5 / 27)
    assert summary["not_predicted"] == ["c2"]


def test_one_prediction_is_scored_for_exchangeable_raters(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in ("raters", "samples"):
        shutil.rmtree(tmp_path / "out" / folder)
    content = {**CONTENT, "multirater": {**CONTENT["multirater"], "identity": "exchangeable"}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    probabilities = np.full((2, 1, 4, 5), 0.25)
    probabilities[0, 0, 1:], probabilities[1, 0, 0] = 0.75, 0.75
    np.savez(tmp_path / "out" / "c1.npz", probabilities=probabilities)
    output = tmp_path / "mine.json"
    assert main([*command, "-o", str(output)]) == 0
    out = capsys.readouterr().out
    printed = lines(out)
    assert "One mask, each rank (no person)\n" in out
    assert ["rank", "Dice", "cases", "other", "ranks"] in printed
    assert ["large", "0.500", "1", "0.500"] in printed
    assert ["mean", "0.750"] in printed
    assert not any(word in out for word in ("best assignment", "identified", "GED", "samples"))
    # Always sure to 0.75; right for "small", and for 2 of 4 rows of "large". Soft Dice: all rows
    # against 3 above 0.1 (6/7), row 0 against 3 rows above 0.3 (1/2), agreement above 0.5 and 0.7,
    # nothing against row 0 above 0.9.
    assert "Mean probability: ECE 0.000, ACE 0.000, soft Dice 0.671" in out
    assert json.loads(output.read_text())["identity"] == "exchangeable"
    assert not (tmp_path / "out" / "summary_raters.json").exists()


def test_bad_input_is_one_message(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "samples" / "001" / "c1.png").unlink()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "001/c1.png does not exist, but" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out" / "summary_raters.json").exists()
