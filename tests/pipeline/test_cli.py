"""The command line: quick help, exit codes, and one clear message for every kind of bad input."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnmosaic.pipeline import cli_models
from nnmosaic.pipeline.cli import main

COMMANDS = (
    "merge", "hide_labels", "sparsify", "doctor", "plan", "plan_and_preprocess", "train", "predict",
    "ensemble", "evaluate", "evaluate_raters", "find_best", "run", "serve", "trainer_path",
)  # fmt: skip
Make = Callable[..., Path]


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != "nnUNet_raw"}


@pytest.fixture
def raw(workspace: Path, make_dataset: Make) -> Path:
    """Two sources, 5 (bright) and 6 (dark)."""
    folder = workspace / "nnUNet_raw"
    make_dataset(folder / "Dataset005_Bright", cases=5, labels={"bright": 1})
    make_dataset(folder / "Dataset006_Dark", cases=5, labels={"dark": 2}, first_seed=9)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must end with code 2 and one line, and return the line."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse
        code = int(error.code or 0)
    message = capsys.readouterr().err.strip()
    assert code == 2, message
    assert "Traceback" not in message
    return message.splitlines()[-1]


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from nnmosaic.pipeline.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'nnunetv2', 'numpy', 'SimpleITK'} & set(sys.modules)\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for command in COMMANDS:
        assert f"\n    {command}" in run.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    needs_no_folders = command in (
        "ensemble", "evaluate", "evaluate_raters", "serve", "trainer_path",
    )  # fmt: skip
    assert ("--workspace" in capsys.readouterr().out) is not needs_no_folders


def test_version_and_trainer_path(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"nnmosaic {version('nnmosaic')}"
    assert main(["trainer_path"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "nnmosaic_trainers.py").is_file()


def test_unexpected_errors_are_one_line_or_a_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli_models, "_do_trainer_path", broken)
    assert main(["trainer_path"]) == 1
    line = (
        "nnmosaic trainer_path: ZeroDivisionError: a bug (run again with --debug for the traceback)"
    )
    assert capsys.readouterr().err.strip() == line
    assert main(["trainer_path", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "-d", "five", "-n", "X", "--sources", "5", "6"], "number from 1 to 999"),
        (["merge", "-d", "1000", "-n", "X", "--sources", "5", "6"], "number from 1 to 999"),
        (["merge", "-d", "7", "-n", "../X", "--sources", "5", "6"], "cannot be a dataset name"),
        (["merge", "-d", "7", "-n", "/X", "--sources", "5", "6"], "cannot be a dataset name"),
        (["merge", "-d", "5", "-n", "X", "--sources", "5", "6"], "id 5 is taken by Dataset005_Br"),
        (["merge", "-d", "7", "-n", "X", "--sources", "5", "5"], "lists a dataset twice"),
        (["merge", "-d", "7", "-n", "X", "--sources", "5", "8"], "There is no dataset 8"),
        (["doctor", "-d", "Dataset005_../../etc"], "is not a dataset name"),
        (["doctor", "-d", "five"], "neither a dataset id"),
        (["plan_and_preprocess", "-d", "5", "-np", "0"], "whole number above 0"),
        (["plan_and_preprocess", "-d", "5", "--memory_gb", "-1"], "number above 0"),
        (["plan_and_preprocess", "-d", "5", "--device", "cpu", "-pl", "X"], "leave -pl and"),
        (["run", "-d", "5", "-c", "3d_cascade_fullres", "-i", "a", "-o", "b"], "do a cascade"),
        (["train", "5", "3d_fullres", "0"], "nnUNetPlans.json does not exist. Run: nnmosaic plan"),
        (["train", "5", "3d_fullres", "zero"], "a fold is a number or 'all'"),
        (["train", "5", "3d_fullres", "0", "--c", "--val"], "cannot be combined with --val"),
        (["predict", "-i", ".", "-o", "o"], "needs -d and -c, or the model folder"),
        (["predict", "-i", ".", "-o", "o", "-m", "nowhere"], "nowhere is no trained model"),
        (["ensemble", "-i", "nowhere", "-o", "o"], "dataset.json does not exist"),
        (["evaluate", "a", "b", "-djfile", "c.json"], "c.json does not exist"),
        (["evaluate_raters", "a", "b", "-djfile", "c.json"], "c.json does not exist"),
    ],
)
def test_bad_arguments_change_nothing(
    raw: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = files_in(raw.parent)
    assert message in refused(capsys, *arguments)
    assert files_in(raw.parent) == before


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def with_value(value: float) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        image = SimpleITK.ReadImage(str(path))
        array = SimpleITK.GetArrayFromImage(image)
        array[3, 3, 3] = value
        spoilt = SimpleITK.GetImageFromArray(array)
        spoilt.CopyInformation(image)
        SimpleITK.WriteImage(spoilt, str(path))

    return spoil


def with_geometry(name: str, value: tuple[float, ...]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        image = SimpleITK.ReadImage(str(path))
        getattr(image, f"Set{name}")(value)
        SimpleITK.WriteImage(image, str(path))

    return spoil


def cropped(path: Path) -> None:
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(path))[1:], str(path))


def four_dimensional(path: Path) -> None:
    image = SimpleITK.ReadImage(str(path))
    SimpleITK.WriteImage(SimpleITK.JoinSeries([image, image]), str(path))


def removed(path: Path) -> None:
    path.unlink()


IMAGE, LABEL = "imagesTr/case02_0000.nii.gz", "labelsTr/case02.nii.gz"
SPOILT_CASES = [
    (IMAGE, truncated, "cannot be read as an image"),
    (IMAGE, empty, "is empty (0 bytes)"),
    (LABEL, truncated, "cannot be read as an image"),
    (LABEL, empty, "is empty (0 bytes)"),
    (IMAGE, with_value(np.nan), "1 voxels are NaN or infinite"),
    (IMAGE, with_value(np.inf), "1 voxels are NaN or infinite"),
    (LABEL, with_value(7), "holds the label value 7"),
    (LABEL, with_geometry("Spacing", (1.0, 1.0, 3.0)), "has another spacing"),
    (LABEL, with_geometry("Origin", (0.0, 0.0, 0.0)), "has another origin"),
    (LABEL, with_geometry("Direction", (-1, 0, 0, 0, -1, 0, 0, 0, 1)), "has another direction"),
    (LABEL, cropped, "Resample the label map to the grid of the image"),
    (IMAGE, four_dimensional, "a 4D or colour file"),
    (LABEL, removed, "case02"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), SPOILT_CASES)
def test_a_broken_case_stops_merge_and_doctor_with_its_file_name(
    raw: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    spoil(raw / "Dataset006_Dark" / name)
    before = files_in(raw.parent)
    line = refused(capsys, "merge", "-d", "7", "-n", "Merged", "--sources", "5", "6")
    assert message in line
    assert "case02" in line
    assert files_in(raw.parent) == before
    assert main(["doctor", "-d", "6"]) == 2
    found = capsys.readouterr().out
    assert message in found
    assert "1 errors" in found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spoil", "message"), SPOILT_CASES[::3])
def test_a_broken_case_stops_planning_before_anything_is_written(
    raw: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    spoil(raw / "Dataset006_Dark" / name)
    line = refused(capsys, "plan_and_preprocess", "-d", "6", "-c", "3d_fullres", "-np", "1")
    assert message in line
    written = {p.name for p in files_in(raw.parent / "nnUNet_preprocessed") if p.is_file()}
    assert written <= {"preprocessing.lock"}


def test_a_missing_channel_is_named(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = raw / "Dataset006_Dark" / "dataset.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "channel_names": {"0": "T1", "1": "T2"}}))
    line = refused(capsys, "plan_and_preprocess", "-d", "6")
    assert "case 'case00' has the channels [0], but dataset.json declares 2" in line


def test_a_source_without_labels_is_refused(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(raw / "Dataset006_Dark" / "labelsTr")
    line = refused(capsys, "merge", "-d", "7", "-n", "Merged", "--sources", "5", "6")
    assert "labelsTr" in line
    assert not (raw / "Dataset007_Merged").exists()


def test_two_datasets_of_one_id_are_refused(
    raw: Path, make_dataset: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(raw / "Dataset005_Other", cases=1)
    assert "belongs to several datasets" in refused(capsys, "doctor", "-d", "5")


def test_stray_files_do_no_harm(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("imagesTr/.DS_Store", "imagesTr/Thumbs.db", "labelsTr/notes.txt"):
        (raw / "Dataset005_Bright" / name).write_text("stray")
    assert main(["doctor", "-d", "5"]) == 0
    assert "notes.txt is not a .nii.gz file and is ignored" in capsys.readouterr().out
    assert main(["merge", "-d", "7", "-n", "Merged", "--sources", "5", "6"]) == 0
    assert len(list((raw / "Dataset007_Merged" / "imagesTr").iterdir())) == 10


@pytest.mark.parametrize("folder", ["/sys/nnmosaic", "/proc/1/nnmosaic"])
def test_a_read_only_workspace_is_refused(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "doctor", "-d", "5", "--workspace", folder)
    assert f"{folder}/nnUNet_raw cannot be created" in line
    assert "--workspace FOLDER" in line
