"""The evaluate command: tables, warnings, figure, and the full references."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nnmosaic.pipeline.cli import main

CONTENT = {
    "channel_names": {"0": "T1"},
    "labels": {"background": 0, "bright": 1, "dark": 2},
    "file_ending": ".nii.gz",
}
SOURCES = {
    "Bright": {"pattern": "^b", "annotated": ["bright"]},
    "Dark": {"pattern": "^d", "annotated": ["dark"]},
}


@pytest.fixture
def command(tmp_path: Path, save: Callable[..., None]) -> list[str]:
    """One case per source; the bright object is found in both, the dark one only where labelled."""
    label = np.zeros((4, 4, 4), np.uint8)
    label[0], label[2] = 1, 2
    for case, value in (("b", 1), ("d", 2)):
        save(tmp_path / "labels" / f"{case}.nii.gz", np.where(label == value, label, 0))
        save(tmp_path / "full" / f"{case}.nii.gz", label)
    save(tmp_path / "predictions" / "b.nii.gz", np.where(label == 1, label, 0))
    save(tmp_path / "predictions" / "d.nii.gz", label)
    content = {**CONTENT, "partial_labels": {"sources": SOURCES}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    folders = [str(tmp_path / name) for name in ("labels", "predictions")]
    return ["evaluate", *folders, "-djfile", str(tmp_path / "dataset.json")]


def lines(text: str) -> list[list[str]]:
    """Return the words of every line, without the frame of the table."""
    return [line.translate(str.maketrans("│┃", "  ")).split() for line in text.splitlines()]


def test_both_tables_and_the_warnings_are_printed(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    out = capsys.readouterr().out
    printed = lines(out)
    assert ["bright", "1.000", "1", "1.000", "-"] in printed
    assert ["dark", "Bright", "1", "0"] in printed
    assert ["bright", "Dark", "1", "0.016"] in printed
    assert "Warning: Class 'dark' is predicted in 0 of 1 cases of source 'Bright'" in out
    summary = json.loads((tmp_path / "predictions" / "summary.json").read_text())
    assert summary["warnings"] == [out.split("Warning: ")[1].strip()]
    assert (tmp_path / "predictions" / "validation.png").is_file()


def test_ignored_voxels_are_scored_against_full_references(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    save: Callable[..., None],
) -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    label[0] = 1
    sparse = np.where(np.arange(4)[:, None, None] % 2, label, 3).astype(np.uint8)
    save(tmp_path / "labels" / "b.nii.gz", sparse)
    labels = {**CONTENT["labels"], "ignore": 3}
    content = {**CONTENT, "labels": labels, "partial_labels": {"sources": SOURCES}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert main([*command, "--full", str(tmp_path / "full")]) == 0
    out = capsys.readouterr().out
    assert "Annotated classes at ignored voxels" in out
    assert ["bright", "Bright", "1", "0.016", "1", "1.000", "1.000", "0"] in lines(out)


def test_full_references_add_recall_and_false_positives(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores" / "mine.json"
    output.parent.mkdir()
    assert main([*command, "--full", str(tmp_path / "full"), "-o", str(output)]) == 0
    printed = lines(capsys.readouterr().out)
    assert ["dark", "Bright", "1", "0", "1", "0.000", "0.000", "0"] in printed
    assert ["bright", "Dark", "1", "0.016", "1", "1.000", "1.000", "0"] in printed
    assert json.loads(output.read_text())["not_annotated"]["Dark"]["1"]["recall"] == 1
    assert (output.parent / "validation.png").is_file()
    assert not (tmp_path / "predictions" / "validation.png").exists()


def test_full_references_that_score_nothing_are_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--full", str(tmp_path / "nowhere")]) == 2
    assert "nowhere has no .nii.gz file in common with" in capsys.readouterr().err
    (tmp_path / "dataset.json").write_text(json.dumps(CONTENT))
    assert main([*command, "--full", str(tmp_path / "full")]) == 2
    assert "declares no partial_labels" in capsys.readouterr().err
    assert main(command) == 0
    assert not (tmp_path / "predictions" / "validation.png").exists()
