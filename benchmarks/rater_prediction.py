"""What 16 samples and the masks of all raters cost, against one plain prediction.

``python -m benchmarks.rater_prediction`` after ``benchmarks.multi_rater`` has prepared its data.
Same image, tiles and mirroring, from preprocessed data to files on disk, each in a process of its
own, in turn. The networks are not trained. Run nothing else meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.multi_rater import SECOND, SETTINGS
from benchmarks.report import footer, provenance, table, write
from nnmosaic.data_conversion.atomic_write import read_json

REPEATS, SAMPLES = 3, 16
PLAIN, RATERS = "plain nnU-Net", "16 samples and all raters"
FEATURES = {"CPU plan": 1, "nnU-Net's width": 4}
"""Factor on the features of the CPU plan, which begins with 8."""


def predict_once(work: Path, setting: str, what: str, factor: int) -> dict[str, float]:
    """Return seconds and peak memory (GB) of predicting and writing one case."""
    import torch
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnmosaic.trainers.lookup import trainer_class
    from nnmosaic.trainers.multi_rater.dataset import RaterDataset
    from nnmosaic.trainers.multi_rater.export import CaseWriter
    from nnmosaic.trainers.multi_rater.prediction import RaterPredictor
    from nnmosaic.trainers.multi_rater.wanted_masks import ALL, WantedMasks
    from nnmosaic.trainers.predictor import MosaicPredictor

    base = work / "nnUNet_preprocessed" / SETTINGS[setting].dataset
    plans = read_json(base / "nnUNetPlans.json")
    architecture = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    architecture["features_per_stage"] = [factor * n for n in architecture["features_per_stage"]]
    manager, content = PlansManager(plans), read_json(base / "dataset.json")
    configuration = manager.get_configuration("2d")
    trainer = "nnUNetTrainerMosaic" if what == PLAIN else SECOND
    torch.manual_seed(0)
    network = trainer_class(trainer).build_network_architecture(
        manager, configuration, len(content["channel_names"]), len(content["labels"]), False
    )
    predictor = MosaicPredictor(
        perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.manual_initialization(
        network, manager, configuration, None, content, trainer, (0, 1)
    )  # fmt: skip
    dataset = RaterDataset(str(base / configuration.data_identifier))
    case = sorted(dataset.identifiers)[0]
    data, _, _, properties = dataset.load_case(case)
    image = torch.from_numpy(data[:])
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            if what == PLAIN:
                logits = predictor.predict_sliding_window_return_logits(image).numpy()
                export_prediction_from_logits(
                    logits, properties, configuration, manager, content, f"{folder}/{case}",
                    num_threads_torch=torch.get_num_threads(),
                )  # fmt: skip
            else:
                raters = RaterPredictor(predictor, WantedMasks((ALL,), SAMPLES))
                writer = CaseWriter(Path(folder), case, predictor, properties)
                for kind, name, one in raters.logits(image, case):
                    writer.add(kind, name, one)
                writer.finish(raters.latents)
            seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return {"seconds": seconds, "gigabytes": int(peak) / 2**20}


def main() -> None:
    """Measure, write the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("benchmark_work/multi_rater"))
    parser.add_argument("--one", nargs=3, metavar=("SETTING", "WHAT", "FACTOR"))
    options = parser.parse_args()
    work = options.work.resolve()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(work / name)
    if options.one:
        setting, what, factor = options.one
        print(json.dumps(predict_once(work, setting, what, int(factor))))
        return
    found: dict[str, list[dict[str, float]]] = {}
    rows = []
    for setting in SETTINGS:
        for plan, factor in FEATURES.items():
            for _ in range(REPEATS):
                for what in (PLAIN, RATERS):
                    command = [sys.executable, "-m", "benchmarks.rater_prediction", "--work"]
                    command += [str(work), "--one", setting, what, str(factor)]
                    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    key = f"{setting}, {plan}, {what}"
                    found.setdefault(key, []).append(json.loads(run.stdout.splitlines()[-1]))
            rows.append([SETTINGS[setting].title, plan, *_ratios(found, f"{setting}, {plan}")])
    source: dict[str, Any] = provenance()
    header = ["data", "network", "plain, s", "with raters, s", "ratio", "peak memory, ratio"]
    text = (
        "# Predicting samples and raters\n\nMade by `python -m benchmarks.rater_prediction`: one "
        f"preprocessed case, tiles and 4 mirrored copies, {SAMPLES} samples and a mask for each "
        f"rater, written to disk; medians of {REPEATS}, in turn, of processes of their own.\n\n"
        f"{table(header, rows)}\n\n{footer(source)}\n"
    )
    write("rater_prediction", {**source, "runs": found}, text)
    print(text)


def _ratios(found: dict[str, list[dict[str, float]]], key: str) -> list[str]:
    plain, raters = (
        {
            name: median(run[name] for run in found[f"{key}, {what}"])
            for name in ("seconds", "gigabytes")
        }
        for what in (PLAIN, RATERS)
    )
    return [
        f"{plain['seconds']:.2f}",
        f"{raters['seconds']:.2f}",
        f"{raters['seconds'] / plain['seconds']:.2f}",
        f"{raters['gigabytes'] / plain['gigabytes']:.2f}",
    ]


if __name__ == "__main__":
    main()
