import json
from pathlib import Path
from typing import Any

import pytest

from nnmosaic.data_conversion.dataset_json import (
    parse_dataset_json,
    partial_labels_content,
    read_dataset_json,
)
from nnmosaic.data_conversion.errors import InputError

LABELS = {"background": 0, "spleen": 1, "kidney_right": 2, "kidney_left": 3, "liver": 4}
ALL = (0, 1, 2, 3, 4)


def content(sources: dict[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    if sources is not None:
        base["partial_labels"] = {"sources": sources, **extra}
    return base


SOURCES = {
    "siteA": {"pattern": "^A_", "annotated": "all"},
    "siteB": {"pattern": "^B_", "annotated": ["liver"]},
    "siteC": {
        "cases": ["C_1"],
        "annotated": ["spleen", "liver"],
        "merged": {"kidney_right": ["kidney_right", "kidney_left"]},
    },
}


def test_representatives_of_complete_partial_and_merged_sources() -> None:
    dataset = parse_dataset_json(content(SOURCES))
    tables = {c: dataset.source_of(c).representatives(LABELS) for c in ("A_1", "B_1", "C_1")}
    assert tables == {"A_1": (0, 1, 2, 3, 4), "B_1": (0, 0, 0, 0, 4), "C_1": (0, 1, 2, 2, 4)}
    assert dataset.source_of("A_1").representatives(LABELS) == ALL
    assert dataset.source_of("C_1").representatives(LABELS) != ALL


def test_legal_values_follow_the_source_and_include_ignore() -> None:
    with_ignore = {**content(SOURCES), "labels": {**LABELS, "ignore": 5}}
    dataset = parse_dataset_json(with_ignore)
    assert dataset.legal_values("B_1") == {0, 4, 5}
    assert dataset.legal_values("C_1") == {0, 1, 2, 4, 5}
    assert dataset.ignore_label == 5


def test_case_override_keeps_its_source() -> None:
    override = {"B_7": {"annotated": ["liver", "spleen"]}}
    source = parse_dataset_json(content(SOURCES, cases=override)).source_of("B_7")
    assert (source.source, source.annotated) == ("siteB", ("liver", "spleen"))


def test_case_list_goes_before_pattern() -> None:
    sources = {**SOURCES, "siteD": {"cases": ["B_9"], "annotated": "all"}}
    assert parse_dataset_json(content(sources)).source_of("B_9").source == "siteD"


def test_unmatched_case_is_an_error_unless_declared_complete() -> None:
    with pytest.raises(InputError, match="'X_1' belongs to no source"):
        parse_dataset_json(content(SOURCES)).source_of("X_1")
    dataset = parse_dataset_json(content(SOURCES, unmatched="complete"))
    assert dataset.source_of("X_1").representatives(LABELS) == ALL


def test_case_that_matches_two_patterns_is_an_error() -> None:
    sources = {**SOURCES, "siteE": {"pattern": "_1$", "annotated": "all"}}
    with pytest.raises(InputError, match="several sources"):
        parse_dataset_json(content(sources)).source_of("B_1")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"pattern": "^B", "annotated": ["heart"]}, "unknown class 'heart'"),
        ({"pattern": "^B", "annotated": ["background"]}, "unknown class 'background'"),
        (
            {"pattern": "^B", "annotated": ["liver"], "merged": {"liver": ["liver", "spleen"]}},
            "'liver' in two groups",
        ),
        (
            {
                "pattern": "^B",
                "annotated": [],
                "merged": {"liver": ["liver", "spleen"], "kidney_left": ["kidney_left", "spleen"]},
            },
            "'spleen' in two groups",
        ),
        (
            {"pattern": "^B", "annotated": [], "merged": {"spleen": ["liver", "kidney_left"]}},
            "must be one of at least two members",
        ),
        ({"annotated": ["liver"]}, "neither by"),
        ({"pattern": "^B"}, 'must say what is "annotated"'),
        ({"pattern": "(", "annotated": ["liver"]}, "no regular expression"),
        ({"pattern": 7, "annotated": ["liver"]}, "no regular expression"),
        ({"pattern": "^B", "annotated": "liver"}, "\"annotated\".* must be a list .*got 'liver'"),
        ({"cases": "B_1", "annotated": "all"}, "'bad': \"cases\" must be a list of names"),
        ({"cases": [1], "annotated": "all"}, r"must be a list of names.*got \[1\]"),
        ({"cases": [], "annotated": [], "merged": ["liver"]}, '"merged" must map the label'),
        (
            {"cases": [], "annotated": [], "merged": {"liver": "liver"}},
            "merged 'liver' must be a list of names",
        ),
        ({"cases": [], "annotated": [], "modalty": "CT"}, "unknown key 'modalty'. Known are anno"),
        ({"cases": [], "annotated": [], "modality": ["CT"]}, '"modality" must be a word'),
    ],
)
def test_t20_wrong_sources_are_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_dataset_json(content({"siteA": SOURCES["siteA"], "bad": source}))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"cases": ["B_1"]}, '"cases" of partial_labels must map case names'),
        ({"unmached": "complete"}, "partial_labels has the unknown key 'unmached'"),
        ({"cases": {"B_1": {"annotated": "liver"}}}, "case 'B_1': \"annotated\""),
        ({"cases": {"B_1": {"annotated": [], "pattern": "B"}}}, "'B_1' has the unknown key"),
    ],
)
def test_slips_outside_of_the_sources_are_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_dataset_json(content(SOURCES, **extra))


def test_what_is_written_of_sources_is_read_again() -> None:
    source = {**SOURCES["siteC"], "modality": "MR"}
    dataset = parse_dataset_json(content({"siteA": SOURCES["siteA"], "siteC": source}))
    written = partial_labels_content({"siteA": ["A_1"], "siteC": ["C_1"]}, dataset.sources())
    assert written["sources"]["siteC"] == source
    assert "modality" not in written["sources"]["siteA"]
    again = parse_dataset_json({**content(), "partial_labels": written})
    assert again.sources() == dataset.sources()


def test_t20_a_class_that_no_source_tells_from_background_is_refused() -> None:
    with pytest.raises(InputError, match="no source tells 'spleen' from 'background'"):
        parse_dataset_json(content({"b": SOURCES["siteB"]}))


def test_t20_two_classes_that_are_only_ever_merged_are_refused() -> None:
    with pytest.raises(InputError, match="no source tells 'kidney_left' from 'kidney_right'"):
        parse_dataset_json(content({"c": SOURCES["siteC"]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"background": 0}}, "no class besides the background"),
        ({"labels": None}, "must map names to integers"),
        ({"labels": {"background": 0, "a": 2}}, "without gaps"),
        ({"labels": {"background": 0, "ignore": 1, "a": 2}}, "must be the highest label"),
        ({"labels": {"background": 0, "a": "1"}}, "must be an integer"),
        ({"channel_names": {}}, "channel_names"),
        ({"file_ending": "nii"}, "file_ending"),
        ({"subjects": ["a"]}, "subjects"),
    ],
)
def test_wrong_datasets_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_dataset_json({**content(), **change})


def test_regions_are_accepted_alone_and_refused_with_sources() -> None:
    regions = {"background": 0, "whole": [1, 2], "core": 2}
    assert parse_dataset_json({**content(), "labels": regions}).has_regions
    with pytest.raises(InputError, match="overlapping regions"):
        parse_dataset_json({**content(SOURCES), "labels": regions})


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"labels": ')
    with pytest.raises(InputError, match=r"dataset\.json is not valid JSON"):
        read_dataset_json(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match="must hold a JSON object, got list"):
        read_dataset_json(tmp_path)


def test_full_labels_are_the_labels_unless_declared() -> None:
    with_ignore = {**content(), "labels": {"background": 0, "liver": 1, "ignore": 2}}
    assert parse_dataset_json(with_ignore).full_labels == {"background": 0, "liver": 1}
    declared = parse_dataset_json({**with_ignore, "full_labels": LABELS})
    assert declared.full_labels == LABELS
    assert declared.labels == {"background": 0, "liver": 1}


@pytest.mark.parametrize(
    ("full_labels", "message"),
    [
        ([], r'd\.json: "full_labels" must map names'),
        ({"background": 0}, "full_labels name no class"),
        ({"background": 0, "a": 2}, "without gaps"),
        ({"background": 0, "a": 1, "ignore": 2}, 'one integer each, without "ignore"'),
        ({"background": 0, "a": [1, 2]}, "full_labels must be exclusive classes"),
    ],
)
def test_impossible_full_labels_are_refused(full_labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_dataset_json({**content(), "full_labels": full_labels}, where="d.json")
