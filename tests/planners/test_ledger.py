from pathlib import Path

from nnmosaic.data_conversion.raw_dataset import Case
from nnmosaic.planners.ledger import Ledger, signature


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


def test_a_replaced_file_changes_the_signature(tmp_path: Path) -> None:
    image = tmp_path / "a_0000.nii.gz"
    image.write_bytes(b"1")
    case = Case("a", (image,), None)
    before = signature(case)
    assert signature(case) == before
    image.write_bytes(b"12")
    assert signature(case) != before
