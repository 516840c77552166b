"""The benchmark of self-disambiguation: what its page says."""

from pathlib import Path

import pytest

from benchmarks import self_disambiguation


@pytest.mark.parametrize(
    ("setting", "steps"),
    [("disjoint", 800), ("chaos", 4800), ("chaos_longer", 9600), ("chaos_phases", 14400)],
)
def test_a_setting_says_how_many_steps_it_has(
    setting: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_disambiguation, "FOLDER", tmp_path)
    page = self_disambiguation.setting_table(setting, [0], {})
    assert f", {steps} steps.\n" in page
