"""The commands hide_labels and sparsify, and what follows from them: merge."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nnmosaic.data_conversion.dataset_json import read_dataset_json
from nnmosaic.pipeline.cli import main

HIDE = ("hide_labels", "-d", "5", "--output_id", "6", "-n", "New")
SPARSIFY = ("sparsify", "-d", "5", "--output_id", "6", "-n", "New")


@pytest.fixture
def raw(workspace: Path, make_dataset: Callable[..., Path]) -> Path:
    make_dataset(workspace / "nnUNet_raw" / "Dataset005_Full", cases=4)
    return workspace / "nnUNet_raw"


def test_hidden_and_sparse_sources_are_merged(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*HIDE, "--keep", "dark", "--part", "1/2"]) == 0
    expected = f"{raw / 'Dataset006_New'}: 2 cases with dark; 100.0 % of the voxels annotated"
    assert capsys.readouterr().out.strip() == expected
    sparse = ["sparsify", "-d", "5", "--output_id", "7", "-n", "Sparse"]
    assert main([*sparse, "--planes", "5", "--axes", "0", "2"]) == 0
    out = capsys.readouterr().out.strip()
    # 3 of 20 planes and 4 of 22 planes, less what they share
    percent = 100 * (1 - 17 / 20 * 18 / 22)
    assert out.endswith(f"4 cases with bright, dark; {percent:.1f} % of the voxels annotated")
    assert main(["merge", "-d", "8", "-n", "Both", "--sources", "6", "7"]) == 0
    merged = read_dataset_json(raw / "Dataset008_Both")
    assert merged.source_of("New_case00").annotated == ("dark",)
    assert len(list((raw / "Dataset008_Both" / "labelsTr_full").iterdir())) == 6
    assert main(["doctor", "-d", "8"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        (*HIDE, "--join", "ball=bright+dark", "--cases", "case00", "--copy"),
        (*SPARSIFY, "--scribbles", "--copy"),
        (*SPARSIFY, "--cubes", "2", "--size", "4", "--seed", "3", "--copy"),
    ],
)
def test_copies_hold_no_link(raw: Path, arguments: tuple[str, ...]) -> None:
    assert main(arguments) == 0
    files = list((raw / "Dataset006_New").rglob("*.nii.gz"))
    assert len(files) % 3 == 0
    assert not any(path.is_symlink() for path in files)
    labels = json.loads((raw / "Dataset006_New" / "dataset.json").read_text())["labels"]
    assert ("ball" in labels) is ("ball=bright+dark" in arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*HIDE[:4], "5", "-n", "X"), "The id 5 is taken by Dataset005_Full"),
        ((*SPARSIFY[:4], "5", "-n", "X", "--scribbles"), "The id 5 is taken by Dataset005_Full"),
        (("hide_labels", "-d", "9", *HIDE[3:]), "There is no dataset 9"),
        ((*HIDE, "--part", "3/2"), "--part '3/2' is not K/N"),
        ((*HIDE, "--join", "a"), "--join 'a' is not of the form"),
        ((*HIDE, "--part", "1/2", "--cases", "case00"), "not allowed with argument"),
        (SPARSIFY, "one of the arguments --planes --scribbles --cubes is required"),
        ((*SPARSIFY, "--planes", "2", "--scribbles"), "not allowed with argument"),
        ((*SPARSIFY, "--planes", "2", "--axes", "3"), "invalid choice: 3"),
        ((*SPARSIFY, "--cubes", "2"), "--cubes needs the side of a cube"),
        ((*SPARSIFY, "--cubes", "2", "--size", "4", "--seed", "-1"), "number from 0"),
        ((*SPARSIFY, "--scribbles", "--axes", "0"), "--axes says something about --planes only"),
        ((*SPARSIFY, "--scribbles", "--seed", "0"), "--seed says something about --cubes only"),
        ((*SPARSIFY, "--planes", "2", "--size", "4"), "--size says something about --cubes only"),
    ],
)
def test_bad_arguments_end_with_code_2_and_one_message(
    raw: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse
        code = int(error.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in raw.iterdir()] == ["Dataset005_Full"]


def test_raters_are_added_by_the_command(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = next(raw.glob("Dataset005_*"))
    folders = [f"{name}={original / 'labelsTr'}" for name in ("A", "B")]
    command = [
        "add_raters", "-d", "9", "-n", "Raters", "--images", str(original / "imagesTr"),
        "--raters", *folders, "--labels", "bright", "dark",
    ]  # fmt: skip
    assert main([*command, "--fusion", "staple", "--tie", "foreground"]) == 2
    assert "--tie says something about --fusion majority only" in capsys.readouterr().err
    assert main(command) == 0
    cases = len(list((original / "labelsTr").iterdir()))
    assert f"cases of each rater: A {cases}, B {cases}" in capsys.readouterr().out
    assert main(["doctor", "-d", "9"]) == 0
    command[command.index("9")] = "10"
    assert main([*command, "--order", "area"]) == 0
    assert f"cases of each rater: rank1 {cases}, rank2 {cases}" in capsys.readouterr().out
