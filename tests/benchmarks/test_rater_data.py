"""Which rule of ties the fused references of the benchmark for many raters have."""

from pathlib import Path

import pytest

from benchmarks import rater_data
from benchmarks.multi_rater import CHASE, note_on_ties
from benchmarks.rater_data import prepare, tie_of

NAME = "Dataset641_Chase"


def test_references_are_fused_with_the_default_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []

    def run(*arguments: str) -> None:
        commands.append(arguments)
        (tmp_path / "nnUNet_raw" / NAME).mkdir(parents=True)
        for folder in ("nnUNet_preprocessed", "files"):
            (tmp_path / folder / NAME).mkdir(parents=True)

    monkeypatch.setattr(rater_data, "command", run)
    monkeypatch.setattr(type(CHASE), "write", lambda *_: {})
    monkeypatch.setattr(rater_data, "preprocess_with_one_plan", lambda *_: None)
    monkeypatch.setattr(rater_data, "_make_patch_smaller", lambda _: None)
    monkeypatch.setattr(type(CHASE), "folds", lambda *_: [])
    prepare(tmp_path, tmp_path, {NAME: CHASE})
    (arguments,) = commands
    assert arguments[arguments.index("--tie") + 1] == "background"
    assert tie_of(tmp_path, NAME) == "background"


def test_datasets_of_the_old_rule_are_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "nnUNet_raw" / NAME).mkdir(parents=True)
    with pytest.raises(RuntimeError, match=f"{NAME} has references .* first rater.* Remove"):
        prepare(tmp_path, tmp_path, {NAME: CHASE})


def test_the_page_names_runs_of_the_old_rule() -> None:
    new, old = {"tie": "background", "commit": "b"}, {"commit": "a"}
    assert note_on_ties([new]) == ""
    assert note_on_ties([new, old, old]).endswith(": commit a. ")
