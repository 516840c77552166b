import os
from pathlib import Path

from nnmosaic.data_conversion.raw_dataset import Case
from nnmosaic.planners.ledger import Ledger, configuration_digest, content_digest, file_times


def test_finished_and_missing_cases(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.missing() == []
    ledger.begin("digest", ["a", "b", "c"], {"a": "1"})
    ledger.add("b", "2")
    assert ledger.finished("digest") == {"a": "1", "b": "2"}
    assert ledger.finished("another digest") == {}
    assert ledger.missing() == ["c"]


def test_a_line_that_a_kill_cut_off_is_not_believed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.begin("digest", ["a", "b"], {})
    ledger.add("a", "1")
    ledger.add("b", "2")
    text = ledger.path.read_text()
    ledger.path.write_text(text[:-9])
    assert ledger.finished("digest") == {"a": "1"}
    assert ledger.missing() == ["b"]


def test_a_replaced_file_changes_the_digest_and_a_touched_one_only_the_times(
    tmp_path: Path,
) -> None:
    image, label = tmp_path / "a_0000.nii.gz", tmp_path / "a.nii.gz"
    image.write_bytes(b"1")
    label.write_bytes(b"2")
    case = Case("a", (image,), label)
    digest, times = content_digest(case), file_times(case)
    os.utime(label, (1, 1))
    assert content_digest(case) == digest
    assert file_times(case) != times
    image.write_bytes(b"12")
    label.write_bytes(b"")
    assert content_digest(case) != digest  # a byte that moved from one file to the other


INTENSITIES = "foreground_intensity_properties_per_channel"
PLANS = {
    "configurations": {
        "3d_fullres": {"data_identifier": "x", "spacing": [1, 1, 1], "batch_size": 2},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        "other": {"inherits_from": "3d_fullres", "spacing": [2, 1, 1]},
    },
    INTENSITIES: {},
    "transpose_forward": [0, 1, 2],
    "image_reader_writer": "SimpleITKIO",
}


def test_the_digest_follows_the_arrays_and_nothing_else(tmp_path: Path) -> None:
    digest = configuration_digest(PLANS, "3d_fullres", {"labels": {"a": 1}})
    assert configuration_digest(PLANS, "3d_cascade_fullres", {"labels": {"a": 1}}) == digest
    assert configuration_digest(PLANS, "other", {"labels": {"a": 1}}) != digest
    for scheme, depends in (("CTNormalization", True), ("ZScoreNormalization", False)):
        schemes = {"normalization_schemes": [scheme]}
        configurations = {"x": {**PLANS["configurations"]["3d_fullres"], **schemes}}
        one, other = (
            {**PLANS, "configurations": configurations, INTENSITIES: {"0": {"mean": mean}}}
            for mean in (1.0, 2.0)
        )
        digests = {configuration_digest(plans, "x", {"labels": {"a": 1}}) for plans in (one, other)}
        assert len(digests) == 1 + depends
    assert configuration_digest(PLANS, "3d_fullres", {"labels": {"a": 2}}) != digest
    larger = {**PLANS["configurations"]["3d_fullres"], "batch_size": 4}
    changed = {**PLANS, "configurations": {"3d_fullres": larger}}
    assert configuration_digest(changed, "3d_fullres", {"labels": {"a": 1}}) == digest
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.fits(digest)  # made by nnU-Net itself: nothing is known
    ledger.begin(digest, ["x"], {})
    assert ledger.fits(digest)
    assert not ledger.fits("another")
