"""What clustering propagation costs: a click, and the memory of long volumes.

``python -m benchmarks.propagation_cost``: no data are needed, networks are untrained. Every
measurement of memory is a process of its own. Run nothing else meanwhile.
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median
from typing import Any

from benchmarks.report import footer, peak_gigabytes, provenance, table, write

SHAPE = (32, 256, 256)
CLASSES = 5
REPEATS = 5
FEATURES = {"CPU plan, from 8 features": 8, "nnU-Net's 32 features": 32}
SLICES = (40, 400)


def _network(features: int) -> Any:
    """Return a network like nnU-Net's plans for slices of 256 x 256."""
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from torch import nn

    from nnmosaic.trainers.clustering_propagation.network import ClusteringPropagationNet
    from nnmosaic.trainers.clustering_propagation.reach import LENGTHS

    torch.manual_seed(0)
    widths = [min(512, features * 2**stage) for stage in range(7)]
    unet = PlainConvUNet(
        1, 7, widths, nn.Conv2d, 3, [1, 2, 2, 2, 2, 2, 2], 2, CLASSES, 2, conv_bias=True,
        norm_op=nn.InstanceNorm2d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    unet.encoder.strides = [[stride, stride] for stride in (1, 2, 2, 2, 2, 2, 2)]
    network = ClusteringPropagationNet(unet, classes=CLASSES, regions=False, memory="gru").eval()
    for parameter in network.head.parameters():  # so that a click changes other slices, too
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.3)
    nn.init.constant_(network.head.presence[-1].bias, 2.0)
    network.head.reach.fill_(LENGTHS[-1])  # the worst case
    return network


def clicks(features: int) -> dict[str, float]:
    """Return median seconds of a first click and of one between anchors, features being there."""
    import torch

    from nnmosaic.trainers.clustering_propagation.interactive_volume import (
        InteractiveVolume,
        Marks,
    )
    from nnmosaic.trainers.clustering_propagation.volume_features import VolumeFeatures

    image = torch.randn(1, *SHAPE)
    kept = VolumeFeatures(
        _network(features), image, patch_size=SHAPE[1:], device=torch.device("cpu"),
        most_bytes=2**33,
    )  # fmt: skip
    start = time.perf_counter()
    volume = InteractiveVolume(kept, distance_mm=5.0, pixel_mm=1.0)
    automatic = time.perf_counter() - start

    def click(index: int) -> float:
        weights = torch.zeros(CLASSES, *SHAPE[1:])
        weights[2, 100:102, 120:122] = 1
        on = weights.bool()
        start = time.perf_counter()
        volume.logits(volume.add({index: Marks(weights, on, torch.zeros_like(on), on[2])}))
        return time.perf_counter() - start

    first = []
    for _ in range(REPEATS):
        first.append(click(16))
        volume.undo()
    volume.add({})
    click(4)
    click(28)
    between = []
    for _ in range(REPEATS):
        between.append(click(16))
        volume.undo()
    return {"automatic": automatic, "first": median(first), "between": median(between)}


def working_memory(slices: int) -> float:
    """Return GB that a prediction takes beside image and logits, with the CPU plan."""
    import torch

    from nnmosaic.trainers.clustering_propagation.predictor import PropagationPredictor

    predictor = PropagationPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"),
        allow_tqdm=False,
    )  # fmt: skip
    predictor.network = _network(min(FEATURES.values()))
    predictor.allowed_mirroring_axes = None
    predictor.configuration_manager = argparse.Namespace(patch_size=SHAPE[1:])
    image = torch.randn(1, slices, *SHAPE[1:])
    before = peak_gigabytes()
    logits = predictor.predict_sliding_window_return_logits(image)
    return peak_gigabytes() - before - logits.numel() * logits.element_size() / 2**30


def main() -> None:
    """Measure, write the tables and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, metavar="SLICES")
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(working_memory(options.memory)))
        return
    found: dict[str, Any] = {}
    seconds = []
    for name, features in FEATURES.items():
        took = found[name] = clicks(features)
        seconds.append([name, *(f"{took[kind]:.2f}" for kind in took)])
    gigabytes: dict[int, list[float]] = {slices: [] for slices in SLICES}
    for slices in SLICES * REPEATS:  # alternating
        command = [sys.executable, "-m", "benchmarks.propagation_cost", "--memory", str(slices)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        gigabytes[slices].append(json.loads(run.stdout.splitlines()[-1]))
    short, long = (median(gigabytes[slices]) for slices in SLICES)
    memory = [
        *(f"{median(of):.3f} ({min(of):.3f} to {max(of):.3f})" for of in gigabytes.values()),
        f"{long / short:.3f}",
    ]
    found["gigabytes"] = gigabytes
    source = provenance()
    size = " x ".join(map(str, (*SHAPE[1:], SHAPE[0])))
    text = (
        "# Cost of clustering propagation\n\nMade by `python -m benchmarks.propagation_cost`; "
        f"untrained networks, {CLASSES} classes, no mirroring.\n\n## Seconds on {size}\n\nA click "
        f"is the median of {REPEATS}, with cached features, until its logits are there; the first "
        "one may change all slices, the other one lies between anchors on slices 4 and 28.\n\n"
        + table(["network", "automatic", "first click", "click between anchors"], seconds)
        + "\n\n## Memory of a prediction beside image and logits, GB, CPU plan\n\n"
        f"Medians of {REPEATS} processes each, with the smallest and the largest.\n\n"
        + table([*(f"{n} slices" for n in SLICES), "ratio"], [memory])
        + f"\n\n{footer(source)}\n"
    )
    write("propagation_cost", {**source, "measured": found}, text)
    print(text)


if __name__ == "__main__":
    main()
