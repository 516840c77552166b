"""Where things live: nnU-Net's variables, a flag, or a folder here."""

import os
from pathlib import Path

import pytest

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline import workspace
from nnmosaic.pipeline.workspace import VARIABLES, open_workspace


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the workspace of the test session, and put the variables back afterwards."""
    monkeypatch.setattr(workspace, "_opened", {})
    for name in VARIABLES:
        monkeypatch.setenv(name, os.environ[name])


def test_the_variables_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, str(tmp_path / name.upper()))
    opened = open_workspace()
    assert opened.raw == tmp_path / "NNUNET_RAW"
    assert opened.results.is_dir()


def test_the_flag_goes_before_the_variables(tmp_path: Path) -> None:
    opened = open_workspace(tmp_path / "with space ü")
    assert opened.preprocessed == tmp_path / "with space ü" / "nnUNet_preprocessed"
    assert os.environ["nnUNet_preprocessed"] == str(opened.preprocessed)


def test_without_variables_a_folder_here_is_used_and_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("nnUNet_results")
    with caplog.at_level("INFO"):
        opened = open_workspace()
    assert opened.results == tmp_path / "nnmosaic_data" / "nnUNet_results"
    assert str(opened.raw) == os.environ["nnUNet_raw"]
    assert caplog.messages == [
        f"nnUNet_results not set: everything is kept in {tmp_path / 'nnmosaic_data'}"
    ]


def test_a_second_workspace_in_one_process_is_refused(tmp_path: Path) -> None:
    open_workspace(tmp_path / "one")
    open_workspace(tmp_path / "one")
    with pytest.raises(RuntimeError, match="start another one for"):
        open_workspace(tmp_path / "two")


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_workspace(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="nnUNet_raw is read-only"):
        open_workspace(tmp_path)
