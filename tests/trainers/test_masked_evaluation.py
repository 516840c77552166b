"""T18: a class counts only where it was annotated; without declarations nnU-Net's own summary."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnmosaic.data_conversion.dataset_json import DatasetJson, parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.masked_evaluation import evaluate_folder

LABELS = {"background": 0, "kidney": 1, "liver": 2, "tumour": 3}
SOURCES = {
    "A": {"pattern": "^A", "annotated": ["kidney"]},
    "B": {"pattern": "^B", "annotated": ["kidney"], "merged": {"liver": ["liver", "tumour"]}},
    "C": {"pattern": "^C", "annotated": "all"},
}


def declared(sources: Any = None) -> DatasetJson:
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz"}
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


def test_without_declarations_the_numbers_are_nnunets(folders: tuple[Path, Path]) -> None:
    ours = evaluate_folder(*folders, declared())
    output = folders[0].parent / "stock.json"
    references, predictions = (str(folder) for folder in folders)
    compute_metrics_on_folder(
        references, predictions, str(output), SimpleITKIO(), ".nii.gz", [1, 2, 3],
        ignore_label=None, num_processes=1,
    )  # fmt: skip
    stock = json.loads(output.read_text())
    plain = json.loads(json.dumps(ours))
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
