"""Few-shot folds: nested, by subject, and beside folds that stay as they are."""

import json
from pathlib import Path

import pytest

from nnmosaic.data_conversion.dataset_json import DatasetJson, parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.few_shot import add_few_shot_folds, few_shot_folds, nested_cases

CASES = [f"case{i:02d}" for i in range(12)]


@pytest.fixture
def dataset() -> DatasetJson:
    """Return a dataset in which two cases each are one subject."""
    return parse_dataset_json(
        {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "organ": 1},
            "numTraining": 12,
            "file_ending": ".nii.gz",
            "subjects": {case: f"subject{i // 2}" for i, case in enumerate(CASES)},
        }
    )


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    path = tmp_path / "splits_final.json"
    folds = [
        {"train": [c for c in CASES if c not in val], "val": val}
        for val in (CASES[2 * i : 2 * i + 2] for i in range(5))
    ]
    path.write_text(json.dumps(folds))
    return path


def test_sets_are_nested_and_draws_differ(splits: Path, dataset: DatasetJson) -> None:
    before = json.loads(splits.read_text())
    folds = add_few_shot_folds(splits, dataset, numbers=[4, 1, 2], draws=3)
    after = json.loads(splits.read_text())
    assert after[:5] == before
    assert folds == few_shot_folds(splits)
    assert [(f["cases"], f["draw"]) for f in folds.values()] == [
        (n, d) for d in range(3) for n in (1, 2, 4)
    ]
    for fold, what in folds.items():
        assert len(after[fold]["train"]) == what["cases"]
        assert after[fold]["val"] == CASES[:2]
        larger = [f for f, w in folds.items() if w["draw"] == what["draw"] and f >= fold]
        assert all(set(after[fold]["train"]) <= set(after[f]["train"]) for f in larger)
    assert len({tuple(after[f]["train"]) for f, w in folds.items() if w["cases"] == 4}) == 3


def test_asking_again_adds_only_what_is_new(splits: Path, dataset: DatasetJson) -> None:
    first = add_few_shot_folds(splits, dataset, numbers=[1, 2], draws=1)
    before = json.loads(splits.read_text())
    assert add_few_shot_folds(splits, dataset, numbers=[2, 1], draws=1) == first
    assert json.loads(splits.read_text()) == before
    more = add_few_shot_folds(splits, dataset, numbers=[2, 4], draws=2)
    assert {fold: more[fold] for fold in first} == first
    assert len(more) == 5
    assert set(before[6]["train"]) <= set(json.loads(splits.read_text())[7]["train"])


def test_every_subject_gives_a_case_before_one_gives_two(dataset: DatasetJson) -> None:
    for draw in range(5):
        order = nested_cases(CASES, dataset, draw)
        assert sorted(order) == CASES
        assert len({dataset.subject_of(case) for case in order[:6]}) == 6


def test_too_many_cases_are_refused(splits: Path, dataset: DatasetJson) -> None:
    before = splits.read_text()
    with pytest.raises(InputError, match="trains on 10 cases; 11 cannot be drawn"):
        add_few_shot_folds(splits, dataset, numbers=[1, 11], draws=1)
    assert splits.read_text() == before
    splits.write_text(json.dumps(json.loads(before)[:3]))
    with pytest.raises(InputError, match="has 3 folds"):
        add_few_shot_folds(splits, dataset, numbers=[1], draws=1)
    with pytest.raises(InputError, match="Run plan_and_preprocess first"):
        add_few_shot_folds(splits.with_name("other.json"), dataset, numbers=[1], draws=1)
