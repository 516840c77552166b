"""The validation folder of a training (spec 5.1; invariant 14)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import SimpleITK
from nnunetv2.evaluation.evaluate_predictions import evaluate_folder_entry_point

from nnmosaic.trainers.clustering_propagation.trainer import (
    nnUNetTrainerClusteringPropagation as Trainer,
)

LABELS: dict[str, Any] = {}
"""As dataset 4 has them."""
REGIONS = {
    "labels": {"background": 0, "both": [1, 2], "dark": 2},
    "regions_class_order": [1, 2],
}


@pytest.mark.parametrize("changes", [LABELS, REGIONS], ids=["labels", "regions"])
def test_nnunets_command_scores_the_validation_folder_alike(
    changes: dict[str, Any],
    make_trainer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = make_trainer(Trainer, configuration="2d")
    plans = {**known.plans_manager.plans, "continue_training": False}
    content = {**known.dataset_json, **changes}
    trainer = Trainer(plans, "2d", 0, content, known.device)
    trainer.initialize()
    trainer.perform_actual_validation()
    for name, written in (("dataset", content), ("plans", trainer.plans_manager.plans)):
        (tmp_path / f"{name}.json").write_text(json.dumps(written))
    found = Path(trainer.output_folder) / "validation"
    drawn = Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations"
    options = ["-djfile", tmp_path / "dataset.json", "-pfile", tmp_path / "plans.json"]
    command = ["nnUNetv2_evaluate_folder", drawn, found, *options, "-o", tmp_path / "summary.json"]
    # As after nnU-Net's own training, other folds have the rest of the cases.
    monkeypatch.setattr("sys.argv", [*map(str, command), "-np", "1", "--chill"])
    evaluate_folder_entry_point()
    ours, theirs = (
        json.loads((folder / "summary.json").read_text()) for folder in (found, tmp_path)
    )
    assert ours == theirs
    assert set(ours["mean"]) == ({"(1, 2)", "2"} if changes else {"1", "2"})
    names = [f"{case}.nii.gz" for case in trainer.do_split()[1]]
    assert [Path(case["prediction_file"]).name for case in ours["metric_per_case"]] == names
    for name in names:
        written, reference = (SimpleITK.ReadImage(str(folder / name)) for folder in (found, drawn))
        assert written.GetSize() == reference.GetSize()
        for of_image in ("GetSpacing", "GetOrigin", "GetDirection"):
            expected = getattr(reference, of_image)()
            assert getattr(written, of_image)() == pytest.approx(expected)
