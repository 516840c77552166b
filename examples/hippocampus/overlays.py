"""Overlay figures: reference and prediction as contours on the slice with the most foreground."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import SimpleITK

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("tab:orange", "tab:cyan", "tab:green", "tab:pink")


def draw_overlays(test: Path, predictions: Path, output: Path) -> None:
    """Write one PNG per case: axial, coronal and sagittal slices through the reference's middle.

    Solid contours are the reference, dashed ones the prediction.

    Parameters
    ----------
    test : Path
        Folder with ``images`` and ``labels``.
    predictions : Path
        Folder with the predicted label maps.
    """
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted((test / "labels").glob("*.nii.gz")):
        case = path.name.removesuffix(".nii.gz")
        image = _array(test / "images" / f"{case}_0000.nii.gz")
        _draw(case, image, _array(path), _array(predictions / path.name), output / f"{case}.png")


def _array(path: Path) -> np.ndarray:
    """Return the voxels, axes (z, y, x)."""
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def _draw(
    case: str, image: np.ndarray, reference: np.ndarray, predicted: np.ndarray, path: Path
) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4))
    for axis, (plot, title) in enumerate(zip(axes, ("axial", "coronal", "sagittal"), strict=True)):
        others = tuple(a for a in range(3) if a != axis)
        best = int(np.argmax((reference > 0).sum(others)))
        plot.imshow(np.take(image, best, axis), cmap="gray", origin="lower")
        for labels, style in ((reference, "solid"), (predicted, "dashed")):
            plane = np.take(labels, best, axis)
            for value in range(1, int(reference.max()) + 1):
                if (plane == value).any():
                    colour = COLOURS[(value - 1) % len(COLOURS)]
                    plot.contour(
                        plane == value, [0.5], colors=colour, linestyles=style, linewidths=1
                    )
        plot.set_title(f"{title}, slice {best}", fontsize=8)
        plot.axis("off")
    figure.suptitle(f"{case}: reference solid, prediction dashed", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
