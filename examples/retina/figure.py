"""One image, its observers, the masks that are predicted for them, and where they may differ."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from skimage import io

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ((1.0, 0.9, 0.0), (0.0, 0.9, 1.0), (1.0, 1.0, 1.0))
"""Of pixels in the mask of the first observer only, of the second only, and of both."""
WINDOW = 220
"""Pixels in the middle of the image that are shown."""


def draw(test: Path, predictions: Path, path: Path) -> None:
    """Write a PNG with four panels of the first test image.

    Parameters
    ----------
    test : Path
        Folder with ``images`` and, under ``raters``, a folder of masks for each of two observers.
    predictions : Path
        As written by ``nnmosaic predict`` with ``--raters all --samples N --uncertainty``.
    """
    image_path = min((test / "images").glob("*_0000.png"))
    case = image_path.name.removesuffix("_0000.png")
    observers = sorted(folder.name for folder in (predictions / "raters").iterdir())
    image = _window(io.imread(image_path))
    drawn = [_window(io.imread(test / "raters" / name / f"{case}.png")) > 0 for name in observers]
    own = [_window(io.imread(predictions / "raters" / n / f"{case}.png")) > 0 for n in observers]
    entropy = _window(io.imread(predictions / "entropy" / f"{case}.tif"))
    mpl.rcdefaults()  # nnU-Net's training curves leave large letters
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.3), layout="constrained")
    samples = len(list((predictions / "samples").iterdir()))
    titles = ("image", "observers", "predicted for them", f"entropy of {samples} samples")
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title)
        panel.axis("off")
    axes[0].imshow(image, cmap="gray")
    for panel, masks in zip(axes[1:3], (drawn, own), strict=True):
        panel.imshow(image, cmap="gray")
        panel.imshow(overlay(*masks))
        for label, colour in zip((*observers, "both"), COLOURS, strict=True):
            name = label if label == "both" else f"{label} only"
            panel.plot([], [], "s", color=colour, label=name)
        panel.legend(loc="lower right", fontsize="small", facecolor="0.4", labelcolor="white")
    shown = axes[3].imshow(entropy, cmap="magma", vmin=0, vmax=np.log(2))
    figure.colorbar(shown, ax=axes[3], label="nats")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def overlay(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return colours and opacities, shape (Y, X, 4), of two masks, shape (Y, X), bool."""
    colours = np.zeros((*first.shape, 4))
    parts = (first & ~second, second & ~first, first & second)
    for mask, colour in zip(parts, COLOURS, strict=True):
        colours[mask] = (*colour, 0.8)
    return colours


def _window(array: np.ndarray) -> np.ndarray:
    """Return the middle of an image, axes (y, x)."""
    y, x = (max(0, (n - WINDOW) // 2) for n in array.shape)
    return array[y : y + WINDOW, x : x + WINDOW]
