"""Masked input, student, teacher and reference of one case, as a figure for the docs.

``python -m benchmarks.context_figure`` needs a finished run of context reconstruction in
``benchmarks.context_reconstruction``, and draws a case that it was not trained on.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.context_reconstruction import HIPPOCAMPUS, OURS
from benchmarks.grid import use_workspace
from benchmarks.report import ROOT
from nnmosaic.data_conversion.atomic_write import read_json, replacing

RUN = "context__few4__teacher_as_meant__kl__0__0"
FIGURE = ROOT / "docs" / "images" / "context_reconstruction.png"
COLOURS = ("#e69f00", "#56b4e9")
RATIO = 0.4


def panels(work: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return title -> image and label map, 2D, of the plane with most foreground."""
    import torch
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    from nnmosaic.trainers.context_reconstruction.masking import (
        block_size,
        draw_mask,
        to_voxels,
    )
    from nnmosaic.trainers.context_reconstruction.readout import cut_patch, foreground_centre
    from nnmosaic.trainers.ema_teacher import EXPORTED
    from nnmosaic.trainers.generator import generator_of
    from nnmosaic.trainers.predictor import load_predictor

    (model,) = (work / "runs" / RUN).glob(f"*/{OURS}__*")
    predictors: dict[str, Any] = {
        name: load_predictor(
            model, folds=None, checkpoint=file, device=torch.device("cpu"), step_size=0.5,
            mirroring=False,
        )
        for name, file in (("student", "checkpoint_final.pth"), ("teacher", EXPORTED))
    }  # fmt: skip
    manager = predictors["student"].configuration_manager
    preprocessed = work / "nnUNet_preprocessed" / HIPPOCAMPUS
    case = read_json(preprocessed / "splits_final.json")[0]["val"][0]
    folder = str(preprocessed / manager.data_identifier)
    data, labels, _, _ = infer_dataset_class(folder)(folder, [case]).load_case(case)
    patch = manager.patch_size
    label = np.asarray(labels[0])
    centre = foreground_centre(label, len(COLOURS) + 1)
    image, patch_labels = cut_patch(np.asarray(data), label, centre, patch)
    target = patch_labels.numpy()
    block = block_size(patch, manager.pool_op_kernel_sizes)
    grid = [n // b for n, b in zip(patch, block, strict=True)]
    cells = draw_mask(grid, 1, ratio=RATIO, kind="block", generator=generator_of(1))
    masked = image.masked_fill(to_voxels(cells, block), 0)

    def found(name: str, x: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            labels: np.ndarray = predictors[name].network.eval()(x)[0].argmax(0).numpy()
        return labels

    plane = int((target > 0).sum((1, 2)).argmax())
    volumes = {
        "masked input": (masked, np.zeros_like(target)),
        "student, on the masked input": (masked, found("student", masked)),
        "teacher, on the whole patch": (image, found("teacher", image)),
        "reference": (image, target),
    }
    return {
        title: (volume[0, 0, plane].numpy(), label[plane])
        for title, (volume, label) in volumes.items()
    }


def draw(shown: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Write the panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(shown), 3.6), layout="constrained")
    for axes, (title, (image, label)) in zip(
        figure.subplots(1, len(shown)), shown.items(), strict=True
    ):
        axes.imshow(image, cmap="gray", interpolation="nearest")
        for value, colour in enumerate(COLOURS, start=1):
            if (label == value).any():
                axes.contour(label == value, levels=[0.5], colors=[colour], linewidths=2)
        axes.set_title(title)
        axes.axis("off")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("benchmark_work/self_disambiguation"))
    work = parser.parse_args().work.resolve()
    use_workspace(work)
    draw(panels(work), FIGURE)
    print(FIGURE)


if __name__ == "__main__":
    main()
