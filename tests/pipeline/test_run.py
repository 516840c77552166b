"""From raw sources to predictions in one command, in a folder with spaces and umlauts."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nnmosaic.pipeline.cli import main

SHORT = ("--epochs", "1", "--iterations_per_epoch", "3", "--val_iterations_per_epoch", "1")


EACH = """
import json, sys
from nnmosaic.pipeline.cli import main
for command in json.loads(sys.argv[1]):
    print(f"exit code {main(command)}", flush=True)
"""


def nnmosaic(*commands: list[str]) -> tuple[list[int], str]:
    """Run commands one after the other in one new process; return exit codes and all output."""
    run = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(commands)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    return [int(code) for code in re.findall(r"^exit code (\d)$", run.stdout, re.M)], run.stdout


@pytest.mark.slow
def test_run_does_everything_and_a_second_time_nothing(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    home = tmp_path / "Größe µ, two words"
    workspace = ("--workspace", str(home))
    raw, images, output = home / "nnUNet_raw", home / "neue bilder", home / "out put"
    make_dataset(raw / "Dataset011_Höhe A", cases=5, labels={"bright": 1})
    make_dataset(raw / "Dataset012_Höhe B", cases=5, labels={"dark": 2}, first_seed=9)
    make_dataset(home / "new", cases=2, first_seed=50)
    (home / "new" / "imagesTr").rename(images)
    command = ["run", "-d", "13", "-c", "3d_fullres", "-f", "0", "--device", "cpu", *SHORT]
    command += ["-i", str(images), "-o", str(output), *workspace]
    merge = ["merge", "-d", "13", "-n", "Höhe", "--sources", "11", "12", *workspace]
    codes, printed = nnmosaic(merge, ["doctor", "-d", "13", *workspace], command)
    assert codes == [0, 0, 0], printed
    assert "Dataset013_Höhe" in printed.partition("exit code")[0]
    made = {path.name for path in output.iterdir()}
    kept = {"dataset.json", "plans.json", "prediction.json"}
    assert made == {"case00.nii.gz", "case01.nii.gz"} | kept
    models = list((home / "nnUNet_results" / "Dataset013_Höhe").iterdir())
    assert len(models) == 1
    files = [*models[0].glob("fold_?/checkpoint_final.pth"), *output.glob("*.nii.gz")]
    assert len(files) == 3
    before = {path: path.stat().st_mtime_ns for path in files}
    codes, log = nnmosaic(command, [*command, "--epochs", "2"])
    assert codes == [0, 2], log
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert "Fingerprint: unchanged" in log
    assert "fold 0 is finished" in log
    assert "was trained with --epochs 1, not 2" in log


@pytest.mark.slow
def test_run_begins_clustering_propagation_with_a_plain_model(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = prepared / "nnUNet_raw" / "Dataset004_Balls" / "imagesTr"
    images = prepared / "images"
    images.mkdir()
    for path in sorted(cases.glob("*"))[:2]:
        shutil.copy(path, images / path.name)
    trainer = "nnUNetTrainerClusteringPropagation"
    command = ["run", "-d", "4", "-c", "2d", "-f", "0", "--device", "cpu", "-tr", trainer, *SHORT]
    command += ["-i", str(images), "-o", str(prepared / "out")]
    assert main([*command, "--minutes", "5"]) == 2
    assert "which run trains after nnUNetTrainerMosaic" in capsys.readouterr().err
    assert main(command) == 0
    results = prepared / "nnUNet_results" / "Dataset004_Balls"
    files = [
        results / f"{name}__nnUNetPlans__2d" / "fold_0" / "checkpoint_final.pth"
        for name in ("nnUNetTrainerMosaic", trainer)
    ]
    plain, ours = (torch.load(path, weights_only=False)["network_weights"] for path in files)
    unet = [name for name in plain if ".seg_layers." not in name]
    assert len(unet) > 10
    assert all(torch.equal(plain[name], ours[name]) for name in unet)
    before = [path.stat().st_mtime_ns for path in files]
    assert main(command) == 0
    assert [path.stat().st_mtime_ns for path in files] == before
