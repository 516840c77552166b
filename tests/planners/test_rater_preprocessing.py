"""Preprocessed label maps of several raters (spec 7.2)."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnmosaic.pipeline.cli import main
from nnmosaic.planners.plans_section import RaterPlan, rater_plan
from nnmosaic.trainers.multi_rater.dataset import RaterDataset

FOLDER = Path("nnUNet_preprocessed") / "Dataset008_Raters"
PLAN = ["plan_and_preprocess", "-d", "8", "-c", "3d_fullres", "--device", "cpu"]


@pytest.fixture
def data(prepared: Path) -> Path:
    return prepared / FOLDER / "nnUNetPlans_3d_fullres"


def test_nnunets_files_are_those_of_the_fused_reference(prepared: Path, data: Path) -> None:
    stock = nnUNetDatasetBlosc2(str(data))
    fused = {
        name: (stock.load_case(name)[0][:], stock.load_case(name)[1][:], stock.load_case(name)[3])
        for name in stock.identifiers
    }
    # The same dataset without its raters.
    file = prepared / "nnUNet_raw" / "Dataset008_Raters" / "dataset.json"
    content = json.loads(file.read_text())
    del content["multirater"]
    file.write_text(json.dumps(content))
    assert main(PLAN) == 0
    plain = nnUNetDatasetBlosc2(str(data))
    assert sorted(plain.identifiers) == sorted(fused)
    for name, (image, labels, properties) in fused.items():
        other_image, other_labels, _, other_properties = plain.load_case(name)
        assert np.array_equal(image, other_image[:])
        assert np.array_equal(labels, other_labels[:])
        for value, voxels in properties["class_locations"].items():
            assert np.array_equal(voxels, other_properties["class_locations"][value])


def test_raters_lie_on_the_grid_of_the_reference(data: Path) -> None:
    dataset = RaterDataset(str(data))
    assert len(dataset.identifiers) == 5
    for name in dataset.identifiers:
        image, labels, _, properties = dataset.load_case(name)
        labels = labels[:]
        assert labels.shape == (4, *image.shape[1:])
        assert labels.dtype == np.int16
        stock = nnUNetDatasetBlosc2(str(data)).load_case(name)[1][:]
        assert np.array_equal(labels[:1], stock)
        small, exact, large = labels[1:]
        if name == "case01":
            assert (large == -2).all()
            assert dataset.available(name).tolist() == [True, True, False]
        else:
            assert dataset.available(name).all()
            assert ((small > 0) <= (exact > 0)).all()
            assert ((exact > 0) <= (large > 0)).all()
            assert (small > 0).sum() < (exact > 0).sum() < (large > 0).sum()
        for value, voxels in properties["class_locations"].items():
            union = (labels[1:] == value).any(0)
            assert len(voxels) == union.sum()  # each voxel once, of however many raters
            assert union[tuple(voxels[:, 1:].T)].all()


def test_plans_name_the_raters(plans_of: Callable[..., dict], data: Path) -> None:
    assert rater_plan(plans_of("Dataset008_Raters")) == RaterPlan(("small", "exact", "large"))
    assert "multirater" not in plans_of("Dataset007_Merged")["nnmosaic"]


def test_references_of_raters_are_kept_for_validation(prepared: Path, data: Path) -> None:
    folder = prepared / FOLDER / "gt_segmentations_raters"
    assert len(list((folder / "small").iterdir())) == 5
    assert len(list((folder / "large").iterdir())) == 4


def test_a_rater_that_changed_is_preprocessed_again(prepared: Path, data: Path) -> None:
    raw = prepared / "nnUNet_raw" / "Dataset008_Raters" / "labelsTr_raters"
    before = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    (raw / "small" / "case03.nii.gz").unlink()
    assert main(PLAN) == 0
    changed = {p.name for p in data.iterdir() if p.stat().st_mtime_ns != before[p.name]}
    assert changed == {"case03.b2nd", "case03_seg.b2nd", "case03.pkl"}
    assert RaterDataset(str(data)).available("case03").tolist() == [False, True, True]
    references = prepared / FOLDER / "gt_segmentations_raters" / "small"
    assert not (references / "case03.nii.gz").exists()
    # A lost file of the raters is made again, too.
    (data.with_name(f"{data.name}_raters") / "case02.npz").unlink()
    assert main(PLAN) == 0
    assert RaterDataset(str(data)).available("case02").all()


def test_a_case_that_nobody_annotated_is_named(
    prepared: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = prepared / "nnUNet_raw" / "Dataset008_Raters" / "labelsTr_raters"
    for rater in raw.iterdir():
        (rater / "case02.nii.gz").unlink()
    assert main(PLAN) == 2
    message = capsys.readouterr().err
    assert "case02" in message
    assert "labelsTr_raters" in message
