"""Trainings of the benchmarks that were ended go on."""

import os
import time
from pathlib import Path

import pytest

from benchmarks import grid


def _attempt(output: Path, name: str, seconds: float) -> Path:
    """Leave a checkpoint as if the attempt had begun now and taken so long."""
    checkpoint = output / "Dataset001_A" / "trainer" / "fold_0" / name
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.touch()
    os.utime(checkpoint, (time.time() + seconds,) * 2)
    return checkpoint


def test_only_the_same_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    source = {"commit": "one"}
    monkeypatch.setattr(grid, "provenance", lambda: dict(source))
    assert grid._begin(output, "a training") is None
    checkpoint = _attempt(output, "checkpoint_latest.pth", 1000)
    source["commit"] = "two"
    assert grid._begin(output, "a training") == checkpoint
    os.utime(checkpoint, (time.time() - 500,) * 2)  # the second attempt was ended at once
    assert grid._begin(output, "a training") == checkpoint
    took = grid.what_it_took(time.perf_counter(), output)
    assert 999 < took["seconds"] < 1100
    assert took["commit"] == "one, then two"
    assert grid._begin(output, "another training") is None
    assert not checkpoint.exists()
    took = grid.what_it_took(time.perf_counter(), output)
    assert took["seconds"] < 100
    assert took["commit"] == "two"


def test_a_training_that_ended_serves_again_at_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    source = {"commit": "one"}
    monkeypatch.setattr(grid, "provenance", lambda: dict(source))
    grid._begin(output, "a training")
    checkpoint = _attempt(output, "checkpoint_final.pth", 1000)
    assert grid._begin(output, "a training") == checkpoint
    source["commit"] = "two"
    assert grid._begin(output, "a training") is None
    assert not checkpoint.exists()
