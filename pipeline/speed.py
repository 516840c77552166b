"""How fast a plan trains on this machine: a few real steps, in a process of their own.

So the memory is that of a training, and nothing of it stays in the command. Run as a module: the
request comes as JSON from standard input, the answer is the last line of standard output.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.exit_codes import BAD_INPUT
from nnmosaic.planners.cpu_budget import Speed

WARM_UP_STEPS = 3
SECONDS_OF_STEPS = 10.0
MIN_STEPS = 5
VALIDATION_STEPS = 3
FORWARD_PASSES = 3


def measure_speed(
    plans: dict[str, Any],
    configuration: str,
    trainer: str,
    preprocessed: Path,
    device: str | None = "cpu",
) -> Speed:
    """Train for some seconds on the preprocessed data and return the times.

    Parameters
    ----------
    preprocessed : Path
        The dataset's folder in ``nnUNet_preprocessed``.
    device : str, optional
        Default: that of the CPU; None: CUDA where there is one.

    Raises
    ------
    InputError
        If the trainer refuses the data.
    RuntimeError
        If a step fails, with the last lines of its output.
    """
    request = {
        "plans": plans,
        "configuration": configuration,
        "trainer": trainer,
        "preprocessed": str(preprocessed),
        "device": device,
    }
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "nnmosaic.pipeline.speed"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - start
    if run.returncode == BAD_INPUT:
        raise InputError(run.stderr.strip())
    if run.returncode < 0:
        cause = signal.Signals(-run.returncode).name
        raise RuntimeError(
            f"Measuring steps of {configuration} was ended by {cause}; most often the memory was "
            "full. Plan for less memory, or end other programs."
        )
    if run.returncode != 0:
        raise RuntimeError(f"A training step of the new plans fails:\n{run.stderr[-1500:]}")
    answer = json.loads(run.stdout.splitlines()[-1])
    measuring = answer.pop("measuring")
    return Speed(to_start=wall - measuring, **answer)


def _measure(request: dict[str, Any], results: str) -> dict[str, float]:
    import os

    os.environ["nnUNet_results"] = results
    os.environ["nnUNet_preprocessed"] = str(Path(request["preprocessed"]).parent)
    import torch

    from nnmosaic.data_conversion.atomic_write import read_json
    from nnmosaic.pipeline.device import choose_device
    from nnmosaic.trainers.lookup import trainer_class

    device = choose_device(request["device"])  # with the threads and loaders of a training

    dataset_json = read_json(Path(request["preprocessed"]) / "dataset.json")
    trainer = trainer_class(request["trainer"])(
        {**request["plans"], "continue_training": False},
        request["configuration"],
        "all",
        dataset_json,
        device,
    )
    trainer.on_train_start()
    start = time.perf_counter()
    _epoch(trainer, WARM_UP_STEPS, 0.0, 1)
    times = _epoch(trainer, MIN_STEPS, SECONDS_OF_STEPS, VALIDATION_STEPS)
    times["per_validation_case"] = _seconds_per_case(trainer)
    trainer.on_train_end()
    if device.type == "cuda":
        times["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    else:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        times["memory_gb"] = peak / (2**30 if sys.platform == "darwin" else 2**20)
    return {**times, "measuring": time.perf_counter() - start}


def _epoch(trainer: Any, steps: int, seconds: float, validation_steps: int) -> dict[str, float]:
    """Train one epoch of at least so many steps and seconds and return what its parts took."""
    import torch

    start = time.perf_counter()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    outputs: list[dict[str, Any]] = []
    first = time.perf_counter()
    while len(outputs) < steps or time.perf_counter() - first < seconds:
        outputs.append(trainer.train_step(next(trainer.dataloader_train)))
    training = time.perf_counter() - first
    trainer.on_train_epoch_end(outputs)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        first = time.perf_counter()
        results = [
            trainer.validation_step(next(trainer.dataloader_val)) for _ in range(validation_steps)
        ]
        validation = time.perf_counter() - first
        trainer.on_validation_epoch_end(results)
    trainer.on_epoch_end()
    return {
        "per_step": training / len(outputs),
        "per_validation_step": validation / validation_steps,
        "per_epoch": time.perf_counter() - start - training - validation,
    }


def _seconds_per_case(trainer: Any) -> float:
    """Return the time to predict an image of median size, with mirroring."""
    import torch
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

    configuration = trainer.configuration_manager
    patch = tuple(configuration.patch_size)
    image = [round(n) for n in trainer.plans_manager.original_median_shape_after_transp]
    median = [round(n) for n in configuration.median_image_size_in_voxels]
    slices = image[0] if len(patch) == 2 else 1
    padded = [max(n, p) for n, p in zip(median, patch, strict=True)]
    tiles = slices
    for positions in compute_steps_for_sliding_window(tuple(padded), patch, 0.5):
        tiles *= len(positions)
    mirrorings = 2 ** len(trainer.inference_allowed_mirroring_axes or ())
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    data = torch.zeros(1, trainer.num_input_channels, *patch, device=trainer.device)
    with torch.inference_mode():
        seconds = _fastest(lambda: trainer.network(data))
    return float(tiles * mirrorings * seconds)


def _fastest(action: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(FORWARD_PASSES):
        start = time.perf_counter()
        action().cpu()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    try:
        with tempfile.TemporaryDirectory() as results:
            answer = _measure(request, results)
    except InputError as error:
        sys.stderr.write(str(error))
        sys.exit(BAD_INPUT)
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
