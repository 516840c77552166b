"""Two observers of the same retinas: from their masks to a picture of what is predicted for each.

Runs the commands that a user would type on the embedded example and prints each one. The picture
shows an eye that the model has not seen.
"""

import argparse
import shutil
import sys
from pathlib import Path

from nnmosaic.pipeline.cli import main

EXAMPLE = Path(__file__).parent
OBSERVERS = ("first", "second")
DATASET, MODEL = "Dataset030_Retina", ("30", "2d")
PLAIN = "nnUNetTrainerMosaic"
DIVERSIFIED = "nnUNetTrainerMultiRaterDiversified"
PERSONALIZED = "nnUNetTrainerMultiRaterPersonalized"
EPOCHS = {PLAIN: "8", DIVERSIFIED: "2", PERSONALIZED: "2"}


def run(data: Path, output: Path, steps: str, device: str) -> None:
    """Run all commands.

    Parameters
    ----------
    data : Path
        Holds ``training`` and ``test``; see make_example.py.
    output : Path
        Emptied first.
    steps : str
        Of an epoch.
    """
    if output.is_dir() and any(output.iterdir()) and not (output / "workspace").is_dir():
        sys.exit(f"{output} has other files than this demo's. Name a new folder with --output.")
    shutil.rmtree(output, ignore_errors=True)
    training, test = data / "training", data / "test"
    raters = [f"{name}={training / 'raters' / name}" for name in OBSERVERS]
    workspace = output / "workspace"
    plain = workspace / "nnUNet_results" / DATASET / f"{PLAIN}__nnUNetPlans__2d" / "fold_0"

    def command(*arguments: str) -> None:
        if arguments[0] != "evaluate_raters":
            arguments = (*arguments, "--workspace", str(workspace))
        print("\n$ nnmosaic", *arguments, flush=True)
        code = main(arguments)
        if code != 0:
            sys.exit(code)

    command(
        "add_raters", "-d", MODEL[0], "-n", "Retina", "--images", str(training / "images"),
        "--raters", *raters, "--labels", "vessel", "--channels", "green", "--file_ending", ".png",
    )  # fmt: skip
    command("plan_and_preprocess", "-d", MODEL[0], "-c", MODEL[1], "--device", device)
    for trainer, epochs in EPOCHS.items():
        settings = ("--epochs", epochs, "--iterations_per_epoch", steps, "--seed", "0",
                    "--val_iterations_per_epoch", "1")  # fmt: skip
        if trainer == DIVERSIFIED:
            settings = (*settings, "-pretrained_weights", str(plain / "checkpoint_final.pth"))
        command("train", *MODEL, "0", "-tr", trainer, *settings, "--device", device)
    predictions = output / "predictions"
    command(
        "predict", "-i", str(test / "images"), "-o", str(predictions),
        "-d", MODEL[0], "-c", MODEL[1], "-tr", PERSONALIZED, "-f", "0",
        "--raters", "all", "--samples", "16", "--uncertainty", "--device", device,
    )  # fmt: skip
    content = str(workspace / "nnUNet_raw" / DATASET / "dataset.json")
    command("evaluate_raters", str(test / "raters"), str(predictions), "-djfile", content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=EXAMPLE)
    parser.add_argument("--output", type=Path, default=Path("demo_retina"))
    parser.add_argument("--iterations_per_epoch", default="50")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    run(options.data, options.output, options.iterations_per_epoch, options.device)
    from figure import draw  # not at the top: worker processes import this file

    picture = options.output / "observers.png"
    draw(options.data / "test", options.output / "predictions", picture)
    print(f"Picture: {picture}")
