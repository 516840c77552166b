"""From raw sources to predictions in one command, in a folder with spaces and umlauts."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SHORT = ("--epochs", "1", "--iterations_per_epoch", "3", "--val_iterations_per_epoch", "1")


def nnmosaic(*arguments: str) -> str:
    command = [sys.executable, "-m", "nnmosaic.pipeline.cli", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


@pytest.mark.slow
def test_run_does_everything_and_a_second_time_nothing(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    home = tmp_path / "Größe µ, two words"
    workspace = ("--workspace", str(home))
    raw, images, output = home / "nnUNet_raw", home / "neue bilder", home / "out put"
    make_dataset(raw / "Dataset011_Höhe A", cases=5, labels={"bright": 1})
    make_dataset(raw / "Dataset012_Höhe B", cases=5, labels={"dark": 2}, first_seed=9)
    printed = nnmosaic("merge", "-d", "13", "-n", "Höhe", "--sources", "11", "12", *workspace)
    assert "Dataset013_Höhe" in printed
    nnmosaic("doctor", "-d", "13", *workspace)
    make_dataset(home / "new", cases=2, first_seed=50)
    (home / "new" / "imagesTr").rename(images)
    command = ["run", "-d", "13", "-c", "3d_fullres", "-f", "0", "--device", "cpu", *SHORT]
    command += ["-i", str(images), "-o", str(output), *workspace]
    nnmosaic(*command)
    made = {path.name for path in output.iterdir()}
    kept = {"dataset.json", "plans.json", "prediction.json"}
    assert made == {"case00.nii.gz", "case01.nii.gz"} | kept
    models = list((home / "nnUNet_results" / "Dataset013_Höhe").iterdir())
    assert len(models) == 1
    files = [*models[0].glob("fold_?/checkpoint_final.pth"), *output.glob("*.nii.gz")]
    assert len(files) == 3
    before = {path: path.stat().st_mtime_ns for path in files}
    log = nnmosaic(*command)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert "Fingerprint: unchanged" in log
    assert "Fold 0 is finished" in log

    other = subprocess.run(
        [sys.executable, "-m", "nnmosaic.pipeline.cli", *command, "--epochs", "2"],
        capture_output=True,
        text=True,
    )
    assert other.returncode == 2
    assert "was trained with --epochs 1, not 2" in other.stderr
