"""A validation at a glance: classes x sources, as a figure."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from nnmosaic.data_conversion.atomic_write import replacing
from nnmosaic.trainers.masked_evaluation import names_of

CELL = (1.1, 0.45)
"""Width and height of a cell in inches."""
CLASS_WIDTH, SOURCE_WIDTH = 28, 13
"""Characters of a name in one line."""
WARNING_WIDTH, MAX_WARNINGS = 70, 4
DARK = 0.6
"""Dice below which the colour of a cell needs white text."""


def write_figure(summary: Mapping[str, Any], folder: Path, *, file_ending: str) -> None:
    """Draw Dice where a class was annotated, elsewhere recall and false positives (FP).

    Without a full reference these are unknown: the predicted volume then. Warnings stand below.

    The file is ``validation.png``, or ``validation.svg`` where label maps are PNG files: nnU-Net
    would take it for a prediction.

    Parameters
    ----------
    summary : mapping
        As `nnmosaic.trainers.masked_evaluation.evaluate_folder` returns it for a dataset with
        ``partial_labels``.
    file_ending : str
        Of the label maps.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    names, sources = names_of(summary), list(summary["per_source"])
    figure = Figure(figsize=(CELL[0] * len(sources), CELL[1] * len(names)))
    axes = figure.add_axes((0, 0, 1, 1))
    colours = ScalarMappable(Normalize(0, 1), "viridis")
    for row, key in enumerate(names):
        for column, source in enumerate(sources):
            _draw_cell(axes, colours, (column, row), summary, (key, source))
    axes.set(xlim=(0, len(sources)), ylim=(len(names), 0))
    axes.set_xticks(
        [column + 0.5 for column in range(len(sources))],
        [fill(source, SOURCE_WIDTH) for source in sources],
        fontsize="small",
        parse_math=False,  # a name may hold dollar signs
    )
    axes.set_yticks(
        [row + 0.5 for row in range(len(names))],
        [fill(name, CLASS_WIDTH) for name in names.values()],
        parse_math=False,
    )
    axes.set_xticks(range(len(sources)), minor=True)
    axes.set_yticks(range(len(names)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.set_title(
        "Number alone: Dice.  Hatched: not annotated;\n"
        "recall and false positives (FP) per case on full references,\n"
        "or predicted volume per case",
        fontsize="medium", loc="left",
    )  # fmt: skip
    warnings = [fill(warning, WARNING_WIDTH) for warning in summary["warnings"][:MAX_WARNINGS]]
    if (more := len(summary["warnings"]) - MAX_WARNINGS) > 0:
        warnings.append(f"... and {more} more in summary.json")
    axes.set_xlabel("\n".join(warnings), fontsize="small", loc="left", parse_math=False)
    bar = figure.add_axes((1 + 0.2 / figure.get_figwidth(), 0, 0.12 / figure.get_figwidth(), 1))
    figure.colorbar(colours, cax=bar, label="Dice")
    file_type = "svg" if file_ending.lower() == ".png" else "png"
    with replacing(folder / f"validation.{file_type}") as temporary:
        figure.savefig(temporary, format=file_type, dpi=150, bbox_inches="tight")


def volume_text(volume: float) -> str:
    """Return a volume in two digits, so that a small one is not mistaken for none."""
    return f"{volume:.0f}" if volume >= 10 else f"{volume:.2g}"


def _draw_cell(
    axes: Any,
    colours: Any,
    corner: tuple[int, int],
    summary: Mapping[str, Any],
    cell: tuple[str, str],
) -> None:
    """Draw the cell of a class and a source; nothing where no case tells anything."""
    from matplotlib.patches import Rectangle

    key, source = cell
    text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": "small"}
    centre = (corner[0] + 0.5, corner[1] + 0.5)
    scored = summary["per_source"][source]["mean"].get(key)
    if scored is not None:
        dice = scored["Dice"]
        absent = dice != dice  # NaN: neither labelled nor predicted in any case
        colour = "white" if absent else colours.to_rgba(dice)
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, linewidth=0))
        ink = "white" if dice < DARK else "black"
        axes.text(*centre, "absent" if absent else f"{dice:.2f}", color=ink, **text)
    elif (other := summary["not_annotated"].get(source, {}).get(key)) is not None:
        axes.add_patch(
            Rectangle(corner, 1, 1, facecolor="0.95", edgecolor="0.75", hatch="////", linewidth=0)
        )
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(*centre, _known(other), bbox=box, **text)


def _known(other: Mapping[str, Any]) -> str:
    """Return what is known of a class that the source does not annotate."""
    if "recall" in other:
        false = volume_text(other["false_positive_ml"])
        return f"recall {other['recall']:.2f}\nFP {false} mL"
    return f"{volume_text(other['predicted_ml'])} mL"
