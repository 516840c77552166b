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


def test_rows_that_train_the_same_share_a_result() -> None:
    path = self_disambiguation.result_path
    half, fused = "one model per source, half the budget each", "one model per source, fused"
    assert path("sparse", "oracle", 1) == path("disjoint", "oracle", 1)
    assert path("disjoint_longer", half, 1) == path("disjoint", fused, 1)
    assert path("disjoint_longer", "oracle", 1) != path("disjoint", "oracle", 1)
    assert path("disjoint", half, 1) != path("disjoint", fused, 1)
