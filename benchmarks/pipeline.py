"""Wall time of stock nnU-Net and nnMosaic, alternating, on the same data, plan and threads.

``python -m benchmarks.pipeline --data MSD_FOLDER`` needs the hippocampus data of the Medical
Segmentation Decathlon (imagesTr, labelsTr). Takes about 30 minutes on 2 cores.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.report import footer, provenance, table, write
from nnmosaic.data_conversion.atomic_write import read_json, write_json

COMPLETE = "Dataset001_Hippocampus"
LABELS = {"background": 0, "anterior": 1, "posterior": 2}
FOLDS = ("0", "1", "2", "3", "4")
STEPS, WARM_UP = 60, 6
SELF_DISAMBIGUATION = "nnUNetTrainerSelfDisambiguation"
Variant = tuple[str, Mapping[str, str]]
"""A trainer of ours and its options."""
STEP_VARIANTS: Mapping[str, Variant | None] = {
    "stock": None,
    "nnMosaic": (SELF_DISAMBIGUATION, {}),
}
# Odd numbers belong to a source that annotates "anterior", even ones to "posterior".
SOURCES = {
    "A": {"pattern": "[13579]$", "annotated": ["anterior"]},
    "P": {"pattern": "[02468]$", "annotated": ["posterior"]},
}

# nnU-Net's trainer lookup needs two operators where torchvision is built for another torch.
STOCK = """
import sys, torch
try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
ENTRY_POINTS = {
    "plan_and_preprocess": "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints "
    "import plan_and_preprocess_entry as entry",
    "predict": "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as entry",
}


def stock(command: str, *arguments: str) -> list[str]:
    """Return the command line of an nnU-Net entry point."""
    cure = STOCK if command == "predict" else "import sys\n"
    code = f"{cure}\n{ENTRY_POINTS[command]}\nif __name__ == '__main__': sys.exit(entry())"
    return [sys.executable, "-c", code, *arguments]


def ours(*arguments: str) -> list[str]:
    """Return an nnMosaic command line."""
    return [sys.executable, "-m", "nnmosaic.pipeline.cli", *arguments]


def seconds(command: list[str]) -> float:
    """Run a command and return the wall time until it returns."""
    # To a file: a pipe would also wait for helper processes that end after the command.
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        run = subprocess.run(command, stdout=output, stderr=output)
        wall = time.perf_counter() - start
        if run.returncode != 0:
            output.seek(0)
            raise RuntimeError(f"{command}\n{output.read()[-3000:]}")
    return wall


def prepare(data: Path, work: Path, number: int) -> None:
    """Write the raw dataset and the folder of images to predict, as links."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "images"):
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).mkdir(parents=True)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(work / name)
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (data / "labelsTr").glob("*.gz"))
    folder = work / "nnUNet_raw" / COMPLETE
    for part, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
        (folder / part).mkdir(parents=True)
        for case in cases:
            path = folder / part / f"{case}{suffix}.nii.gz"
            path.symlink_to((data / part / f"{case}.nii.gz").resolve())
    content = {
        "channel_names": {"0": "T1"},
        "labels": LABELS,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    write_json(content, folder / "dataset.json")
    for case in [*cases[::3], *cases[1::3], *cases[2::3]][:number]:
        (work / "images" / f"{case}_0000.nii.gz").symlink_to(
            (data / "imagesTr" / f"{case}.nii.gz").resolve()
        )


def time_preparation(work: Path, dataset: str, repeats: int) -> dict[str, list[float]]:
    """Time fingerprint + plan + preprocessing, from nothing and alternating.

    Raises
    ------
    RuntimeError
        If plans or preprocessed arrays are not equal.
    """
    base = ("-d", str(int(dataset[7:10])), "-c", "3d_fullres")
    cores = str(os.cpu_count())
    commands = {
        "stock, its default workers": stock("plan_and_preprocess", *base),
        "stock, one worker per core": stock(
            "plan_and_preprocess", *base, "-npfp", cores, "-np", cores
        ),
        "nnMosaic": ours("plan_and_preprocess", *base),
    }
    folder = work / "nnUNet_preprocessed" / dataset
    times: dict[str, list[float]] = {name: [] for name in commands}
    arrays, plans = {}, {}
    for _ in range(repeats):
        for name, command in commands.items():
            shutil.rmtree(folder, ignore_errors=True)
            times[name].append(seconds(command))
            arrays[name] = array_digests(folder / "nnUNetPlans_3d_fullres")
            plans[name] = read_json(folder / "nnUNetPlans.json")
            del plans[name]["experiment_planner_used"]
    if any(made != plans["nnMosaic"] for made in plans.values()):
        raise RuntimeError(f"The plans of {dataset} differ.")
    if any(not a or a != arrays["nnMosaic"] for a in arrays.values()):
        raise RuntimeError(f"The preprocessed arrays of {dataset} differ.")
    return times


def array_digests(folder: Path) -> dict[str, bytes]:
    """Return file name -> digest of the preprocessed array in it."""
    import blosc2

    return {
        path.name: hashlib.sha256(np.ascontiguousarray(blosc2.open(str(path))[:])).digest()
        for path in sorted(folder.glob("*.b2nd"))
    }


def plan_for_cpu(work: Path) -> None:
    """Plan for the CPU, without nnMosaic's section, and declare half of the labels as missing."""
    seconds(ours("plan_and_preprocess", "-d", "1", "-c", "3d_fullres", "--device", "cpu"))
    folder = work / "nnUNet_preprocessed" / COMPLETE
    plans = read_json(folder / "nnUNetPlans.json")
    del plans["nnmosaic"]
    write_json(plans, folder / "nnUNetPlans.json")


def make_trainer(work: Path, variant: Variant | None) -> Any:
    """Return a trainer of fold 0 of the CPU plan; None: stock nnU-Net.

    Self-disambiguation has two half labelled sources.
    """
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnmosaic.planners.plans_section import RunSettings
    from nnmosaic.trainers.lookup import trainer_class

    folder = work / "nnUNet_preprocessed" / COMPLETE
    content = read_json(folder / "dataset.json")
    plans = {**read_json(folder / "nnUNetPlans.json"), "continue_training": False}
    arguments = (plans, "3d_fullres", 0, content, torch.device("cpu"))
    if variant is None:
        return nnUNetTrainer(*arguments)
    name, options = variant
    if name.startswith(SELF_DISAMBIGUATION):
        content["partial_labels"] = {"sources": SOURCES}
    trainer: Any = trainer_class(name)(*arguments)
    trainer.request_settings(RunSettings(options=dict(options) or None))
    return trainer


def start(trainer: Any) -> Any:
    """Seed everything, make the trainer ready, and return it."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    np.random.seed(0)
    os.environ["nnUNet_n_proc_DA"] = "0"  # batches are made in this process
    trainer.on_train_start()
    del os.environ["nnUNet_n_proc_DA"]
    return trainer


def half_labelled(batch: dict[str, Any]) -> dict[str, Any]:
    """Set to 0, in place, what the source of a sample does not annotate."""
    for i, key in enumerate(batch["keys"]):
        for level in batch["target"]:
            level[i][level[i] != (1 if int(key[-1]) % 2 else 2)] = 0
    return batch


def time_training_step(
    work: Path, variants: Mapping[str, Variant | None]
) -> dict[str, list[float]]:
    """Time steps of all variants on the same batches, alternating; each value is of two steps."""
    trainers = {name: start(make_trainer(work, variant)) for name, variant in variants.items()}
    loader = next(iter(trainers.values())).dataloader_train
    batches = [half_labelled(next(loader)) for _ in range(8)]
    times: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(0, WARM_UP + STEPS, 2):
        for name, trainer in trainers.items():
            begin = time.perf_counter()
            for i in (step, step + 1):  # some options change every second step
                trainer.train_step(batches[i % len(batches)])
            if step >= WARM_UP:
                times[name].append((time.perf_counter() - begin) / 2)
    return times


def make_models(work: Path) -> None:
    """Write five untrained folds; the time of a prediction does not depend on the weights."""
    import torch

    for fold in FOLDS:
        torch.manual_seed(int(fold))
        trainer = make_trainer(work, None)
        trainer.initialize()
        model = Path(trainer.output_folder_base)
        (model / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(str(model / f"fold_{fold}" / "checkpoint_final.pth"))
    for name in ("dataset.json", "dataset_fingerprint.json"):
        shutil.copyfile(work / "nnUNet_preprocessed" / COMPLETE / name, model / name)
    write_json(trainer.plans_manager.plans, model / "plans.json")


def time_prediction(work: Path, repeats: int) -> dict[str, Any]:
    """Time 5 folds with mirroring, with as many workers; also compare the label maps."""
    model = ("-d", "1", "-c", "3d_fullres", "-tr", "nnUNetTrainer", "-f", *FOLDS)
    images, cores = ("-i", str(work / "images")), str(os.cpu_count())
    outputs = {name: work / f"predicted_{name}" for name in ("stock", "nnMosaic")}
    workers = ("-device", "cpu", "-npp", cores, "-nps", cores)
    stock_options = (*model, *images, *workers, "-o", str(outputs["stock"]))
    our_options = (*model, *images, "--device", "cpu", "-np", cores, "-o", str(outputs["nnMosaic"]))
    commands = {
        "stock": stock("predict", *stock_options),
        "nnMosaic": ours("predict", *our_options),
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            shutil.rmtree(outputs[name], ignore_errors=True)
            times[name].append(seconds(command))
    names = {"stock": "stock, one worker per core", "nnMosaic": "nnMosaic"}
    return {
        "seconds": {names[key]: values for key, values in times.items()},
        "differing_voxels": _differing(*outputs.values()),
    }


def _differing(one: Path, other: Path) -> float:
    import SimpleITK

    differing = total = 0
    for path in sorted(one.glob("*.nii.gz")):
        a, b = (
            SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / path.name)))
            for folder in (one, other)
        )
        differing, total = differing + int((a != b).sum()), total + a.size
    return differing / total


def rows_of(title: str, times: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """Return one row per stock variant, with the ratio of medians."""
    mine = median(times["nnMosaic"])
    return [
        {
            "what": title,
            "against": name,
            "stock_median_s": round(median(values), 4),
            "nnmosaic_median_s": round(mine, 4),
            "ratio": round(mine / median(values), 3),
            "repeats": len(values),
        }
        for name, values in times.items()
        if name != "nnMosaic"
    ]


def report(rows: list[dict[str, Any]], differing: float, source: Mapping[str, Any]) -> str:
    """Return the result page."""
    header = ("what", "against", "stock, median s", "nnMosaic, median s", "ratio", "repeats")
    cells = [[str(value) for value in row.values()] for row in rows]
    return (
        "# Wall time against stock nnU-Net\n\n"
        "Made by `python -m benchmarks.pipeline`: alternating runs, ratio of medians.\n\n"
        f"{table(header, cells)}\n\n"
        "Preprocessed arrays were compared and are equal. Predicted label maps differ in "
        f"{differing:.2e} of the voxels. Networks: {len(FOLDS)} untrained folds of the CPU plan "
        "(seeds 0 to 4); steps: seed 0, half of the labels undeclared, both in one "
        "process, where both profit from memory that is kept.\n\n"
        f"{footer(source)}\n"
    )


def finished(path: Path, measure: Callable[[], Any]) -> Any:
    """Return what ``path`` holds, or measure it now: a killed benchmark goes on."""
    if not path.is_file():
        write_json(measure(), path)
    return read_json(path)


def main() -> None:
    """Measure what is not measured yet, write the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("benchmark_work") / "pipeline")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", type=int, default=66, help="images to predict")
    options = parser.parse_args()
    work = options.work.absolute()
    prepare(options.data, work, options.cases)
    preprocessing = finished(
        work / "preprocessing.json", lambda: time_preparation(work, COMPLETE, options.repeats)
    )
    plan_for_cpu(work)
    steps = finished(work / "steps.json", lambda: time_training_step(work, STEP_VARIANTS))
    make_models(work)
    prediction = finished(
        work / f"prediction_{options.cases}.json", lambda: time_prediction(work, options.repeats)
    )
    all_times = {
        "fingerprint, plan, preprocessing of 194 cases": preprocessing,
        "one training step, self-disambiguation against plain": steps,
        f"prediction of {options.cases} cases, 5 folds, mirroring": prediction["seconds"],
    }
    rows = [row for name, times in all_times.items() for row in rows_of(name, times)]
    source = provenance()
    differing = prediction["differing_voxels"]
    text = report(rows, differing, source)
    content = {**source, "rows": rows, "seconds": all_times, "differing_voxels": differing}
    write("pipeline", content, text)
    print(text)


if __name__ == "__main__":
    main()
