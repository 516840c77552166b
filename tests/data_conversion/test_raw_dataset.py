from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nnmosaic.data_conversion.dataset_json import read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import (
    dataset_name,
    find_dataset,
    find_image_cases,
    training_cases,
)


@pytest.mark.parametrize("name", ["../../etc", "a/b", "a\\b", "..", ".hidden", "", " x", "a\nb"])
def test_a_dataset_name_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(InputError, match="cannot be a dataset name"):
        dataset_name(501, name)


def test_a_dataset_name_may_hold_spaces_and_unicode() -> None:
    assert dataset_name(7, "Größe 大") == "Dataset007_Größe 大"


def test_find_dataset_by_number_and_name(tmp_path: Path) -> None:
    (tmp_path / "Dataset011_A").mkdir()
    assert find_dataset([tmp_path], "11") == find_dataset([tmp_path], "Dataset011_A")
    for wrong, message in [
        ("x1", "neither a dataset id"),
        ("0", "neither a dataset id"),
        ("12", "no dataset 12"),
        ("Dataset1_A", "not a dataset name"),
        ("Dataset011_../..", "not a dataset name"),
    ]:
        with pytest.raises(InputError, match=message):
            find_dataset([tmp_path], wrong)
    (tmp_path / "Dataset011_B").mkdir()
    with pytest.raises(InputError, match="several datasets: Dataset011_A, Dataset011_B"):
        find_dataset([tmp_path], "11")


def test_stray_files_are_ignored_and_misnamed_images_are_not(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    folder = make_dataset(tmp_path / "raw", cases=2)
    for stray in (".DS_Store", "Thumbs.db", "notes.txt", "._case00_0000.nii.gz"):
        (folder / "imagesTr" / stray).write_text("x")
    dataset = read_dataset_json(folder)
    assert [case.identifier for case in training_cases(folder, dataset)] == ["case00", "case01"]
    (folder / "imagesTr" / "scan.nii.gz").write_text("x")
    with pytest.raises(InputError, match=r"scan\.nii\.gz is not named CASE_XXXX"):
        training_cases(folder, dataset)


def test_missing_channel_is_named(tmp_path: Path, save: Callable[..., None]) -> None:
    for name in ("a_0000", "a_0001", "b_0001"):
        save(tmp_path / f"{name}.nii.gz", np.zeros((3, 3, 3), np.float32))
    cases, faults = find_image_cases(tmp_path, file_ending=".nii.gz", num_channels=2)
    assert [case.identifier for case in cases] == ["a"]
    assert "'b' has the channels [1]" in faults["b"]


def test_missing_label_file_is_named(tmp_path: Path, make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(tmp_path / "raw", cases=2)
    (folder / "labelsTr" / "case01.nii.gz").unlink()
    with pytest.raises(InputError, match=r"case01\.nii\.gz does not exist \(1 of 2"):
        training_cases(folder, read_dataset_json(folder))


def test_files_listed_in_dataset_json_are_found(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    folder = make_dataset(tmp_path / "raw", cases=1)
    listed = {"one": {"images": ["imagesTr/case00_0000.nii.gz"], "label": "labelsTr/case00.nii.gz"}}
    folder = make_dataset(tmp_path / "raw", cases=1, dataset=listed)
    (case,) = training_cases(folder, read_dataset_json(folder))
    assert case.identifier == "one"
    assert case.images[0] == folder / "imagesTr" / "case00_0000.nii.gz"
