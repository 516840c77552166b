"""The fingerprint's own part: sources, classes, and whether it still describes the data."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnmosaic.data_conversion.dataset_json import read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import training_cases
from nnmosaic.planners.fingerprint import extract_fingerprint, unchanged_fingerprint
from nnmosaic.planners.source_statistics import intensity_properties


def fingerprint_of_folder(folder: Path) -> dict[str, object]:
    dataset = read_dataset_json(folder)
    cases = training_cases(folder, dataset)
    return extract_fingerprint(cases, dataset, workers=2, on_case=lambda _: None)


@pytest.fixture
def two_sources(tmp_path: Path, make_dataset: Callable[..., Path]) -> Path:
    """Four cases: 0 and 1 annotate "bright", 2 and 3 store both balls as one merged label."""
    folder = make_dataset(tmp_path / "Dataset001_Two", cases=4)
    content = json.loads((folder / "dataset.json").read_text())
    content["labels"]["ignore"] = 3
    content["partial_labels"] = {
        "sources": {
            "A": {"pattern": "0[01]$", "annotated": ["bright"]},
            "B": {
                "pattern": "0[23]$",
                "annotated": [],
                "merged": {"dark": ["bright", "dark"]},
            },
        }
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    for i in range(4):
        path = str(folder / "labelsTr" / f"case{i:02d}.nii.gz")
        image = SimpleITK.ReadImage(path)
        label = SimpleITK.GetArrayFromImage(image)
        label = np.where(label == 1, 1 if i < 2 else 2, 0 if i < 2 else label)
        label[0] = 3
        changed = SimpleITK.GetImageFromArray(label.astype(np.uint8))
        changed.CopyInformation(image)
        SimpleITK.WriteImage(changed, path)
    return folder


def labels_of(folder: Path) -> list[np.ndarray]:
    paths = sorted((folder / "labelsTr").iterdir())
    return [SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))) for path in paths]


def test_who_annotates_what_and_how_much(two_sources: Path) -> None:
    section = fingerprint_of_folder(two_sources)["nnmosaic"]
    labels = labels_of(two_sources)
    bright = sum(int((label == 1).sum()) for label in labels[:2])
    union = sum(int((label == 2).sum()) for label in labels[2:])
    counts = {"cases": 2, "present": 2}
    assert section["class_source_matrix"] == {
        "bright": {
            "A": {"annotated": "yes", **counts, "voxels": bright},
            "B": {"annotated": "merged", **counts, "voxels": union},
        },
        "dark": {
            "A": {"annotated": "no", "cases": 2, "present": 0, "voxels": 0},
            "B": {"annotated": "merged", **counts, "voxels": union},
        },
    }
    classes = section["classes"]
    assert classes["dark"] == {
        "cases_annotated": 0, "cases_present": 0, "voxels": 0, "volume_mm3": {}, "components": {}
    }  # fmt: skip
    assert classes["bright"]["cases_annotated"] == classes["bright"]["cases_present"] == 2
    assert classes["bright"]["components"]["0.5"] == 1
    volumes = sorted((labels[i] == 1).sum() * 1.0 * 1.25 * 0.8 for i in range(2))
    assert classes["bright"]["volume_mm3"]["0.0"] == pytest.approx(volumes[0])
    assert classes["bright"]["volume_mm3"]["1.0"] == pytest.approx(volumes[1])
    assert section["sources"]["A"]["cases"] == 2
    assert section["sources"]["A"]["spacing"]["0.5"] == pytest.approx([0.8, 1.25, 1.0])


def test_ignored_voxels_are_no_foreground(two_sources: Path) -> None:
    """Plane 0 is ignored in every case; it holds the image's extreme values."""
    for i in range(4):
        path = str(two_sources / "imagesTr" / f"case{i:02d}_0000.nii.gz")
        image = SimpleITK.ReadImage(path)
        array = SimpleITK.GetArrayFromImage(image)
        array[0] = 1e6
        changed = SimpleITK.GetImageFromArray(array)
        changed.CopyInformation(image)
        SimpleITK.WriteImage(changed, path)
    fingerprint = fingerprint_of_folder(two_sources)
    assert fingerprint["foreground_intensity_properties_per_channel"]["0"]["max"] < 1e3
    assert fingerprint["nnmosaic"]["sources"]["A"]["intensities"]["0"]["max"] < 1e3


def test_components_of_one_class_are_counted(
    tmp_path: Path, make_dataset: Callable[..., Path], save: Callable[..., None]
) -> None:
    folder = make_dataset(tmp_path / "Dataset001_One", cases=1)
    label = np.zeros((20, 24, 22), np.uint8)
    label[2:4, 2:4, 2:4] = label[4, 4, 4] = 1  # these two share a corner
    label[10:12, 10:12, 10:12] = 1
    label[15, 15, 15] = 2
    save(folder / "labelsTr" / "case00.nii.gz", label)
    classes = fingerprint_of_folder(folder)["nnmosaic"]["classes"]
    assert classes["bright"]["components"]["0.5"] == 2
    assert classes["bright"]["voxels"] == 17
    assert classes["dark"]["components"]["0.5"] == 1


def test_a_touched_dataset_keeps_its_fingerprint_and_a_changed_one_does_not(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    folder = make_dataset(tmp_path / "Dataset001_One", cases=2)
    path = tmp_path / "dataset_fingerprint.json"

    def unchanged() -> bool:
        dataset = read_dataset_json(folder)
        return unchanged_fingerprint(path, training_cases(folder, dataset), dataset) is not None

    assert not unchanged()
    path.write_text(json.dumps(fingerprint_of_folder(folder)))
    assert unchanged()
    label = folder / "labelsTr" / "case01.nii.gz"
    os.utime(label, (1, 1))
    assert unchanged()
    content = label.read_bytes()
    times = label.stat()
    label.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(label, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert not unchanged()
    label.write_bytes(content)
    assert unchanged()
    declared = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**declared, "channel_names": {"0": "CT"}}))
    assert not unchanged()


def test_raters_are_compared_where_they_annotated(
    tmp_path: Path, make_dataset: Callable[..., Path], save: Callable[..., None]
) -> None:
    extra = {"multirater": {"raters": ["A", "B", "C"], "identity": "persistent"}}
    folder = make_dataset(tmp_path / "Dataset001_Raters", cases=2, **extra)
    masks = {}
    for rater, planes in (("A", 4), ("B", 6), ("C", 2)):
        masks[rater] = np.zeros((20, 24, 22), np.uint8)
        masks[rater][2 : 2 + planes, 3:9, 3:9] = 1
        save(folder / "labelsTr_raters" / rater / "case00.nii.gz", masks[rater])
    save(folder / "labelsTr_raters" / "A" / "case01.nii.gz", masks["A"])
    save(folder / "labelsTr_raters" / "B" / "case01.nii.gz", masks["A"])
    raters = fingerprint_of_folder(folder)["nnmosaic"]["raters"]
    assert raters["dice"]["A and B"]["cases"] == 2
    assert raters["dice"]["A and B"]["0.0"] == pytest.approx(2 * 4 / (4 + 6))
    assert raters["dice"]["A and B"]["1.0"] == 1
    assert raters["dice"]["B and C"]["cases"] == 1
    assert raters["volume_ratio"]["B"]["1.0"] == pytest.approx(6 / 4)
    assert raters["volume_ratio"]["C"]["0.5"] == pytest.approx(2 / 4)
    save(folder / "labelsTr_raters" / "C" / "case01.nii.gz", masks["A"], spacing=(2, 2, 2))
    with pytest.raises(InputError, match=r"C/case01\.nii\.gz has another spacing"):
        fingerprint_of_folder(folder)
    declared = json.loads((folder / "dataset.json").read_text())
    for wrong in (["A"], ["A", "../B"], ["A", "A"], "AB"):
        declared["multirater"]["raters"] = wrong
        (folder / "dataset.json").write_text(json.dumps(declared))
        with pytest.raises(InputError, match="at least two different"):
            read_dataset_json(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 100, 101, 200, 201, 999, 20_000])
def test_percentiles_and_extremes_equal_numpys(size: int, dtype: type) -> None:
    for seed in range(20):
        values = np.random.default_rng(seed).normal(1e4, 300, size).astype(dtype)
        properties = intensity_properties(np.array_split(values, 3))
        expected = np.percentile(values, [0.5, 50.0, 99.5])
        names = ("percentile_00_5", "median", "percentile_99_5")
        assert [properties[name] for name in names] == list(expected)
        assert (properties["min"], properties["max"]) == (values.min(), values.max())
        assert properties["mean"] == float(values.mean())
