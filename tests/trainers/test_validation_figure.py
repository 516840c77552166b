"""What the figure of a validation shows, read from the drawn figure."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from nnmosaic.trainers.validation_figure import write_figure

SUMMARY: dict[str, Any] = {
    "labels": {"1": "liver", "2": "cost $a$ and $"},
    "mean": {"1": {}, "2": {}, "(1, 2)": {}},
    "per_source": {
        "A": {"mean": {"1": {"Dice": 0.912}}},
        "B": {"mean": {"2": {"Dice": float("nan")}}},
        "C": {"mean": {"(1, 2)": {"Dice": 0.5}}},
    },
    "not_annotated": {
        "A": {"2": {"predicted_ml": 1234.4}},
        "B": {"1": {"predicted_ml": 3.0, "recall": 0.456, "false_positive_ml": 1.24}},
        "C": {"1": {"predicted_ml": 0.0412}, "2": {"predicted_ml": 0.0}},
    },
    "warnings": [
        "Class 'liver' costs $ and says nothing.",
        "No source annotates every class.",
        *"cdef",
    ],
}


def test_each_cell_says_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    write_figure(SUMMARY, tmp_path, file_ending=".nii.gz")
    axes = drawn[0].axes[0]
    cells = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert cells == {
        (0, 0): "0.91", (0, 1): "recall 0.46\nFP 1.2 mL", (0, 2): "0.041 mL",
        (1, 0): "1234 mL", (1, 1): "absent", (1, 2): "0 mL",
        (2, 2): "0.50",
    }  # fmt: skip
    hatched = [(int(p.get_y()), int(p.get_x())) for p in axes.patches if p.get_hatch()]
    assert hatched == [(0, 1), (0, 2), (1, 0), (1, 2)]
    names = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    assert names == ["liver", "cost $a$ and $", "liver + cost $a$ and $"]
    below = [*SUMMARY["warnings"][:4], "... and 2 more in summary.json"]
    assert axes.get_xlabel().split("\n") == below
    assert [path.name for path in tmp_path.iterdir()] == ["validation.png"]
    assert (tmp_path / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_is_never_taken_for_a_label_map(tmp_path: Path) -> None:
    write_figure(SUMMARY, tmp_path, file_ending=".png")
    assert [path.name for path in tmp_path.iterdir()] == ["validation.svg"]
    assert "<svg" in (tmp_path / "validation.svg").read_text()
