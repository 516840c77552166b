import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnmosaic.data_conversion.dataset_json import read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.hide_labels import hide_labels
from nnmosaic.data_conversion.merge import (
    MATRIX_FILE,
    matrix_warnings,
    merge_sources,
    parse_renames,
    read_sources,
)
from nnmosaic.data_conversion.sparsify import Planes, sparsify

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
    complete["only"]["Idle"] = {"annotated": "no", "cases": 0, "present": 0, "voxels": 0}
    assert [text.split(",")[0] for text in matrix_warnings(complete)] == [
        "Source 'Idle' annotates nothing"
    ]


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


@pytest.fixture
def full(tmp_path: Path, make_dataset: MakeDataset) -> Path:
    return make_dataset(tmp_path / "Dataset010_Full", cases=2)


def test_full_references_are_carried_in_merged_integers(full: Path, tmp_path: Path) -> None:
    dark, bright = tmp_path / "Dataset011_Dark", tmp_path / "Dataset012_Bright"
    hide_labels(full, dark, keep=["dark"], part=(1, 2))
    hide_labels(full, bright, keep=["bright"], part=(2, 2))
    target = tmp_path / "Dataset501_M"
    sources = read_sources({"11": dark, "12": bright}, parse_renames(["11:dark=black"]))
    merge_sources(sources, target, copy_images=False)
    dataset = read_dataset_json(target)
    assert dataset.labels == dataset.full_labels == {"background": 0, "black": 1, "bright": 2}
    for case, name, own in (("case00", "Dark_case00", 1), ("case01", "Bright_case01", 2)):
        complete = array(full / "labelsTr" / f"{case}.nii.gz")
        # Only the first source says that its "dark" is black.
        expected = np.array([0, 2, 1 if own == 1 else 0])[complete]
        assert np.array_equal(array(target / "labelsTr_full" / f"{name}.nii.gz"), expected)
        label = array(target / "labelsTr" / f"{name}.nii.gz")
        assert np.array_equal(label, np.where(expected == own, own, 0))


def test_full_references_split_a_joined_label(full: Path, tmp_path: Path) -> None:
    joined = tmp_path / "Dataset011_Joined"
    hide_labels(full, joined, joins={"ball": ("bright", "dark")}, part=(1, 2))
    both = read_sources({"10": full, "11": joined}, parse_renames(["11:ball=bright+dark"]))
    merge_sources(both, tmp_path / "Dataset501_M", copy_images=False)
    references = tmp_path / "Dataset501_M" / "labelsTr_full"
    assert [path.name for path in references.iterdir()] == ["Joined_case00.nii.gz"]
    complete = array(full / "labelsTr" / "case00.nii.gz")
    assert np.array_equal(array(references / "Joined_case00.nii.gz"), complete)


def test_a_full_class_that_means_several_is_never_guessed(full: Path, tmp_path: Path) -> None:
    coarse, fine = tmp_path / "Dataset011_Coarse", tmp_path / "Dataset012_Fine"
    hide_labels(full, coarse, keep=["bright"], part=(1, 2))
    hide_labels(full, fine, part=(2, 2))
    renames = parse_renames(["11:bright=left+right", "12:bright=left", "12:dark=right"])
    target = tmp_path / "Dataset501_M"
    merge_sources(read_sources({"11": coarse, "12": fine}, renames), target, copy_images=False)
    assert array(target / "labelsTr" / "Coarse_case00.nii.gz").any()
    assert not array(target / "labelsTr_full" / "Coarse_case00.nii.gz").any()


def test_a_class_that_only_full_references_show_can_be_renamed(full: Path, tmp_path: Path) -> None:
    dark, bright = tmp_path / "Dataset011_Dark", tmp_path / "Dataset012_Bright"
    hide_labels(full, dark, keep=["dark"], part=(1, 2))
    hide_labels(full, bright, keep=["bright"], part=(2, 2))
    renames = parse_renames(["11:bright=light", "12:bright=light"])
    target = tmp_path / "Dataset501_M"
    merge_sources(read_sources({"11": dark, "12": bright}, renames), target, copy_images=False)
    complete = array(full / "labelsTr" / "case00.nii.gz")
    assert read_dataset_json(target).labels == {"background": 0, "dark": 1, "light": 2}
    reference = array(target / "labelsTr_full" / "Dark_case00.nii.gz")
    assert np.array_equal(reference, np.array([0, 2, 1])[complete])
    assert set(np.unique(array(target / "labelsTr" / "Dark_case00.nii.gz"))) == {0, 1}
    with pytest.raises(InputError, match=r"has no label 'moon'\. It has dark, bright"):
        read_sources({"11": dark}, parse_renames(["11:moon=sun"]))


def test_a_rename_to_another_class_of_the_full_references_is_refused(
    full: Path, tmp_path: Path
) -> None:
    hide_labels(full, tmp_path / "Dataset011_Dark", keep=["dark"])
    with pytest.raises(InputError, match="two labels mean 'bright'"):
        read_sources({"11": tmp_path / "Dataset011_Dark"}, parse_renames(["11:dark=bright"]))


def test_a_sparse_source_merges_with_a_dense_one(full: Path, tmp_path: Path) -> None:
    sparse, dense = tmp_path / "Dataset011_Sparse", tmp_path / "Dataset012_Dense"
    sparsify(full, sparse, Planes(5))
    hide_labels(full, dense, keep=["dark"], cases=["case01"])
    target = tmp_path / "Dataset501_M"
    merge_sources(read_sources({"11": sparse, "12": dense}, {}), target, copy_images=False)
    dataset = read_dataset_json(target)
    assert (dict(dataset.labels), dataset.ignore_label) == (
        {"background": 0, "bright": 1, "dark": 2}, 3
    )  # fmt: skip
    complete = array(full / "labelsTr" / "case01.nii.gz")
    label = array(target / "labelsTr" / "Sparse_case01.nii.gz")
    assert np.array_equal(label[:, 5], complete[:, 5])
    assert (label[:, 6] == 3).all()
    assert set(np.unique(array(target / "labelsTr" / "Dense_case01.nii.gz"))) == {0, 2}
    for name in ("Sparse_case01", "Dense_case01"):
        assert np.array_equal(array(target / "labelsTr_full" / f"{name}.nii.gz"), complete)


def test_voxels_that_are_unannotated_even_in_the_full_references_stay_so(
    full: Path, tmp_path: Path
) -> None:
    content = json.loads((full / "dataset.json").read_text())
    content["labels"] = {"background": 0, "bright": 1, "ignore": 2}
    (full / "dataset.json").write_text(json.dumps(content))
    hide_labels(full, tmp_path / "Dataset011_A")
    other = tmp_path / "Dataset012_B"
    hide_labels(full, other)
    rename = parse_renames(["12:bright=light"])
    sources = read_sources({"11": tmp_path / "Dataset011_A", "12": other}, rename)
    merge_sources(sources, tmp_path / "Dataset501_M", copy_images=False)
    complete = array(full / "labelsTr" / "case00.nii.gz")
    reference = array(tmp_path / "Dataset501_M" / "labelsTr_full" / "B_case00.nii.gz")
    assert np.array_equal(reference, np.array([0, 2, 3])[complete])


def test_sources_without_full_references_give_none(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    merge_sources(read_sources(sources, {}), tmp_path / "Dataset501_M", copy_images=False)
    assert not (tmp_path / "Dataset501_M" / "labelsTr_full").exists()
