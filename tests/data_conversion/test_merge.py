import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnmosaic.data_conversion.dataset_json import read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.merge import (
    MATRIX_FILE,
    matrix_warnings,
    merge_sources,
    parse_renames,
    read_sources,
)

MakeDataset = Callable[..., Path]


def array(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


@pytest.fixture
def sources(tmp_path: Path, make_dataset: MakeDataset) -> dict[str, Path]:
    return {
        "11": make_dataset(tmp_path / "Dataset011_Bright", cases=2, labels={"bright": 1}),
        "12": make_dataset(
            tmp_path / "Dataset012_Dark",
            cases=3,
            labels={"dark": 2},
            first_seed=10,
            subjects={"case00": "anna", "case01": "anna", "case02": "ben"},
        ),
    }


def test_classes_cases_subjects_and_sources_of_the_merge(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "Dataset501_Both"
    matrix = merge_sources(read_sources(sources, {}), target, copy_images=False)
    dataset = read_dataset_json(target)
    assert dataset.labels == {"background": 0, "bright": 1, "dark": 2}
    assert dataset.content["numTraining"] == 5
    assert dataset.source_of("Dark_case01").annotated == ("dark",)
    assert dataset.legal_values("Dark_case01") == {0, 2}
    assert dataset.subject_of("Dark_case01") == "anna"
    label = array(target / "labelsTr" / "Dark_case01.nii.gz")
    own = array(sources["12"] / "labelsTr" / "case01.nii.gz")
    assert np.array_equal(label, 2 * own)
    cell = matrix["dark"]["Dark"]
    assert (cell["cases"], cell["present"]) == (3, 3)
    labels = sorted((target / "labelsTr").glob("Dark_*"))
    assert cell["voxels"] == sum(int((array(path) == 2).sum()) for path in labels)
    assert matrix["dark"]["Bright"]["annotated"] == "no"
    assert json.loads((target / MATRIX_FILE).read_text()) == matrix


def test_images_are_linked_or_copied_and_never_altered(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    original = (sources["11"] / "imagesTr" / "case00_0000.nii.gz").read_bytes()
    for copy in (False, True):
        target = tmp_path / f"Dataset50{int(copy)}_Both"
        merge_sources(read_sources(sources, {}), target, copy_images=copy)
        image = target / "imagesTr" / "Bright_case00_0000.nii.gz"
        assert image.is_symlink() is not copy
        assert image.read_bytes() == original


def test_merged_label_and_rename(tmp_path: Path, make_dataset: MakeDataset) -> None:
    folders = {
        "11": make_dataset(tmp_path / "Dataset011_Fine", cases=1, labels={"left": 1, "right": 2}),
        "12": make_dataset(tmp_path / "Dataset012_Coarse", cases=1, labels={"both": 1}),
        "13": make_dataset(tmp_path / "Dataset013_Other", cases=1, labels={"links": 1}),
    }
    renames = parse_renames(["12:both=left+right", "13:links=left"])
    target = tmp_path / "Dataset501_All"
    matrix = merge_sources(read_sources(folders, renames), target, copy_images=False)
    dataset = read_dataset_json(target)
    assert dataset.labels == {"background": 0, "left": 1, "right": 2}
    assert dataset.source_of("Coarse_case00").representatives(dataset.labels) == (0, 1, 1)
    assert dataset.source_of("Other_case00").representatives(dataset.labels) == (0, 1, 0)
    assert matrix["right"]["Coarse"]["annotated"] == "merged"


def test_sources_of_one_name_keep_their_number(tmp_path: Path, make_dataset: MakeDataset) -> None:
    folders = {
        n: make_dataset(tmp_path / f"Dataset0{n}_Same", cases=1, labels={name: 1})
        for n, name in (("11", "a"), ("12", "b"))
    }
    names = [source.name for source in read_sources(folders, {})]
    assert names == ["Dataset011_Same", "Dataset012_Same"]


def test_a_class_that_is_never_present_and_missing_background_are_warned_about(
    tmp_path: Path, make_dataset: MakeDataset, save: Callable[..., None]
) -> None:
    folders = {
        "11": make_dataset(tmp_path / "Dataset011_A", cases=1, labels={"bright": 1}),
        "12": make_dataset(tmp_path / "Dataset012_B", cases=1, labels={"dark": 2}),
    }
    save(folders["12"] / "labelsTr" / "case00.nii.gz", np.zeros((20, 24, 22), np.uint8))
    target = tmp_path / "Dataset501_M"
    matrix = merge_sources(read_sources(folders, {}), target, copy_images=False)
    warnings = matrix_warnings(matrix)
    assert "'dark' occurs in no case" in warnings[0]
    assert "pure background is never labelled" in warnings[1]
    complete = {"only": {"S": {"annotated": "yes", "cases": 1, "present": 1, "voxels": 5}}}
    assert matrix_warnings(complete) == []


def test_classes_that_are_only_ever_merged_are_refused_and_nothing_is_left(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    renames = parse_renames(["12:dark=left+right"])
    with pytest.raises(InputError, match="no source tells 'right' from 'left'"):
        merge_sources(read_sources(sources, renames), tmp_path / "out" / "D", copy_images=False)
    assert not (tmp_path / "out").exists()


def test_a_broken_source_leaves_nothing_behind(sources: dict[str, Path], tmp_path: Path) -> None:
    (sources["12"] / "labelsTr" / "case02.nii.gz").write_bytes(b"")
    target = tmp_path / "out" / "Dataset501_Both"
    with pytest.raises(InputError, match=r"case02\.nii\.gz is empty"):
        merge_sources(read_sources(sources, {}), target, copy_images=False)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("text", ["12", "12:dark", "dark=left", "12:dark=", "12:=a", "12:a=b++c"])
def test_malformed_renames_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not of the form"):
        parse_renames([text])


def test_renames_of_unknown_sources_and_labels_are_refused(sources: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="names the source '99'"):
        read_sources(sources, parse_renames(["99:dark=left"]))
    with pytest.raises(InputError, match="has no label 'heart'"):
        read_sources(sources, parse_renames(["12:heart=left"]))


def test_disagreement_on_channels_is_refused(tmp_path: Path, make_dataset: MakeDataset) -> None:
    folders = {
        "11": make_dataset(tmp_path / "Dataset011_A", cases=1),
        "12": make_dataset(tmp_path / "Dataset012_B", cases=1, channel_names={"0": "T2"}),
    }
    with pytest.raises(InputError, match="differ in channel_names"):
        read_sources(folders, {})


def test_an_ignore_label_of_a_source_becomes_that_of_the_merge(
    tmp_path: Path, make_dataset: MakeDataset, save: Callable[..., None]
) -> None:
    with_ignore = {"background": 0, "dark": 1, "ignore": 2}
    folders = {
        "11": make_dataset(tmp_path / "Dataset011_A", cases=1),
        "12": make_dataset(tmp_path / "Dataset012_B", cases=1, labels={"dark": 2}),
    }
    content = json.loads((folders["12"] / "dataset.json").read_text())
    (folders["12"] / "dataset.json").write_text(json.dumps({**content, "labels": with_ignore}))
    label = np.zeros((20, 24, 22), np.uint8)
    label[0], label[1] = 1, 2
    save(folders["12"] / "labelsTr" / "case00.nii.gz", label)
    target = tmp_path / "Dataset501_M"
    merge_sources(read_sources(folders, {}), target, copy_images=False)
    dataset = read_dataset_json(target)
    assert dataset.ignore_label == 3
    merged = array(target / "labelsTr" / "B_case00.nii.gz")
    assert (np.unique(merged[0]).tolist(), np.unique(merged[1]).tolist()) == ([2], [3])
