"""Both stages for many raters against what they must beat, on two datasets of photographs.

``python -m benchmarks.multi_rater``: cross-validation in three folds by person, images at half
resolution, one JSON file per run; finished runs are skipped.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.grid import (
    RESAMPLES,
    command,
    file_name,
    make_missing,
    parser_of,
    use_workspace,
    what_it_took,
)
from benchmarks.report import RESULTS, footer, provenance, table, write
from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import DatasetJson, parse_dataset_json

FOLDER = RESULTS / "multi_rater"
FOLDS = 3
BUDGET = {"epochs": 10, "iterations_per_epoch": 50}
PATCH, STAGES = 256, 7
"""Of the plan. The planner's own covers an image at once, and a step takes four times as long."""
RADII = range(-4, 5)
"""Voxels by which the best constant morphology may erode (below 0) or dilate a mask."""
FIRST, SECOND = "nnUNetTrainerMultiRaterDiversified", "nnUNetTrainerMultiRaterPersonalized"
PROBABILISTIC = {"bound_weight": "0", "posterior": "sampled"}
ROWS = ("ours", "probabilistic U-Net", "fused nnU-Net", "random rater")
"""Ours: both stages. The fused nnU-Net also makes the row of constant morphology."""


@dataclass(frozen=True)
class Setting:
    """A dataset: its number, class and channels.

    Attributes
    ----------
    raters : mapping of str to str
        Rater -> folder with {stem} for its files, below the dataset's folder.
    foreground_is_zero : bool
        Whether the structure is 0 in the files.
    """

    title: str
    folder: str
    dataset: str
    structure: str
    channels: tuple[str, ...]
    raters: Mapping[str, str]
    foreground_is_zero: bool = False


PEOPLE = [f"Person{person}_{tool}" for person in (1, 3, 4, 5) for tool in ("Amira", "ImageJ")]
SETTINGS = {
    "chase": Setting(
        "CHASE_DB1: retinal vessels, 2 observers", "chase_db1", "Dataset641_Chase", "vessel",
        ("R", "G", "B"),
        {"first": "labels_1stHO/{stem}_1stHO.png", "second": "labels_2ndHO/{stem}_2ndHO.png"},
    ),
    "bubil": Setting(
        "BU-BIL 1: cells, 4 people x 2 tools", "bubil_rat_cells", "Dataset642_Bubil", "cell",
        ("grey",), {name: f"labels/{name}/[sS]eg_{{stem}}.png" for name in PEOPLE},
        foreground_is_zero=True,
    ),
}  # fmt: skip


# ------------------------------------------------------------------ preparation


def prepare(data: Path, work: Path, settings: Sequence[str]) -> None:
    """Write raw datasets, plans, preprocessed data and folds, where they are missing."""
    for name in settings:
        setting = SETTINGS[name]
        preprocessed = work / "nnUNet_preprocessed" / setting.dataset
        if (preprocessed / "splits_final.json").is_file():
            continue
        files = work / "files" / name
        _write_halved(data / setting.folder, files, setting)
        raters = [f"{rater}={files / rater}" for rater in setting.raters]
        number = setting.dataset[len("Dataset") :].split("_")
        if not (work / "nnUNet_raw" / setting.dataset).is_dir():
            command(
                "add_raters", "-d", number[0], "-n", number[1], "--images", str(files / "images"),
                "--labels", setting.structure, "--channels", *setting.channels,
                "--file_ending", ".png", "--raters", *raters,
            )  # fmt: skip
        command("plan_and_preprocess", "-d", number[0], "-c", "2d", "--device", "cpu")
        _make_patch_smaller(preprocessed / "nnUNetPlans.json")
        cases = sorted(path.stem.removesuffix("_0000") for path in (files / "images").iterdir())
        write_json(_folds(data / setting.folder / "cases.csv", cases),
                   preprocessed / "splits_final.json")  # fmt: skip


def _write_halved(source: Path, target: Path, setting: Setting) -> None:
    """Write images and masks at half the resolution; an old file is left."""
    from skimage import io
    from skimage.measure import block_reduce

    for path in sorted((source / "images").iterdir()):
        image = io.imread(path).astype(float)
        image = image[..., :3].mean(2) if len(setting.channels) == 1 and image.ndim == 3 else image
        blocks = (2, 2, *(1,) * (image.ndim - 2))
        _save(block_reduce(image, blocks, np.mean).round(), target / "images", f"{path.stem}_0000")
        for rater, pattern in setting.raters.items():
            (file,) = source.glob(pattern.format(stem=path.stem))
            drawn = io.imread(file)
            drawn = drawn[..., 0] if drawn.ndim == 3 else drawn
            mask = (drawn == 0) if setting.foreground_is_zero else (drawn > 0)
            _save(block_reduce(mask.astype(float), (2, 2), np.mean) >= 0.5, target / rater,
                  path.stem)  # fmt: skip


def _save(array: np.ndarray, folder: Path, stem: str) -> None:
    from skimage import io

    folder.mkdir(parents=True, exist_ok=True)
    io.imsave(folder / f"{stem}.png", array.astype(np.uint8), check_contrast=False)


def _make_patch_smaller(path: Path) -> None:
    plans = read_json(path)
    configuration = plans["configurations"]["2d"]
    configuration["patch_size"] = [PATCH, PATCH]
    arguments = configuration["architecture"]["arch_kwargs"]
    arguments["n_stages"] = STAGES
    for key in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        arguments[key] = arguments[key][:STAGES]
    arguments["n_conv_per_stage_decoder"] = arguments["n_conv_per_stage_decoder"][: STAGES - 1]
    write_json(plans, path)


def _folds(table_of_cases: Path, cases: Sequence[str]) -> list[dict[str, list[str]]]:
    lines = table_of_cases.read_text(encoding="utf-8").splitlines()[1:]
    people = dict(line.split(",")[:2] for line in lines)
    people = {case: case if people[case] == "unknown" else people[case] for case in cases}
    groups = sorted(set(people.values()))
    folds = []
    for fold in range(FOLDS):
        held_out = {case for case in cases if groups.index(people[case]) % FOLDS == fold}
        folds.append({"train": sorted(set(cases) - held_out), "val": sorted(held_out)})
    return folds


# ------------------------------------------------------------------ one run


def one_run(work: Path, name: str, row: str, fold: int, seed: int) -> dict[str, Any]:
    """Train on one fold, and return how its validation cases are scored."""
    import benchmarks.baselines  # noqa: F401 - registers the peers

    start = time.perf_counter()
    setting = SETTINGS[name]
    os.environ["nnUNet_results"] = str(work / "results" / f"{name}_{row}_{seed}")
    base = work / "nnUNet_preprocessed" / setting.dataset
    dataset = parse_dataset_json(read_json(base / "dataset.json"))
    result: dict[str, Any] = {"setting": name, "row": row, "fold": fold, "seed": seed}
    if row == "ours":
        result["diversified"] = _trained(setting, FIRST, fold, seed, base, dataset)
        result["personalised"] = _trained(setting, SECOND, fold, seed, base, dataset)
    elif row == "probabilistic U-Net":
        result["diversified"] = _trained(
            setting, FIRST, fold, seed, base, dataset, options=PROBABILISTIC
        )
    elif row == "random rater":
        result["one mask"] = _trained(
            setting, "nnUNetTrainerRandomRater", fold, seed, base, dataset
        )
    else:
        result["one mask"] = _trained(setting, "nnUNetTrainerMosaic", fold, seed, base, dataset)
        result["morphology"] = _with_morphology(base, fold, dataset)
    return {**result, "budget": BUDGET, **what_it_took(start)}


def _validation(dataset: str, trainer: str, fold: int) -> Path:
    (model,) = (Path(os.environ["nnUNet_results"]) / dataset).glob(f"{trainer}__*__2d")
    return model / f"fold_{fold}" / "validation"


def _trained(
    setting: Setting,
    trainer: str,
    fold: int,
    seed: int,
    base: Path,
    dataset: DatasetJson,
    *,
    options: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    from nnmosaic.pipeline.train import train
    from nnmosaic.pipeline.workspace import open_workspace
    from nnmosaic.planners.plans_section import RunSettings
    from nnmosaic.planners.preprocessing import RATER_REFERENCES_FOLDER
    from nnmosaic.trainers.multi_rater.evaluation import evaluate_raters

    settings = RunSettings(**BUDGET, val_iterations_per_epoch=1, seed=seed, options=options)
    train(
        open_workspace(None), setting.dataset, "2d", fold, trainer=trainer,
        plans_name="nnUNetPlans", settings=settings, device="cpu",
    )  # fmt: skip
    folder = _validation(setting.dataset, trainer, fold)
    return evaluate_raters(base / RATER_REFERENCES_FOLDER, folder, dataset)


def _with_morphology(base: Path, fold: int, dataset: DatasetJson) -> dict[str, Any]:
    """Return scores of the fused masks, eroded or dilated by the best radius of each rater.

    The radius is learnt from the fused references and the annotations of the training cases.
    """
    from skimage import io

    from nnmosaic.planners.preprocessing import RATER_REFERENCES_FOLDER
    from nnmosaic.trainers.multi_rater.evaluation import evaluate_raters

    references = base / RATER_REFERENCES_FOLDER
    folds = read_json(base / "splits_final.json")
    predictions = _validation(base.name, "nnUNetTrainerMosaic", fold)
    target = predictions.parent / "morphology"
    for rater in dataset.raters:
        cases = folds[fold]["train"]
        fused = [io.imread(base / "gt_segmentations" / f"{case}.png") for case in cases]
        drawn = [io.imread(references / rater / f"{case}.png") for case in cases]
        scores = [
            np.mean([_dice(changed(f > 0, r), d > 0) for f, d in zip(fused, drawn, strict=True)])
            for r in RADII
        ]
        radius = RADII[int(np.argmax(scores))]
        for case in folds[fold]["val"]:
            mask = io.imread(predictions / f"{case}.png") > 0
            _save(changed(mask, radius), target / "raters" / rater, case)
    return evaluate_raters(references, target, dataset)


def changed(mask: np.ndarray, radius: int) -> np.ndarray:
    """Return a mask dilated by a radius (pixels), or eroded where it is below 0."""
    from scipy.ndimage import distance_transform_edt

    if radius > 0:
        return np.asarray(distance_transform_edt(~mask) <= radius)
    return np.asarray(distance_transform_edt(mask) > -radius)


def _dice(one: np.ndarray, other: np.ndarray) -> float:
    total = one.sum() + other.sum()
    return float(2 * (one & other).sum() / total) if total else 1.0


# ------------------------------------------------------------------ all runs, and the page


def result_path(name: str, row: str, fold: object, seed: object) -> Path:
    """Return where a run's result goes."""
    return FOLDER / file_name(name, row, fold, seed)


def cases_of(name: str, row: str, part: str, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the scored cases of a row, over finished folds and seeds."""
    for seed in seeds:
        for fold in range(FOLDS):
            path = result_path(name, row, fold, seed)
            if path.is_file():
                for case in read_json(path)[part]["metric_per_case"]:
                    yield {**case, "seed": seed}


def with_interval(values: Mapping[str, list[float]]) -> str:
    """Return the mean and its 95 % bootstrap interval over cases, of case -> values of seeds."""
    means = np.array([np.mean(v) for v in values.values()])
    rng = np.random.default_rng(0)
    drawn = means[rng.integers(len(means), size=(RESAMPLES, len(means)))].mean(1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return f"{means.mean():.4f} [{low:.4f}, {high:.4f}]"


def _collect(cases: Iterator[dict[str, Any]], *keys: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for case in cases:
        value: Any = case
        for key in keys:
            value = value[key]
        if isinstance(value, Mapping):
            value = float(np.mean([v for v in value.values() if v is not None]))
        values.setdefault(case["case"], []).append(value)
    return values


def setting_tables(name: str, seeds: Sequence[int]) -> str:
    """Return the tables of a setting from the finished runs."""
    samples, masks = [], []
    for row in ("ours", "probabilistic U-Net"):
        columns = [
            _collect(cases_of(name, row, "diversified", seeds), "samples", key)
            for key in ("GED", "dice_soft", "max_of_annotations", "match")
        ]
        if columns[0]:
            runs = sum(map(len, columns[0].values()))
            samples.append([row, *(with_interval(c) for c in columns), str(runs)])
    parts = {"ours": "personalised", "fused nnU-Net": "one mask", "random rater": "one mask",
             "fused nnU-Net, constant morphology": "morphology"}  # fmt: skip
    for title, part in parts.items():
        row = title.split(",")[0]
        dice = _collect(cases_of(name, row, part, seeds), "raters", "Dice")
        if dice:
            folds = [result_path(name, row, fold, seed) for seed in seeds for fold in range(FOLDS)]
            found = [read_json(path)[part] for path in folds if path.is_file()]
            told = [summary["identification"] for summary in found if "identification" in summary]
            cell = "-"
            if told:
                score, chance = (np.mean([one[key] for one in told]) for key in ("score", "chance"))
                cell = f"{score:.2f} (chance {chance:.2f})"
            masks.append([title, with_interval(dice), cell, str(sum(map(len, dice.values())))])
    header = ["first stage, 10 samples", "GED", "Dice_soft", "Dice_max", "Dice_match", "cases"]
    second = ["masks of raters", "Dice_mean, strict", "rater identified", "cases"]
    return f"## {SETTINGS[name].title}\n\n{table(header, samples)}\n\n{table(second, masks)}"


def main() -> None:
    """Prepare what is missing, make the missing runs, write the page."""
    run = ("SETTING", "ROW", "FOLD", "SEED")
    parser = parser_of(__doc__, tuple(SETTINGS), seeds=(0,), run=run)
    parser.set_defaults(work=Path("benchmark_work/multi_rater"))
    options = parser.parse_args()
    work = options.work.resolve()
    use_workspace(work)
    if options.one:
        name, row, fold, seed = options.one
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_json(one_run(work, name, row, int(fold), int(seed)), result_path(*options.one))
        return
    prepare(options.data.resolve(), work, options.only)
    if not options.report:
        runs = {
            result_path(name, row, fold, seed): (name, row, str(fold), str(seed))
            for seed in options.seeds
            for fold in range(FOLDS)
            for name in options.only
            for row in ROWS
        }
        make_missing("benchmarks.multi_rater", runs, work, jobs=options.jobs)
    sources = {}
    for path in sorted(FOLDER.iterdir()):
        content = read_json(path)
        source = {key: content[key] for key in (*provenance(), "threads", "budget")}
        sources[footer(source)] = source
    tables = "\n\n".join(setting_tables(name, options.seeds) for name in SETTINGS)
    text = (
        "# Many raters against their baselines\n\nMade by `python -m benchmarks.multi_rater`. "
        f"{FOLDS} folds by person, CPU plan with a patch of {PATCH}, half resolution, seeds "
        f"{', '.join(map(str, options.seeds))}; every stage has the same budget. Intervals: "
        "bootstrap over cases. Strict: the mask of a rater against this rater only; a model with "
        f"one mask is held against each.\n\n{tables}\n\nRuns: {' / '.join(sources)}\n"
    )
    write("multi_rater", {"runs": [path.name for path in sorted(FOLDER.iterdir())]}, text)
    print(text)


if __name__ == "__main__":
    main()
