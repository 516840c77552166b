"""Make the embedded example of two observers from CHASE_DB1: left eyes of 11 children, half size.

``python examples/retina/make_example.py --data CHASE_FOLDER --output examples/retina`` writes
images and a folder of masks per observer; the last child is for testing.
"""

import argparse
from pathlib import Path

import numpy as np
from skimage import io
from skimage.measure import block_reduce

OBSERVERS = {"first": "1stHO", "second": "2ndHO"}
CHILDREN = (1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14)
"""The others are kept aside for measurements."""
GREEN = 1
"""The channel in which vessels are darkest against the retina."""


def build(data: Path, output: Path) -> None:
    """Write the example.

    Parameters
    ----------
    data : Path
        Folder with images (Image_NNL.jpg), labels_1stHO and labels_2ndHO (Image_NNL_1stHO.png).
    """
    for child in CHILDREN:
        path = data / "images" / f"Image_{child:02d}L.jpg"
        folder = output / ("test" if child == CHILDREN[-1] else "training")
        green = io.imread(path)[..., GREEN]
        _write(_half(green).round(), folder / "images" / f"{path.stem}_0000.png")
        for name, end in OBSERVERS.items():
            drawn = io.imread(data / f"labels_{end}" / f"{path.stem}_{end}.png") > 0
            _write(_half(drawn) >= 0.5, folder / "raters" / name / f"{path.stem}.png")


def _half(array: np.ndarray) -> np.ndarray:
    """Return the means of blocks of 2 x 2 pixels."""
    means: np.ndarray = block_reduce(array.astype(float), (2, 2), np.mean)
    return means


def _write(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    io.imsave(path, array.astype(np.uint8), check_contrast=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    build(options.data, options.output)
