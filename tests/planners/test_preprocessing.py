"""Fingerprint, plans and arrays against nnU-Net's own, on the same raw data."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest
from filelock import FileLock
from nnunetv2.experiment_planning import plan_and_preprocess_api as stock

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import FULL_LABELS_FOLDER
from nnmosaic.pipeline.plan_and_preprocess import plan_and_preprocess
from nnmosaic.pipeline.plan_request import PlanRequest
from nnmosaic.pipeline.workspace import Workspace, open_workspace
from nnmosaic.planners.ledger import Ledger, ledger_path
from nnmosaic.planners.plans_section import RunSettings, read_section
from nnmosaic.planners.preprocessing import FULL_REFERENCES_FOLDER, copy_references

NAME, IDENTIFIER = "Dataset004_Ball", "nnUNetPlans_3d_fullres"


@pytest.fixture
def here(
    workspace: Path, make_dataset: Callable[..., Path], save: Callable[..., None]
) -> Workspace:
    """Five cases; one has no label, and one has a margin of zeros, which is cropped."""
    folder = make_dataset(workspace / "nnUNet_raw" / NAME, cases=5)
    save(folder / "labelsTr" / "case04.nii.gz", np.zeros((20, 24, 22), np.uint8))
    image = np.zeros((20, 24, 22), np.float32)
    image[2:-1, 3:, :-4] = np.random.default_rng(0).random((17, 21, 18))
    save(folder / "imagesTr" / "case03_0000.nii.gz", image)
    return open_workspace()


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: blosc2.open(str(path))[:] for path in sorted(folder.glob("*.b2nd"))}


def assert_equal_arrays(one: Path, other: Path) -> None:
    a, b = arrays(one), arrays(other)
    assert list(a) == list(b)
    assert len(a) == 10
    for name, array in a.items():
        assert array.dtype == b[name].dtype
        assert np.array_equal(array, b[name]), name


@pytest.mark.slow
def test_fingerprint_plans_and_arrays_equal_nnunets(
    here: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_and_preprocess(here, "4", ["3d_fullres"], workers=2)
    ours = tmp_path / "ours"
    shutil.move(here.preprocessed / NAME, ours)
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner cannot stand the 0
    stock.extract_fingerprint_dataset(4, num_processes=1, show_progress_bar=False)
    stock.plan_experiment_dataset(4)
    stock.preprocess_dataset(4, "nnUNetPlans", ["3d_fullres"], [1], show_progress_bar=False)
    theirs = here.preprocessed / NAME

    def read(folder: Path, name: str) -> dict[str, object]:
        return json.loads((folder / name).read_text())

    fingerprint = read(ours, "dataset_fingerprint.json")
    del fingerprint["nnmosaic"]
    assert fingerprint == read(theirs, "dataset_fingerprint.json")
    plans = read(ours, "nnUNetPlans.json")
    assert plans.pop("experiment_planner_used") == "MosaicPlanner"
    assert {**plans, "experiment_planner_used": "ExperimentPlanner"} == read(
        theirs, "nnUNetPlans.json"
    )
    assert_equal_arrays(ours / IDENTIFIER, theirs / IDENTIFIER)
    references = sorted(path.name for path in (theirs / "gt_segmentations").iterdir())
    assert sorted(path.name for path in (ours / "gt_segmentations").iterdir()) == references


@pytest.mark.slow
def test_only_what_changed_is_done_again(here: Workspace, save: Callable[..., None]) -> None:
    plan_and_preprocess(here, "4", ["3d_fullres"], workers=1)
    folder = here.preprocessed / NAME / IDENTIFIER
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "case01.b2nd").unlink()
    (folder / "stray.b2nd").write_text("a killed run left this")
    images = here.raw / NAME / "imagesTr"
    os.utime(images / "case00_0000.nii.gz", (1, 1))  # touched, not changed
    save(images / "case02_0000.nii.gz", np.full((20, 24, 22), 7.5, np.float32))
    full = here.raw / NAME / FULL_LABELS_FOLDER / "case01.nii.gz"
    save(full, np.ones((20, 24, 22), np.uint8))
    plan_and_preprocess(here, "4", ["3d_fullres"], workers=1)
    kept_aside = list((here.preprocessed / NAME / FULL_REFERENCES_FOLDER).iterdir())
    assert [path.name for path in kept_aside] == ["case01.nii.gz"]
    assert kept_aside[0].read_bytes() == full.read_bytes()
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(after) == set(before)
    changed = [name for name in after if after[name] != before[name]]
    again = {name.split(".")[0].removesuffix("_seg") for name in changed}
    assert again == {"case01", "case02"}
    assert Ledger(ledger_path(folder)).missing() == []


@pytest.mark.slow
def test_the_cpu_plan_is_small_and_says_how_to_train(here: Workspace) -> None:
    request = PlanRequest(device="cpu")
    plans = plan_and_preprocess(here, "4", ["3d_fullres"], request, workers=1).plans
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"][0] == 8
    assert configuration["batch_size"] == 2
    assert plans["nnmosaic"]["budget"] == {"device": "cpu"}
    assert plans["nnmosaic"]["run_settings"]["optimizer"] == "adamw"
    request = PlanRequest(memory_gb=3)
    plans = plan_and_preprocess(here, "4", ["3d_fullres"], request, workers=1).plans
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"][0] == 16
    section = read_section(plans)
    assert (section.budget, section.run_settings) == ({"memory_gb": 3}, RunSettings())


@pytest.mark.slow
def test_a_broken_case_stops_before_anything_is_planned(here: Workspace) -> None:
    (here.raw / NAME / "labelsTr" / "case03.nii.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"case03\.nii\.gz is empty"):
        plan_and_preprocess(here, "4", ["3d_fullres"], workers=1)
    written = {path.name for path in (here.preprocessed / NAME).iterdir()}
    assert written <= {"preprocessing.lock"}


@pytest.mark.slow
def test_declarations_are_checked_again_when_they_change(here: Workspace) -> None:
    plan_and_preprocess(here, "4", ["3d_fullres"], workers=1)
    path = here.raw / NAME / "dataset.json"
    content = json.loads(path.read_text())
    sources = {"A": {"pattern": "[01]$", "annotated": ["bright"]}, "B": {"annotated": "all"}}
    content["partial_labels"] = {"sources": {**sources, "B": {**sources["B"], "pattern": "[234]$"}}}
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"case0[01]\.nii\.gz holds the label value 2"):
        plan_and_preprocess(here, "4", ["3d_fullres"], workers=1)


def test_only_changed_references_are_copied(tmp_path: Path) -> None:
    raw, copies = tmp_path / "raw", tmp_path / "copies"
    copy_references({}, copies, ".nii.gz")
    assert not copies.exists()
    raw.mkdir()
    labels = {case: raw / f"label of {case}" for case in ("a", "b")}
    for label in labels.values():
        label.write_text("old")
    copy_references(labels, copies, ".nii.gz")
    (copies / "a.nii.gz").write_text("kept")
    os.utime(copies / "a.nii.gz", ns=(0, labels["a"].stat().st_mtime_ns))
    labels["b"].write_text("new")
    os.utime(labels["b"], (1, 1))
    copy_references(labels, copies, ".nii.gz")
    written = {path.name: path.read_text() for path in copies.iterdir()}
    assert written == {"a.nii.gz": "kept", "b.nii.gz": "new"}


def test_full_references_that_left_the_dataset_are_deleted(tmp_path: Path) -> None:
    labels = {case: tmp_path / case for case in ("a", "b")}
    for label in labels.values():
        label.write_text("label")
    folders = [tmp_path / name for name in (FULL_REFERENCES_FOLDER, "gt_segmentations")]
    for folder in folders:
        copy_references(labels, folder, ".nii.gz")
        copy_references({"b": labels["b"]}, folder, ".nii.gz")
    assert [path.name for path in folders[0].iterdir()] == ["b.nii.gz"]
    assert len(list(folders[1].iterdir())) == 2
    copy_references({}, folders[0], ".nii.gz")
    assert list(folders[0].iterdir()) == []


def test_two_commands_do_not_prepare_one_dataset(here: Workspace) -> None:
    (here.preprocessed / NAME).mkdir()
    with (
        FileLock(here.preprocessed / NAME / "preprocessing.lock"),
        pytest.raises(InputError, match="another process prepares this dataset"),
    ):
        plan_and_preprocess(here, "4", ["3d_fullres"], workers=1)


@pytest.mark.slow
def test_unknown_planner_and_configuration_are_refused(here: Workspace) -> None:
    with pytest.raises(InputError, match="There is no planner 'NoPlanner'"):
        plan_and_preprocess(here, "4", ["3d_fullres"], PlanRequest(planner="NoPlanner"), workers=1)
    with pytest.raises(InputError, match="None of \\['3d_lowres'\\] is in"):
        plan_and_preprocess(here, "4", ["3d_lowres"], workers=1)
