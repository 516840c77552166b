import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnmosaic.data_conversion.doctor import examine
from nnmosaic.data_conversion.hide_labels import hide_labels
from nnmosaic.data_conversion.merge import merge_sources, parse_renames, read_sources
from nnmosaic.data_conversion.sparsify import Planes, sparsify


def test_a_sound_dataset_has_no_findings(tmp_path: Path, make_dataset: Callable[..., Path]) -> None:
    assert examine(make_dataset(tmp_path / "raw", cases=2)) == []


def test_every_kind_of_finding_is_reported_with_its_file(
    tmp_path: Path, make_dataset: Callable[..., Path], save: Callable[..., None]
) -> None:
    folder = make_dataset(tmp_path / "raw", cases=5, numTraining=9)
    images, labels = folder / "imagesTr", folder / "labelsTr"
    shutil.copy(images / "case00_0000.nii.gz", images / "case01_0000.nii.gz")
    save(labels / "case02.nii.gz", np.zeros((20, 24, 22), np.uint8))
    save(labels / "case03.nii.gz", np.full((20, 24, 22), 7, np.uint8))
    save(images / "case04_0000.nii.gz", np.zeros((20, 24, 22), np.float32))
    (images / "notes.txt").write_text("x")
    save(labels / "extra.nii.gz", np.zeros((20, 24, 22), np.uint8))
    text = {f.text: f.is_error for f in examine(folder)}

    def one(part: str) -> bool:
        (is_error,) = [error for message, error in text.items() if part in message]
        return is_error

    assert one("hold the same voxels")
    assert not one("case02.nii.gz is empty")
    assert one("label value 7")
    assert not one("one constant value")
    assert not one("notes.txt is not a .nii.gz file")
    assert not one("extra.nii.gz belongs to no case")
    assert not one("numTraining is 9, found 5")


def test_duplicates_of_one_subject_are_allowed(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    folder = make_dataset(tmp_path / "raw", cases=2, subjects={"case00": "a", "case01": "a"})
    images = folder / "imagesTr"
    shutil.copy(images / "case00_0000.nii.gz", images / "case01_0000.nii.gz")
    assert examine(folder) == []


def test_subjects_on_both_sides_of_a_fold_are_an_error(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    folder = make_dataset(tmp_path / "raw", cases=2, subjects={"case00": "a", "case01": "a"})
    splits = tmp_path / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["case00"], "val": ["case01"]}]))
    (finding,) = examine(folder, splits_file=splits)
    assert finding.is_error
    assert "subject 'a'" in finding.text


def test_an_unusable_dataset_is_one_finding(tmp_path: Path) -> None:
    (finding,) = examine(tmp_path)
    assert finding.is_error
    assert "dataset.json does not exist" in finding.text


@pytest.fixture
def with_full(tmp_path: Path, make_dataset: Callable[..., Path]) -> Path:
    """Two cases with sparse labels and complete ones in labelsTr_full."""
    original = make_dataset(tmp_path / "Dataset011_Full", cases=2)
    sparsify(original, tmp_path / "Dataset012_Sparse", Planes(5), copy_files=True)
    return tmp_path / "Dataset012_Sparse"


def test_broken_full_references_are_found(with_full: Path, save: Callable[..., None]) -> None:
    assert examine(with_full) == []
    full = with_full / "labelsTr_full"
    save(full / "case00.nii.gz", np.zeros((20, 24, 21), np.uint8))
    save(full / "case01.nii.gz", np.full((20, 24, 22), 4, np.uint8))
    save(full / "case09.nii.gz", np.zeros((20, 24, 22), np.uint8))
    findings = {finding.text: finding.is_error for finding in examine(with_full)}
    stray, shape, value = sorted(findings, key=findings.__getitem__)
    assert "labelsTr_full/case09.nii.gz belongs to no case" in stray
    assert "labelsTr_full/case00.nii.gz has the shape 20 x 24 x 21" in shape
    assert "labelsTr_full/case01.nii.gz holds the label value 4" in value
    assert (findings[stray], findings[shape], findings[value]) == (False, True, True)


def test_a_full_reference_that_contradicts_the_label_is_found_where_both_are_annotated(
    with_full: Path, save: Callable[..., None]
) -> None:
    path = with_full / "labelsTr_full" / "case00.nii.gz"
    full = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    full[:3, 4], full[0, 5, :7], full[1, 5] = 1, 1, 3  # ignored, annotated, not even in here
    save(path, full)
    (finding,) = examine(with_full)
    assert not finding.is_error
    assert f"{path} contradicts" in finding.text
    assert "in 7 voxels of 'bright'" in finding.text


def test_a_class_that_a_full_reference_cannot_show_is_no_contradiction(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    """The full references of one source say bright, of which nobody knows left or right."""
    full = make_dataset(tmp_path / "Dataset010_Full", cases=2)
    coarse, fine = tmp_path / "Dataset011_Coarse", tmp_path / "Dataset012_Fine"
    hide_labels(full, coarse, keep=["bright"], part=(1, 2))
    hide_labels(full, fine, part=(2, 2))
    renames = parse_renames(["11:bright=left+right", "12:bright=left", "12:dark=right"])
    sources = read_sources({"11": coarse, "12": fine}, renames)
    merge_sources(sources, tmp_path / "Dataset501_M", copy_images=False)
    assert examine(tmp_path / "Dataset501_M") == []
