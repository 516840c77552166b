"""What the README says is true: its commands run, its names exist."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from skimage import io

from nnmosaic.pipeline.cli import _parser
from nnmosaic.trainers import TRAINERS
from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.context_reconstruction.trainer import nnUNetTrainerContextReconstruction
from nnmosaic.trainers.options import option_types
from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)
BLOCKS = BASH.findall(README)
LINES = [
    line.strip()
    for text in (README, *DOCS.values())
    for block in BASH.findall(text)
    for line in block.splitlines()
]
SHORTER = {"--epochs 5 --iterations_per_epoch 60": "--epochs 1 --iterations_per_epoch 2"}
SHORTER["--device cpu --epochs"] = "-f 0 --device cpu --epochs"
SHORTER["in 0 1 2 3 4"] = "in 0"
SHORTER["--minutes 30"] = "--minutes 8"  # one measurement is enough to choose
SHORTER["-p In30Minutes"] = "-p In30Minutes --epochs 1 --iterations_per_epoch 2"
EXAMPLE = Path("examples") / "hippocampus"
RETINA = Path("examples") / "retina"


def small_checkout(folder: Path) -> Path:
    """Write the example as in the repository, but with 5 cases per source and 2 test cases."""
    kept = {"Dataset011_Anterior": 5, "Dataset012_Posterior": 5, "test": 2}
    for name, number in kept.items():
        source, target = ROOT / EXAMPLE / name, folder / EXAMPLE / name
        content = json.loads((source / "dataset.json").read_text())
        # One case per subject, so that 5 folds can be made.
        cases = list({subject: case for case, subject in content["subjects"].items()}.values())
        content["subjects"] = {case: content["subjects"][case] for case in cases[:number]}
        content["numTraining"] = number
        for part in source.iterdir():
            for path in part.glob("*.nii.gz") if part.is_dir() else ():
                if path.name.removesuffix(".nii.gz").removesuffix("_0000") in content["subjects"]:
                    copy = target / part.name / path.name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
        (target / "dataset.json").write_text(json.dumps(content))
    return folder


def environment() -> dict[str, str]:
    """That of a new user: no folder of nnU-Net is set, and the commands are on the path."""
    unset = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


def test_every_nnmosaic_line_is_a_valid_command() -> None:
    lines = [line for line in LINES if line.startswith("nnmosaic ")]
    assert len(lines) >= 7
    for line in lines:
        _parser().parse_args(shlex.split(line.replace("$fold", "0"))[1:])


def test_every_other_line_is_known_to_a_test() -> None:
    others = {line.split()[0] for line in LINES if line and not line.startswith("nnmosaic ")}
    # nnUNetv2_*: test_stock_commands.py; make and pip: .ci/run; the rest: below.
    known = {"nnUNetv2_train", "nnUNetv2_predict", "export", "make", "pip"}
    assert others == known | {"mkdir", "cp", "for", "done"}
    makefile = (ROOT / "Makefile").read_text()
    for line in LINES:
        if line.startswith("make "):
            assert f"\n{line.split()[1]}: install" in makefile


def test_trainers_and_commands_are_in_the_readme() -> None:
    for trainer in TRAINERS:
        assert f"`{trainer}`" in README
    commands = next(a for a in _parser()._actions if a.dest == "name").choices
    for command in commands:
        assert f"| `nnmosaic {command}` |" in README


def test_linked_files_exist() -> None:
    for page, text in {ROOT / "README.md": README, **DOCS}.items():
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("https://") or (page.parent / link).is_file(), link


@pytest.mark.parametrize(
    ("trainer", "file"),
    [
        (nnUNetTrainerSelfDisambiguation, "partial_labels.md"),
        (nnUNetTrainerContextReconstruction, "context_reconstruction.md"),
    ],
)
def test_every_option_is_in_the_docs(trainer: type, file: str) -> None:
    page = DOCS[ROOT / "docs" / file]
    for name, kind in option_types(trainer).items():
        if name in nnUNetTrainerMosaic.OPTIONS:  # of every trainer
            assert f"`--set {name}=" in README
            continue
        assert f"`{name}`" in page
        default = getattr(trainer, name)
        words = [str(default).lower()] if kind is bool else get_args(kind) or [f"{default:g}"]
        rows = [line for line in page.splitlines() if line.startswith("|")]
        (row,) = [line for line in rows if f"`{name}`" in line]
        assert all(word in row for word in words), row
        assert all(cell.strip() for cell in row.strip().strip("|").split("|")), row


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """Return the output folder of the demo, which runs beside the README's commands."""
    folder = small_checkout(tmp_path_factory.mktemp("demo"))
    output = folder / "demo output"
    arguments = ["--data", str(folder / EXAMPLE), "--output", str(output)]
    short = ["--epochs", "1", "--iterations_per_epoch", "1", "--folds", "0"]
    command = [sys.executable, str(ROOT / EXAMPLE / "demo.py"), *arguments, *short]
    with (folder / "log.txt").open("w") as log:
        run = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, text=True)
    yield output, run
    run.kill()
    run.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("demo")
def test_the_complete_run_works_as_written(tmp_path: Path) -> None:
    folder = small_checkout(tmp_path)
    script = "".join(
        block
        for block in BLOCKS
        if any(word in block for word in ("nnmosaic merge", "nnmosaic run", "--minutes"))
    )
    for long, short in SHORTER.items():
        assert long in script
        script = script.replace(long, short)
    command = ["bash", "-e", "-c", script]
    run = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "nnUNet_raw, nnUNet_preprocessed, nnUNet_results not set" in run.stderr
    assert "posterior" in run.stdout.rpartition("┃ class")[2]
    assert len(list((folder / "predictions").glob("*.nii.gz"))) == 2
    assert (folder / "predictions" / "summary.json").is_file()


@pytest.mark.slow
def test_the_demo_scores_and_draws_every_test_case(
    demo: tuple[Path, subprocess.Popen[str]],
) -> None:
    output, run = demo
    code = run.wait()
    log = (output.parent / "log.txt").read_text()
    assert code == 0, log
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary["dice_per_class"]) == {"anterior", "posterior"}
    assert set(summary["baseline_missing_as_background"]["dice_per_class"]) == {
        "anterior",
        "posterior",
    }
    assert {"merge", "doctor", "plan_and_preprocess", "train", "predict", "evaluate"} < set(
        summary["seconds_per_stage"]
    )
    assert summary["test_cases"] == 2
    assert len(list((output / "overlays").glob("*.png"))) == 2
    models = list(output.glob("workspace/nnUNet_results/*/*/fold_*/checkpoint_final.pth"))
    assert len(models) == 2
    assert "Dice on unseen cases" in log


@pytest.fixture(scope="module")
def observers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the output of the other demo, made of small pieces of its images."""
    folder = tmp_path_factory.mktemp("retina")
    for path in (ROOT / RETINA).rglob("*.png"):
        piece = folder / "data" / path.relative_to(ROOT / RETINA)
        piece.parent.mkdir(parents=True, exist_ok=True)
        io.imsave(piece, io.imread(path)[200:264, 200:264], check_contrast=False)
    arguments = ["--data", str(folder / "data"), "--output", str(folder / "output")]
    command = [sys.executable, str(ROOT / RETINA / "demo.py"), *arguments]
    run = subprocess.run(
        [*command, "--iterations_per_epoch", "1"], env=environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.mark.slow
def test_the_demo_of_two_observers_predicts_both_and_draws_them(observers: Path) -> None:
    output = observers / "output"
    (case,) = (path.stem for path in (output / "predictions").glob("*.png"))
    assert case == "Image_14L"
    for name in ("first", "second"):
        assert (output / "predictions" / "raters" / name / f"{case}.png").is_file()
    assert len(list((output / "predictions" / "samples").iterdir())) == 16
    assert (output / "predictions" / "summary_raters.json").is_file()
    assert io.imread(output / "observers.png").shape == (330, 1200, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "panels"),
    [
        ("data/test/images/Image_14L_0000.png", {0, 1, 2}),
        ("data/test/raters/second/Image_14L.png", {1}),
        ("output/predictions/raters/first/Image_14L.png", {2}),
        ("output/predictions/entropy/Image_14L.tif", {3}),
    ],
)
def test_every_panel_of_the_picture_shows_its_own_file(
    observers: Path, tmp_path: Path, changed: str, panels: set[int]
) -> None:
    copy = shutil.copytree(observers, tmp_path / "copy")
    array = io.imread(copy / changed)
    corner = array[16:48, 16:48]
    corner[...] = np.where(corner > 0, 0, 1 if array.dtype == np.uint8 else 0.5)
    io.imsave(copy / changed, array, check_contrast=False)
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import figure; "
        "figure.draw(Path('data/test'), Path('output/predictions'), Path('observers.png'))"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT / RETINA)], cwd=copy, check=True)
    before, after = (
        io.imread(path).astype(int)
        for path in (observers / "output" / "observers.png", copy / "observers.png")
    )
    # Without the bar of colours; the panels begin every 280 pixels.
    differs = (before != after)[:, : 4 * 280].any((0, 2))
    assert {int(x) // 280 for x in np.flatnonzero(differs)} == panels
