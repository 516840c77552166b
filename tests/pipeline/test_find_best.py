"""find_best against a table computed by hand, and on two trained configurations."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnmosaic.data_conversion.dataset_json import parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.cli import main
from nnmosaic.pipeline.find_best import Candidate, Model, _commands, compare

NAN = float("nan")
CONTENT = {
    "channel_names": {"0": "T1"},
    "labels": {"background": 0, "a": 1, "b": 2},
    "numTraining": 4,
    "file_ending": ".nii.gz",
    "subjects": {"c0": "p", "c1": "p", "c2": "q", "c3": "q"},
}


def candidate(name: str, dice: list[list[float]]) -> Candidate:
    model = Model("T", "P", name, Path(f"T__P__{name}"), ("0",))
    return Candidate((model,), np.array(dice), ["c0", "c1", "c2", "c3"])


def test_classes_count_where_annotated_and_subjects_are_resampled_as_a_whole() -> None:
    low = [[0.5, NAN], [0.7, NAN], [NAN, 0.9], [NAN, 0.8]]
    high = [[0.6, NAN], [0.8, NAN], [NAN, 0.9], [NAN, 0.8]]
    first, second = compare(
        [candidate("low", low), candidate("high", high)], parse_dataset_json(CONTENT)
    )
    assert first["dice"] == pytest.approx((0.6 + 0.85) / 2)
    assert first["difference_to_best"] == pytest.approx(-0.05)
    # Subject p annotates a, q annotates b: resamples are p+p, p+q and q+q.
    assert first["interval"] == pytest.approx([0.6, 0.85])
    assert first["difference_interval"] == pytest.approx([-0.1, 0.0])
    assert second["difference_interval"] == [0.0, 0.0]


def test_models_with_other_cases_are_not_compared() -> None:
    one = candidate("one", [[0.5, 0.5]] * 4)
    other = Candidate(candidate("other", []).models, one.dice[:3], one.cases[:3])
    with pytest.raises(InputError, match="c3 is missing in one of them"):
        compare([one, other], parse_dataset_json(CONTENT))


def test_a_cascade_is_predicted_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "T__P__3d_cascade_fullres"
    for name in (folder, tmp_path / "T__P__3d_lowres"):
        name.mkdir()
        stages = {"3d_lowres": {}, "3d_cascade_fullres": {"previous_stage": "3d_lowres"}}
        (name / "plans.json").write_text(json.dumps({"configurations": stages}))
    model = Model("T", "P", "3d_cascade_fullres", folder, ("0",))
    first, second = _commands([model], ["0", "1"])
    assert f"-m {tmp_path}/T__P__3d_lowres -f 0 1" in first
    assert f"-m {folder} -f 0 1 -prev_stage_predictions PREDICTIONS_3d_lowres" in second
    assert "-o PREDICTIONS_3d_lowres " in first


@pytest.mark.slow
def test_the_better_of_two_models_and_their_ensemble(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only fold 0 is finished for both; the second has made a single step."""
    short = ["--epochs", "1", "--iterations_per_epoch", "1", "--val_iterations_per_epoch", "1"]
    command = ["train", "7", "3d_fullres", "0", "-tr", "nnUNetTrainerMosaic", "--npz"]
    assert main([*command, "--seed", "0", *short]) == 0
    results = trained / "nnUNet_results" / "Dataset007_Merged"
    trainers = ["-tr", "nnUNetTrainerSelfDisambiguation", "nnUNetTrainerMosaic"]
    assert main(["find_best", "-d", "7", "-c", "2d", "3d_fullres", *trainers]) == 0
    information = json.loads((results / "find_best.json").read_text())
    rows: dict[str, dict[str, Any]] = {row["model"]: row for row in information["models"]}
    good, bad = (f"{name}__nnUNetPlans__3d_fullres" for name in trainers[1:])
    assert set(rows) == {good, bad, f"{good} + {bad}"}
    for name in (good, bad):
        summary = json.loads(
            (results / name / "fold_0" / "validation" / "summary.json").read_text()
        )
        assert rows[name]["dice"] == pytest.approx(summary["foreground_mean"]["Dice"])
        assert rows[name]["interval"][0] <= rows[name]["dice"] <= rows[name]["interval"][1]
    assert rows[good]["dice"] > rows[bad]["dice"]
    assert information["folds"] == ["0"]
    last = information["commands"][-1]
    assert last.endswith("-o PREDICTIONS") or information["best"] in last
    assert all(Path(c.split("-m ")[1].split()[0]).is_dir() for c in information["commands"][:1])
    assert "-f 0" in information["commands"][0]
    ensembled = results / "ensembles" / f"{good}___{bad}" / "fold_0"
    assert len(list(ensembled.glob("*.nii.gz"))) == 2
    for path in (results / bad / "fold_0" / "validation").glob("*.npz"):
        path.unlink()
    assert main(["find_best", "-d", "7", "-c", "3d_fullres", *trainers]) == 0
    information = json.loads((results / "find_best.json").read_text())
    assert [row["model"] for row in information["models"]] == [good, bad]


def test_nothing_to_compare_is_one_message(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["find_best", "-d", "7"]) == 2
    assert "no finished fold of nnUNetTrainerSelfDisambiguation" in capsys.readouterr().err
    folder = "nnUNetTrainerMosaic__nnUNetPlans__3d_fullres"
    model = prepared / "nnUNet_results" / "Dataset007_Merged" / folder
    (model / "fold_0" / "validation").mkdir(parents=True)
    for name in ("summary.json", "summary_raw.json"):
        (model / "fold_0" / "validation" / name).write_text("{}")
    other = model.with_name("nnUNetTrainerMosaic__nnUNetPlans__2d")
    shutil.copytree(model, other)
    (other / "fold_0").rename(other / "fold_2")
    command = ["find_best", "-d", "7", "-tr", "nnUNetTrainerMosaic"]
    assert main(command) == 2
    assert "No fold is finished for every model" in capsys.readouterr().err
    assert main([*command, "-c", "2d", "-f", "4"]) == 2
    assert "has no finished fold 4" in capsys.readouterr().err
