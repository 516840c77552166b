"""A dataset with several annotations per case."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import SimpleITK

from nnmosaic.data_conversion.add_raters import RaterDataset, add_raters, parse_raters
from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.data_conversion.dataset_json import parse_dataset_json, read_dataset_json
from nnmosaic.data_conversion.doctor import examine
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import training_cases

WHAT = RaterDataset(channels=["T1"], classes=["ball"])


@pytest.fixture
def files(tmp_path: Path, save: Callable[..., None]) -> dict[str, Path]:
    """Return folders of images and of three raters; C has not annotated case b."""
    rng = np.random.default_rng(0)
    for case in "ab":
        save(tmp_path / "images" / f"{case}_0000.nii.gz", rng.random((5, 6, 7)).astype(np.float32))
    for rater, size in (("A", 1), ("B", 2), ("C", 3)):
        mask = np.zeros((5, 6, 7), np.uint8)
        mask[:, :size] = 1
        for case in "ab":
            if rater + case != "Cb":
                save(tmp_path / rater / f"{case}.nii.gz", mask)
    return {name: tmp_path / name for name in ("images", "A", "B", "C")}


def raters_of(files: dict[str, Path]) -> dict[str, Path]:
    return {name: files[name] for name in "ABC"}


def array(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def test_raters_are_kept_and_fused(files: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "Dataset001_Raters"
    assert add_raters(files["images"], raters_of(files), target, WHAT) == {"A": 2, "B": 2, "C": 1}
    dataset = read_dataset_json(target)
    assert dataset.raters == ("A", "B", "C")
    assert dataset.content["multirater"]["identity"] == "persistent"
    assert dict(dataset.labels) == {"background": 0, "ball": 1}
    a, b = training_cases(target, dataset)
    assert [name for name, _ in a.raters] == ["A", "B", "C"]
    assert [name for name, _ in b.raters] == ["A", "B"]
    assert a.raters[0][1].readlink() == files["A"] / "a.nii.gz"
    assert array(a.label)[0].sum() == 2 * 7  # two of three
    assert array(b.label)[0].sum() == 1 * 7  # two raters: where they differ is background
    image = SimpleITK.ReadImage(str(a.images[0]))
    label = SimpleITK.ReadImage(str(a.label))
    assert label.GetOrigin() == image.GetOrigin()
    assert examine(target) == []


def test_ties_staple_and_subjects(files: dict[str, Path], tmp_path: Path) -> None:
    table = tmp_path / "cases.csv"
    table.write_text("case,subject\na,anna\nb,anna\nc,carl\n")
    target = tmp_path / "Dataset001_Raters"
    what = replace(WHAT, tie="foreground", identity="exchangeable")
    add_raters(files["images"], raters_of(files), target, what, subjects=table, copy_files=True)
    dataset = read_dataset_json(target)
    assert dict(dataset.subjects) == {"a": "anna", "b": "anna"}
    assert array(target / "labelsTr" / "b.nii.gz")[0].sum() == 2 * 7
    assert not (target / "labelsTr_raters" / "A" / "a.nii.gz").is_symlink()
    other = tmp_path / "Dataset002_Staple"
    add_raters(files["images"], raters_of(files), other, replace(WHAT, fusion="staple"))
    assert array(other / "labelsTr" / "a.nii.gz")[0].sum() == 2 * 7
    rates = read_json(other / "staple.json")
    assert list(rates["a"]["ball"]) == ["A", "B", "C"]
    assert list(rates["b"]["ball"]) == ["A", "B"]
    assert rates["a"]["ball"]["A"]["sensitivity"] == pytest.approx(0.5, abs=0.02)
    assert rates["a"]["ball"]["C"]["specificity"] < 1
    assert not (target / "staple.json").exists()


def without_label(files: dict[str, Path]) -> None:
    for name in "ABC":
        (files[name] / "a.nii.gz").unlink()


def with_stray_label(files: dict[str, Path]) -> None:
    (files["B"] / "a.nii.gz").rename(files["B"] / "x.nii.gz")


def with_other_value(files: dict[str, Path]) -> None:
    image = SimpleITK.ReadImage(str(files["C"] / "a.nii.gz"))
    SimpleITK.WriteImage(image * 2, str(files["C"] / "a.nii.gz"))


def with_other_shape(files: dict[str, Path]) -> None:
    image = SimpleITK.ReadImage(str(files["A"] / "b.nii.gz"))
    SimpleITK.WriteImage(image[:, :, :-1], str(files["A"] / "b.nii.gz"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_label, r"Case 'a' in .* was annotated by none of A, B, C"),
        (with_stray_label, r"x\.nii\.gz belongs to no image"),
        (with_other_value, r"C/a\.nii\.gz holds the label value 2"),
        (with_other_shape, r"A/b\.nii\.gz has the shape"),
    ],
)
def test_files_that_do_not_fit_stop_everything(
    files: dict[str, Path], tmp_path: Path, spoil: Callable[..., None], message: str
) -> None:
    spoil(files)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        add_raters(files["images"], raters_of(files), tmp_path / "Dataset001_X", WHAT)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a first line with the columns"),
        ("case,subject\na,anna\n", "names no subject for case 'b'"),
    ],
)
def test_a_subject_table_must_be_complete(
    files: dict[str, Path], tmp_path: Path, text: str, message: str
) -> None:
    table = tmp_path / "cases.csv"
    table.write_text(text)
    with pytest.raises(InputError, match=message):
        add_raters(files["images"], raters_of(files), tmp_path / "D", WHAT, subjects=table)


def test_a_single_rater_and_bad_arguments_are_refused(
    files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="at least two different"):
        add_raters(files["images"], {"A": files["A"]}, tmp_path / "D", WHAT)
    for text, message in (
        (["A"], "expected RATER=FOLDER"),
        ([f"A={files['A']}", f"A={files['B']}"], "names A twice"),
        (["A=nowhere"], "nowhere does not exist"),
        ([f"all={files['A']}"], "means everyone"),
    ):
        with pytest.raises(InputError, match=message):
            parse_raters(text)


@pytest.mark.parametrize("order", ["as_is", "area"])
def test_a_rater_without_any_case_is_refused(
    files: dict[str, Path], tmp_path: Path, order: Literal["as_is", "area"]
) -> None:
    (tmp_path / "Nobody").mkdir()
    raters = {**raters_of(files), "D": tmp_path / "Nobody"}
    what = replace(WHAT, order=order, identity="exchangeable")
    with pytest.raises(InputError, match=r"Rater D annotated no case.*Nobody.*leave --raters D="):
        add_raters(files["images"], raters, tmp_path / "Dataset001_X", what)
    assert not (tmp_path / "Dataset001_X").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("A", "all"), "predict --raters all means everyone"),
        (("anna", "Anna"), "anna and Anna differ only in upper and lower case"),
    ],
)
def test_names_that_files_or_commands_confuse_are_refused(
    files: dict[str, Path], tmp_path: Path, names: tuple[str, str], message: str
) -> None:
    raters = dict(zip(names, (files["A"], files["B"]), strict=True))
    with pytest.raises(InputError, match=message):
        add_raters(files["images"], raters, tmp_path / "Dataset001_X", WHAT)
    assert not (tmp_path / "Dataset001_X").exists()


def test_doctor_reads_every_rater(files: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "Dataset001_Raters"
    add_raters(files["images"], raters_of(files), target, WHAT, copy_files=True)
    (target / "labelsTr_raters" / "A" / "stray.nii.gz").touch()
    with_other_value({"C": target / "labelsTr_raters" / "C"})
    for rater in "AB":
        (target / "labelsTr_raters" / rater / "b.nii.gz").unlink()
    found = examine(target)
    texts = " ".join(finding.text for finding in found)
    assert "C/a.nii.gz holds the label value 2" in texts
    assert "Case 'b' has no label map of A, B, C in labelsTr_raters" in texts
    assert "stray.nii.gz belongs to no case" in texts
    assert [finding.is_error for finding in found] == [False, True, True]


def test_label_maps_are_sorted_by_area(files: dict[str, Path], tmp_path: Path) -> None:
    what = replace(WHAT, identity="exchangeable", order="area", fusion="staple")
    raters = {name: files[name] for name in "BCA"}
    target = tmp_path / "Dataset001_Ranks"
    with pytest.raises(InputError, match=r"Case 'b' in .*images was not annotated by C: with"):
        add_raters(files["images"], raters, target, what)
    with pytest.raises(InputError, match="belongs to a rank and to no person"):
        add_raters(files["images"], raters, target, replace(what, identity="persistent"))
    with pytest.raises(InputError, match="no rater comes first"):
        add_raters(files["images"], raters, target, replace(what, tie="first_rater"))
    assert not target.exists()
    shutil.copy(files["A"] / "b.nii.gz", files["C"] / "b.nii.gz")  # as small as A's
    found = add_raters(files["images"], raters, target, what)
    assert found == {"rank1": 2, "rank2": 2, "rank3": 2}
    folder = target / "labelsTr_raters"
    drawn_by = {
        case: [(folder / f"rank{i}" / f"{case}.nii.gz").readlink().parent.name for i in (1, 2, 3)]
        for case in "ab"
    }
    assert drawn_by == {"a": ["A", "B", "C"], "b": ["C", "A", "B"]}
    assert list(read_json(target / "staple.json")["b"]["ball"]) == ["rank1", "rank2", "rank3"]
    assert read_json(target / "staple.json")["b"]["ball"]["rank3"]["specificity"] < 1
    dataset = read_dataset_json(target)
    assert dataset.raters == ("rank1", "rank2", "rank3")
    assert dataset.content["multirater"]["identity"] == "exchangeable"
    assert examine(target) == []


def test_another_order_is_refused() -> None:
    labels = {"background": 0, "ball": 1}
    content = {"channel_names": {"0": "T1"}, "labels": labels, "file_ending": ".png"}
    multirater = {"raters": ["A", "B"], "order": "area"}
    with pytest.raises(InputError, match="can only be as_is, got 'area'"):
        parse_dataset_json({**content, "numTraining": 1, "multirater": multirater})


def test_an_unknown_identity_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    what = replace(WHAT, identity="anyone")
    with pytest.raises(InputError, match="must be persistent or exchangeable, got 'anyone'"):
        add_raters(files["images"], raters_of(files), tmp_path / "D", what)
