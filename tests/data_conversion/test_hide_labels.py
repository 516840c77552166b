import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

from nnmosaic.data_conversion.dataset_json import DatasetJson, read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.hide_labels import hide_labels, parse_joins, parse_part
from nnmosaic.data_conversion.raw_dataset import training_cases

SUBJECTS = {"case00": "anna", "case02": "anna", "case01": "ben"}


def array(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def case_names(folder: Path) -> list[str]:
    return [case.identifier for case in training_cases(folder, read_dataset_json(folder))]


@pytest.fixture
def original(tmp_path: Path, make_dataset: Callable[..., Path], save: Callable[..., None]) -> Path:
    """Three classes in 4 cases: bright, dark, and a stripe of voxels in the corner."""
    folder = make_dataset(
        tmp_path / "Dataset011_Full",
        cases=4,
        labels={"bright": 1, "dark": 2, "stripe": 3},
        subjects=SUBJECTS,
        overwrite_image_reader_writer="SimpleITKIO",
    )
    for path in (folder / "labelsTr").iterdir():
        label = array(path)
        label[0, 0] = 3
        save(path, label)
    return folder


def declare(folder: Path, **keys: Any) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, **keys}))


def hidden(
    original: Path, name: str = "Dataset012_New", **options: Any
) -> tuple[Path, DatasetJson]:
    target = original.with_name(name)
    written = hide_labels(original, target, **options)
    assert read_dataset_json(target) == written.dataset
    assert written.cases == written.dataset.content["numTraining"] == len(case_names(target))
    return target, written.dataset


def test_kept_and_joined_classes_are_numbered_as_in_the_original(original: Path) -> None:
    joins = parse_joins(["rest=stripe+bright"])
    target, dataset = hidden(original, keep=["dark"], joins=joins)
    assert dataset.labels == {"background": 0, "rest": 1, "dark": 2}
    full = array(original / "labelsTr" / "case01.nii.gz")
    label = array(target / "labelsTr" / "case01.nii.gz")
    assert np.array_equal(label, np.array([0, 1, 2, 1])[full])
    assert dict(dataset.subjects) == SUBJECTS
    assert dataset.content["overwrite_image_reader_writer"] == "SimpleITKIO"
    assert dataset.channel_names == {"0": "T1"}


def test_hidden_classes_become_background_and_the_full_map_is_kept_aside(original: Path) -> None:
    target, dataset = hidden(original, keep=["stripe"])
    full = original / "labelsTr" / "case03.nii.gz"
    assert np.array_equal(array(target / "labelsTr" / "case03.nii.gz"), array(full) == 3)
    assert (target / "labelsTr_full" / "case03.nii.gz").readlink() == full
    assert dataset.full_labels == {"background": 0, "bright": 1, "dark": 2, "stripe": 3}
    assert (target / "imagesTr" / "case03_0000.nii.gz").is_symlink()


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ({}, ("bright", "dark", "stripe")),
        ({"joins": {"balls": ("bright", "dark")}}, ("balls",)),
        ({"joins": {"balls": ("bright", "dark")}, "keep": ["stripe"]}, ("balls", "stripe")),
    ],
)
def test_what_is_kept_without_being_named(
    original: Path, options: dict[str, Any], classes: tuple[str, ...]
) -> None:
    assert hidden(original, cases=["case00"], **options)[1].foreground == classes


def test_parts_cover_all_cases_once_and_keep_subjects_together(original: Path) -> None:
    parts = [case_names(hidden(original, f"Dataset02{k}_Part", part=(k, 3))[0]) for k in (1, 2, 3)]
    assert parts == [["case00", "case02"], ["case01"], ["case03"]]  # anna, ben, case03


def test_chosen_cases_and_their_subjects(original: Path) -> None:
    target, dataset = hidden(original, cases=["case03", "case00"])
    assert case_names(target) == ["case00", "case03"]
    assert dict(dataset.subjects) == {"case00": "anna"}


def test_copies_need_no_original(original: Path) -> None:
    target, _ = hidden(original, cases=["case00"], copy_files=True)
    assert not [path for path in target.rglob("*") if path.is_symlink()]
    image = "imagesTr/case00_0000.nii.gz"
    assert (target / image).read_bytes() == (original / image).read_bytes()


def test_an_ignore_label_is_kept(original: Path) -> None:
    declare(original, labels={"background": 0, "bright": 1, "dark": 2, "ignore": 3})
    target, dataset = hidden(original, keep=["dark"])
    assert (dataset.labels, dataset.ignore_label) == ({"background": 0, "dark": 1}, 2)
    full = array(original / "labelsTr" / "case00.nii.gz")
    assert np.array_equal(
        array(target / "labelsTr" / "case00.nii.gz"), np.array([0, 0, 1, 2])[full]
    )
    assert "ignore" not in dataset.full_labels


def test_full_references_of_the_original_are_carried_on(original: Path) -> None:
    first, _ = hidden(original, keep=["dark", "bright"])
    target, dataset = hidden(first, "Dataset013_Again", keep=["dark"])
    assert tuple(dataset.full_labels) == ("background", "bright", "dark", "stripe")
    link = target / "labelsTr_full" / "case02.nii.gz"
    assert link.readlink() == original / "labelsTr" / "case02.nii.gz"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": ["liver"]}, "has no class 'liver'. It has bright, dark, stripe"),
        ({"keep": ["background"]}, "has no class 'background'"),
        ({"joins": {"balls": ("bright", "moon")}}, "has no class 'moon'"),
        ({"keep": ["dark"], "joins": {"balls": ("bright", "dark")}}, "class 'dark' twice"),
        ({"joins": {"balls": ("dark", "dark")}}, "class 'dark' twice"),
        ({"joins": {"dark": ("bright", "stripe")}}, "has a label 'dark' already"),
        ({"joins": {"ignore": ("bright", "stripe")}}, "has a label 'ignore' already"),
        ({"part": (4, 4)}, "has only 3 subjects"),
        ({"cases": ["case00", "case77"]}, "has no case 'case77'"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_written(
    original: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        hide_labels(original, original.with_name("Dataset012_New"), **options)
    assert [path.name for path in original.parent.iterdir()] == [original.name]


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"partial_labels": {"sources": {}, "unmatched": "complete"}}, "partial_labels"),
        ({"labels": {"background": 0, "all": [1, 2, 3]}}, "overlapping regions"),
        ({"multirater": {"raters": ["A", "B"]}}, "multirater"),
    ],
)
def test_label_maps_that_mean_different_things_are_refused(
    original: Path, keys: dict[str, Any], what: str
) -> None:
    declare(original, **keys)
    with pytest.raises(InputError, match=rf"dataset\.json: .*{what}.* cannot be converted"):
        hide_labels(original, original.with_name("Dataset012_New"))


def test_a_broken_file_and_an_existing_target_leave_nothing_behind(original: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        hide_labels(original, original)
    (original / "labelsTr" / "case02.nii.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"case02\.nii\.gz is empty"):
        hide_labels(original, original.with_name("Dataset012_New"))
    assert [path.name for path in original.parent.iterdir()] == [original.name]


@pytest.mark.parametrize("text", ["a", "a=", "a=b", "=b+c", "a=b+", "a=+b"])
def test_malformed_joins_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not of the form NEWNAME=A"):
        parse_joins([text])


def test_joins_are_parsed_and_named_once() -> None:
    assert parse_joins(["k=l + r", "x=a+b+c"]) == {"k": ("l", "r"), "x": ("a", "b", "c")}
    with pytest.raises(InputError, match="names 'k' twice"):
        parse_joins(["k=a+b", "k=c+d"])


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/", "-1/3"])
def test_malformed_parts_are_refused(text: str) -> None:
    assert parse_part("2/3") == (2, 3)
    with pytest.raises(InputError, match="is not K/N"):
        parse_part(text)
