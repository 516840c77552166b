"""Trainings of the benchmarks that were ended go on."""

import os
import time
from pathlib import Path

from benchmarks import grid


def test_only_the_same_training_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert grid._begin(output, "a training") is None
    checkpoint = output / "Dataset001_A" / "trainer" / "fold_0" / "checkpoint_latest.pth"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    ended = time.time() + 1000
    os.utime(checkpoint, (ended, ended))
    assert grid._begin(output, "a training") == checkpoint
    seconds = grid.what_it_took(time.perf_counter(), output)["seconds"]
    assert 999 < seconds < 1100
    assert grid._begin(output, "another training") is None
    assert not checkpoint.exists()
    assert grid.what_it_took(time.perf_counter(), output)["seconds"] < 100
