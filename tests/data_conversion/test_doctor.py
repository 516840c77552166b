import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nnmosaic.data_conversion.doctor import examine


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
