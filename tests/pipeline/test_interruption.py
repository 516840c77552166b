"""kill -9 in the middle of preprocessing and of an epoch: the same command again finishes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest

from nnmosaic.pipeline.cli import main
from nnmosaic.planners.ledger import Ledger, ledger_path
from nnmosaic.trainers.checkpoint import EXTRA, read_checkpoint

NNMOSAIC = (sys.executable, "-m", "nnmosaic.pipeline.cli")
DATASET = "Dataset008_Many"
CASES = 50
PREPROCESS = ("plan_and_preprocess", "-d", "8", "-c", "3d_fullres", "-np", "2")


@pytest.fixture
def many(workspace: Path, make_dataset: Callable[..., Path]) -> Path:
    """Return the folder where a raw dataset of many cases will be preprocessed."""
    make_dataset(workspace / "nnUNet_raw" / DATASET, cases=CASES)
    return workspace / "nnUNet_preprocessed" / DATASET


def kill_when(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()


def processes_of_session(session: int) -> list[int]:
    """Return the living processes of a session (field 6 of /proc/PID/stat), zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_preprocessing_goes_on_after_a_kill(many: Path) -> None:
    data = many / "nnUNetPlans_3d_fullres"
    ledger = Ledger(ledger_path(data))
    first = subprocess.Popen([*NNMOSAIC, *PREPROCESS], start_new_session=True)

    def begun() -> bool:
        return ledger.path.is_file() and 3 <= CASES - len(ledger.missing()) < CASES

    kill_when(begun, first)
    assert 0 < len(ledger.missing()) < CASES
    deadline = time.monotonic() + 10
    while processes_of_session(first.pid):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.05)
    finished = {
        name: (data / f"{name}.b2nd").stat().st_mtime_ns
        for name in {path.name.split(".")[0] for path in data.glob("case??.b2nd")}
        if name not in ledger.missing()
    }
    assert main(PREPROCESS) == 0
    assert ledger.missing() == []
    for name, modified in finished.items():
        assert (data / f"{name}.b2nd").stat().st_mtime_ns == modified
    interrupted = {path.name: blosc2.open(str(path))[:] for path in data.glob("*.b2nd")}
    leftovers = [p.name for p in many.iterdir() if p.name.startswith(".")]
    assert leftovers == []

    for path in sorted(many.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert main(PREPROCESS) == 0
    undisturbed = {path.name: blosc2.open(str(path))[:] for path in data.glob("*.b2nd")}
    assert sorted(interrupted) == sorted(undisturbed)
    assert len(undisturbed) == 2 * CASES
    assert all(np.array_equal(interrupted[name], undisturbed[name]) for name in undisturbed)


@pytest.mark.slow
def test_a_killed_worker_is_named_and_the_next_run_continues(many: Path) -> None:
    scratch = many / ".nnUNetPlans_3d_fullres.tmp"
    ledger = Ledger(ledger_path(many / "nnUNetPlans_3d_fullres"))
    run = subprocess.Popen([*NNMOSAIC, *PREPROCESS], stderr=subprocess.PIPE, text=True)
    while not (notes := list(scratch.glob("*.case"))):
        assert run.poll() is None
        time.sleep(0.005)
    os.kill(int(notes[0].stem), signal.SIGKILL)
    killed = time.monotonic()
    _, message = run.communicate(timeout=60)
    assert time.monotonic() - killed < 10
    assert run.returncode == 1
    assert re.search(r"The worker process of case\d\d was ended by SIGKILL", message), message
    assert "Traceback" not in message
    assert ledger.missing()
    assert main(PREPROCESS) == 0
    assert ledger.missing() == []


@pytest.mark.slow
def test_training_goes_on_after_a_kill_and_after_sigterm(prepared: Path) -> None:
    model = "nnUNetTrainerSelfDisambiguation__nnUNetPlans__3d_fullres"
    folder = prepared / "nnUNet_results" / "Dataset004_Balls" / model / "fold_0"
    settings = ["--epochs", "3", "--iterations_per_epoch", "20", "--val_iterations_per_epoch", "1"]
    train = ["train", "4", "3d_fullres", "0", *settings]

    def in_epoch_one(old_logs: set[Path]) -> Callable[[], bool]:
        def reached() -> bool:
            new = set(folder.glob("training_log_*.txt")) - old_logs
            return any("Epoch 1" in log.read_text() for log in new)

        return reached

    kill_when(in_epoch_one(set()), subprocess.Popen([*NNMOSAIC, *train]))
    assert not (folder / "checkpoint_final.pth").exists()
    old_logs = set(folder.glob("training_log_*.txt"))
    second = subprocess.Popen([*NNMOSAIC, *train], stderr=subprocess.PIPE)
    while not in_epoch_one(old_logs)():
        assert second.poll() is None
        time.sleep(0.02)
    os.kill(second.pid, signal.SIGTERM)
    _, message = second.communicate(timeout=60)
    assert second.returncode == 1
    assert b"Continuing from" in message
    assert b"stopped by SIGTERM in epoch" in message
    assert read_checkpoint(folder / "checkpoint_latest.pth")[EXTRA]["run_settings"]["epochs"] == 3
    assert main(train) == 0
    assert read_checkpoint(folder / "checkpoint_final.pth")["current_epoch"] == 3
    assert (folder / "validation" / "summary.json").is_file()
