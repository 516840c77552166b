import json
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnmosaic.data_conversion.dataset_json import DatasetJson, parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.splits import ensure_splits, make_splits


def dataset(**extra: Any) -> DatasetJson:
    return parse_dataset_json(
        {
            "channel_names": {"0": "T1"},
            "labels": {"background": 0, "a": 1, "b": 2},
            "file_ending": ".nii.gz",
            **extra,
        }
    )


CASES = [f"{source}_{i:02d}" for source, n in (("A", 20), ("B", 10)) for i in range(n)]
SOURCES = {
    "A": {"pattern": "^A_", "annotated": ["a"]},
    "B": {"pattern": "^B_", "annotated": ["b"]},
}


def test_a_plain_dataset_gets_nnunets_own_folds() -> None:
    assert make_splits(CASES, dataset()) == generate_crossval_split(sorted(CASES), 12345, 5)


def test_folds_keep_subjects_together_and_sources_balanced() -> None:
    subjects = {case: f"{case[0]}{int(case[2:]) // 2}" for case in CASES}
    declared = dataset(subjects=subjects, partial_labels={"sources": SOURCES})
    splits = make_splits(CASES, declared)
    assert sorted(case for fold in splits for case in fold["val"]) == sorted(CASES)
    for fold in splits:
        assert set(fold["train"]) | set(fold["val"]) == set(CASES)
        people = [{subjects[c] for c in fold[part]} for part in ("train", "val")]
        assert not people[0] & people[1]
        assert [sum(c.startswith(s) for c in fold["val"]) for s in "AB"] == [4, 2]


def test_folds_repeat() -> None:
    declared = dataset(partial_labels={"sources": SOURCES})
    assert make_splits(CASES, declared) == make_splits(CASES[::-1], declared)


def test_a_source_smaller_than_the_number_of_folds_is_spread() -> None:
    cases = [case for case in CASES if case.startswith("A")] + ["B_00", "B_01"]
    splits = make_splits(cases, dataset(partial_labels={"sources": SOURCES}))
    assert max(sum(c.startswith("B") for c in fold["val"]) for fold in splits) == 1


def test_too_few_subjects_are_refused() -> None:
    with pytest.raises(InputError, match="4 subjects cannot make 5 folds"):
        make_splits(CASES[:4], dataset())


def test_an_existing_file_is_never_touched(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text("[]")
    ensure_splits(path, CASES, dataset())
    assert path.read_text() == "[]"
    path.unlink()
    ensure_splits(path, CASES, dataset())
    assert len(json.loads(path.read_text())) == 5
