"""T18: a class counts only where it was annotated; without declarations nnU-Net's own summary."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnmosaic.data_conversion.dataset_json import DatasetJson, parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.masked_evaluation import evaluate_folder, names_of

LABELS = {"background": 0, "kidney": 1, "liver": 2, "tumour": 3}
SOURCES = {
    "A": {"pattern": "^A", "annotated": ["kidney"]},
    "B": {"pattern": "^B", "annotated": ["kidney"], "merged": {"liver": ["liver", "tumour"]}},
    "C": {"pattern": "^C", "annotated": "all"},
}


def declared(sources: Any = None, **extra: Any) -> DatasetJson:
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz", **extra}
    if sources is not None:
        content["partial_labels"] = {"sources": sources}
    return parse_dataset_json(content)


@pytest.fixture
def folders(tmp_path: Path, save: Callable[..., None]) -> tuple[Path, Path]:
    """References and predictions of A1, B1, C1, C2; every prediction is the full label map."""
    full = np.zeros((4, 4, 4), np.uint8)
    full[0, :2], full[1], full[2, 0] = 1, 2, 3
    stored = {"A1": np.where(full == 1, 1, 0), "B1": np.where(full == 3, 2, full)}
    stored |= {"C1": full, "C2": np.where(full == 3, 0, full)}
    for case, reference in stored.items():
        save(tmp_path / "references" / f"{case}.nii.gz", reference.astype(np.uint8))
        save(tmp_path / "predictions" / f"{case}.nii.gz", full)
    return tmp_path / "references", tmp_path / "predictions"


def test_unannotated_pairs_are_nan_and_do_not_count(folders: tuple[Path, Path]) -> None:
    summary = evaluate_folder(*folders, declared(SOURCES))
    by_case = {
        Path(c["prediction_file"]).name[:2]: c["metrics"] for c in summary["metric_per_case"]
    }
    assert by_case["A1"]["1"]["Dice"] == 1
    assert np.isnan(by_case["A1"]["2"]["Dice"])
    assert np.isnan(by_case["A1"]["3"]["TP"])
    # B1 holds liver and tumour under one label, so only their union can be scored.
    assert np.isnan(by_case["B1"]["2"]["Dice"])
    assert by_case["B1"]["(2, 3)"] == by_case["B1"]["(2, 3)"] | {"Dice": 1.0, "n_ref": 20}
    # C2 was searched for the tumour: the 4 voxels found are wrong.
    assert by_case["C2"]["3"] == by_case["C2"]["3"] | {"Dice": 0.0, "FP": 4}
    assert summary["n_cases"] == {"1": 4, "2": 2, "3": 2, "(2, 3)": 1}
    assert summary["mean"]["1"]["Dice"] == 1
    assert summary["mean"]["3"]["Dice"] == 0.5
    assert summary["foreground_mean"]["Dice"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert summary["per_source"]["A"]["n_cases"] == {"1": 1}
    assert summary["labels"] == {"1": "kidney", "2": "liver", "3": "tumour"}


@pytest.mark.parametrize("sources", [None, {"S": {"pattern": ".", "annotated": "all"}}])
def test_where_all_is_annotated_the_numbers_are_nnunets(
    folders: tuple[Path, Path], sources: Any
) -> None:
    ours = evaluate_folder(*folders, declared(sources))
    output = folders[0].parent / "stock.json"
    references, predictions = (str(folder) for folder in folders)
    compute_metrics_on_folder(
        references, predictions, str(output), SimpleITKIO(), ".nii.gz", [1, 2, 3],
        ignore_label=None, num_processes=1,
    )  # fmt: skip
    stock = json.loads(output.read_text())
    plain = json.loads(json.dumps(ours))
    added = {"n_cases", "labels", "per_source"}
    if sources is None:
        assert set(plain) == {*stock, *added}
        assert set(plain["metric_per_case"][0]) == {*stock["metric_per_case"][0], "source"}
    assert not plain.get("not_annotated")
    assert plain["mean"] == stock["mean"]
    assert plain["foreground_mean"] == stock["foreground_mean"]
    for case, expected in zip(plain["metric_per_case"], stock["metric_per_case"], strict=True):
        # As text, because NaN does not equal itself.
        for key, metrics in expected["metrics"].items():
            assert str(sorted(case["metrics"][key].items())) == str(sorted(metrics.items()))


def test_regions_are_scored_as_nnunet_does(folders: tuple[Path, Path]) -> None:
    labels = {"background": 0, "all": [1, 2, 3], "tumour": 3}
    content = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    content["regions_class_order"] = [1, 2]
    summary = evaluate_folder(*folders, parse_dataset_json(content))
    assert summary["labels"] == {"(1, 2, 3)": "all", "3": "tumour"}
    assert summary["n_cases"] == {"3": 4, "(1, 2, 3)": 4}
    whole = [case["metrics"]["(1, 2, 3)"]["Dice"] for case in summary["metric_per_case"]]
    assert whole == pytest.approx([2 * 8 / (8 + 28), 1, 1, 2 * 24 / (24 + 28)])
    expected = (summary["mean"]["3"]["Dice"] + summary["mean"]["(1, 2, 3)"]["Dice"]) / 2
    assert summary["foreground_mean"]["Dice"] == pytest.approx(expected)


def test_missing_predictions_are_named_or_allowed(folders: tuple[Path, Path]) -> None:
    (folders[1] / "C1.nii.gz").unlink()
    with pytest.raises(InputError, match=r"C1\.nii\.gz does not exist \(1 of 4 references"):
        evaluate_folder(*folders, declared(SOURCES))
    assert evaluate_folder(*folders, declared(SOURCES), allow_missing=True)["n_cases"]["2"] == 1
    with pytest.raises(InputError, match=r"no \.nii\.gz file in common"):
        evaluate_folder(folders[0], folders[0].parent, declared(SOURCES), allow_missing=True)


def test_predicted_volume_is_known_where_nothing_was_annotated(folders: tuple[Path, Path]) -> None:
    summary = evaluate_folder(*folders, declared(SOURCES))
    # 16 and 4 voxels of 1 x 1.25 x 0.8 mm; B annotates the union of both, but neither alone.
    volumes = {"2": {"cases": 1, "predicted_ml": 0.016}, "3": {"cases": 1, "predicted_ml": 0.004}}
    assert list(summary["not_annotated"]) == ["A", "B"]
    for source in ("A", "B"):
        assert list(summary["not_annotated"][source]) == ["2", "3"]
        for key, expected in volumes.items():
            assert summary["not_annotated"][source][key] == pytest.approx(expected)
    assert summary["warnings"] == []
    assert names_of(summary) == {"1": "kidney", "2": "liver", "3": "tumour", "(2, 3)": LIVER}
    assert "recall" not in summary["metric_per_case"][0]["metrics"]["1"]


LIVER = "liver + tumour"
REORDERED = {"background": 0, "tumour": 1, "liver": 2, "kidney": 3}


@pytest.mark.parametrize("full_labels", [LABELS, REORDERED])
def test_a_full_reference_scores_what_was_not_annotated(
    folders: tuple[Path, Path], save: Callable[..., None], full_labels: dict[str, int]
) -> None:
    full = np.zeros((4, 4, 4), np.uint8)
    full[0, :2] = full_labels["kidney"]
    full[1, :2] = full[3, 0] = full_labels["liver"]
    full[1, 2] = 4  # unannotated even here
    save(folders[0].parent / "full" / "A1.nii.gz", full)
    dataset = declared(SOURCES, full_labels=full_labels)
    summary = evaluate_folder(*folders, dataset, full_references=folders[0].parent / "full")
    # Liver: 12 voxels, of which 8 are found; of 16 predicted voxels 4 are wrong, 4 unknown.
    expected = {"cases": 1, "predicted_ml": 0.016, "full_cases": 1, "Dice": 2 / 3}
    expected |= {"recall": 2 / 3, "false_positive_ml": 0.004}
    assert summary["not_annotated"]["A"]["2"] == pytest.approx(expected)
    # No full reference of A shows a tumour, so they may not annotate it; B has none at all.
    assert set(summary["not_annotated"]["A"]["3"]) == {"cases", "predicted_ml"}
    assert set(summary["not_annotated"]["B"]["2"]) == {"cases", "predicted_ml"}
    assert summary["per_source"] == evaluate_folder(*folders, dataset)["per_source"]


def test_a_full_reference_scores_annotated_classes_at_ignored_voxels(
    folders: tuple[Path, Path], save: Callable[..., None]
) -> None:
    """Sparse references of C1 (all classes) and A1 (kidney): only the first plane is annotated."""
    full = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folders[0] / "C1.nii.gz")))
    for case in ("A1", "C1"):
        reference = np.full_like(full, 4)
        reference[0] = full[0]
        save(folders[0] / f"{case}.nii.gz", reference)
    full[1, 2:] = full[0, 2:] = 1  # kidney: 8 voxels are ignored; liver: 8 of 16 are left
    full[3] = 4  # unannotated even here
    save(folders[0].parent / "full" / "C1.nii.gz", full)
    save(folders[0].parent / "full" / "C2.nii.gz", full)  # C2 is dense: not needed
    predicted = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folders[1] / "C1.nii.gz")))
    predicted[1, 3], predicted[3] = 1, 1
    save(folders[1] / "C1.nii.gz", predicted)
    dataset = declared(SOURCES, labels={**LABELS, "ignore": 4}, full_labels=LABELS)
    summary = evaluate_folder(*folders, dataset, full_references=folders[0].parent / "full")
    assert list(summary["ignored_voxels"]) == ["C"]  # A1 has no full reference
    found = summary["ignored_voxels"]["C"]
    assert list(found) == ["1", "2", "3"]
    kidney = {"cases": 1, "predicted_ml": 0.02, "full_cases": 1, "Dice": 2 * 4 / 12}
    assert found["1"] == pytest.approx({**kidney, "recall": 0.5, "false_positive_ml": 0})
    liver = {"cases": 1, "predicted_ml": 0.012, "full_cases": 1, "Dice": 2 * 8 / 20}
    assert found["2"] == pytest.approx({**liver, "recall": 1, "false_positive_ml": 0.004})
    assert found["3"]["Dice"] == 1
    assert list(summary["not_annotated"]) == ["A", "B"]


def test_a_full_reference_must_lie_on_its_reference(
    folders: tuple[Path, Path], save: Callable[..., None]
) -> None:
    full = folders[0].parent / "full"
    save(full / "A1.nii.gz", np.zeros((4, 4, 5), np.uint8))
    with pytest.raises(InputError, match=r"full/A1\.nii\.gz has the shape 4 x 4 x 5, its image A1"):
        evaluate_folder(*folders, declared(SOURCES), full_references=full)


def test_warnings_name_what_was_not_learnt_or_not_scored(
    folders: tuple[Path, Path], save: Callable[..., None]
) -> None:
    kidney_only = np.zeros((4, 4, 4), np.uint8)
    kidney_only[0, :2] = 1
    save(folders[1] / "A1.nii.gz", kidney_only)  # finds what A annotates, and nothing else
    save(folders[0] / "C1.nii.gz", kidney_only)  # the only reference with a tumour
    warnings = evaluate_folder(*folders, declared(SOURCES))["warnings"]
    assert [warning[: warning.index(",")] for warning in warnings] == [
        "Class 'tumour' occurs in no reference that annotates it (scored: 2)",
        "Class 'liver' is predicted in 0 of 1 cases of source 'A'",
        "Class 'tumour' is predicted in 0 of 1 cases of source 'A'",
    ]
    assert "but in 3 others" in warnings[1]
