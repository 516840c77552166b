"""An image, its raters, their personalised masks and the entropy map, as a figure for the docs.

``python -m benchmarks.rater_figure`` needs the finished run "chase, ours, fold 0, seed 0" of
``benchmarks.multi_rater``, and draws a case that it was not trained on.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.grid import use_workspace
from benchmarks.multi_rater import SECOND, SETTINGS
from benchmarks.report import ROOT
from nnmosaic.data_conversion.atomic_write import read_json, replacing

CHASE = SETTINGS["chase"].dataset
FIGURE = ROOT / "docs" / "images" / "many_raters.png"
COLOURS = {"first": (1.0, 0.9, 0.0), "second": (0.0, 0.9, 1.0), "both": (1.0, 1.0, 1.0)}
"""Of voxels in the mask of one observer only, and of both."""
SAMPLES = 16
WINDOW = 220
"""Pixels in the middle of the image that are shown."""


def predicted(work: Path) -> tuple[str, Path]:
    """Return a validation case, and the folder with everything that is predicted of it."""
    from nnmosaic.pipeline.predict import predict
    from nnmosaic.trainers.multi_rater.wanted_masks import ALL, WantedMasks

    (model,) = (work / "results" / "chase_ours_0" / CHASE).glob(f"{SECOND}__*")
    splits = read_json(work / "nnUNet_preprocessed" / CHASE / "splits_final.json")
    case = splits[0]["val"][0]
    images, output = work / "figure" / "images", work / "figure" / "predictions"
    images.mkdir(parents=True, exist_ok=True)
    target = images / f"{case}_0000.png"
    if not target.exists():
        target.symlink_to((work / "files" / CHASE / "images" / target.name).resolve())
    masks = WantedMasks((ALL,), SAMPLES, uncertainty=True)
    predict(images, output, model, folds=[0], masks=masks, device="cpu", skip_existing=True)
    return case, output


def draw(work: Path, path: Path) -> None:
    """Write the panels side by side."""
    from matplotlib.figure import Figure
    from skimage import io

    case, output = predicted(work)
    files = work / "files" / CHASE
    image = _window(io.imread(files / "images" / f"{case}_0000.png"))
    raters = tuple(SETTINGS["chase"].source.raters)
    drawn = {name: io.imread(files / name / f"{case}.png") for name in raters}
    own = {name: io.imread(output / "raters" / name / f"{case}.png") for name in raters}
    figure = Figure(figsize=(12, 3.3), layout="constrained")
    axes: Any = figure.subplots(1, 4)
    for panel, title in zip(
        axes, ("image", "raters", "their predicted masks", "entropy"), strict=True
    ):
        panel.set_title(title)
        panel.axis("off")
        panel.imshow(image)
    for panel, masks in ((axes[1], drawn), (axes[2], own)):
        panel.imshow(_overlay(*(_window(masks[name]) > 0 for name in raters)))
        for name, colour in COLOURS.items():
            panel.plot([], [], "s", color=colour, label=name if name == "both" else f"{name} only")
        panel.legend(loc="lower right", fontsize="small", facecolor="0.4", labelcolor="white")
    entropy = _window(io.imread(output / "entropy" / f"{case}.tif"))
    bar = axes[3].imshow(entropy, cmap="magma", vmin=0, vmax=np.log(2))
    figure.colorbar(bar, ax=axes[3], label="nats")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _overlay(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return colours and opacities, shape (Y, X, 4), of two masks."""
    overlay = np.zeros((*first.shape, 4))
    where = (first & ~second, second & ~first, first & second)
    for mask, colour in zip(where, COLOURS.values(), strict=True):
        overlay[mask] = (*colour, 0.8)
    return overlay


def _window(array: np.ndarray) -> np.ndarray:
    corner = [(n - WINDOW) // 2 for n in array.shape[:2]]
    return array[corner[0] : corner[0] + WINDOW, corner[1] : corner[1] + WINDOW]


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("benchmark_work/multi_rater"))
    work = parser.parse_args().work.resolve()
    use_workspace(work)
    draw(work, FIGURE)
    print(FIGURE)


if __name__ == "__main__":
    main()
