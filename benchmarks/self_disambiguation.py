"""Self-disambiguation against its oracle and its peers, on unseen subjects.

``python -m benchmarks.self_disambiguation --data SHARED_DATA`` needs ``msd_task04_hippocampus``,
``chaos_mr_t1dual`` and ``chaos_mr_t2spir`` in that folder. Every run is one JSON file in
``results/self_disambiguation``; finished ones are skipped, so the command can be stopped and run
again. A run takes about 8 minutes on one core, of CHAOS 20, with twice the steps 30; ``--jobs`` run
at the same time on their share of the cores. ``--only SETTING`` leaves out the others.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.grid import (
    Training,
    comparison_row,
    file_name,
    make_missing,
    parser_of,
    scores,
    train_and_predict,
    use_workspace,
    what_it_took,
)
from benchmarks.report import RESULTS, footer, provenance, table, write
from benchmarks.self_disambiguation_data import dataset_folder, prepare
from nnmosaic.data_conversion.atomic_write import read_json, write_json

FOLDER = RESULTS / "self_disambiguation"
PLAIN, OURS = "nnUNetTrainerMosaic", "nnUNetTrainerSelfDisambiguation"


@dataclass(frozen=True)
class Row:
    """One way to train: on which datasets (several: one model each, fused), and how.

    Each model gets one part in ``parts`` of the budget.
    """

    datasets: tuple[str, ...]
    trainer: str = OURS
    options: Mapping[str, str] = field(default_factory=dict)
    parts: int = 1


@dataclass(frozen=True)
class Setting:
    """What is annotated, and what is compared on it.

    Attributes
    ----------
    corpus : str
        Plan, test images and budget.
    never_annotated : mapping
        Sequence (a part of a case's name) -> classes that no image of it has a label of.
    one_seed : bool
        Only the first seed is trained with.
    note : str
        What a reader must know of the choice of options.
    times : int
        Steps of all rows, in budgets of the corpus.
    """

    title: str
    corpus: str
    rows: Mapping[str, Row]
    never_annotated: Mapping[str, Sequence[str]] = field(default_factory=dict)
    one_seed: bool = False
    note: str = ""
    times: int = 1


BUDGETS = {
    "hippocampus": ("3d_fullres", {"epochs": 20, "iterations_per_epoch": 40}),
    "chaos_sequences": ("3d_lowres", {"epochs": 120, "iterations_per_epoch": 40}),
    "chaos_phases": ("3d_lowres", {"epochs": 120, "iterations_per_epoch": 40}),
}
SOFT_TEACHER = {
    "ema_teacher": "true", "teacher_threshold": "0", "teacher_foreground_threshold": "0",
    "ramp": "0.5",
}  # fmt: skip
SIDES = {"mirroring": "false"}
"""There are a left and a right kidney."""
ANY_CONTRAST = {**SIDES, "random_contrast": "1"}
LATE_TEACHER = {
    **SIDES, "random_contrast": "0.8", "ema_teacher": "true", "teacher_start": "0.6",
    "ramp": "0.05", "teacher_threshold": "0.98", "teacher_foreground_threshold": "0.3",
}  # fmt: skip
LONG_TEACHER = {**LATE_TEACHER, "teacher_start": "0.4", "teacher_threshold": "0.998"}
NEVER = {"T1": ("kidney_right", "kidney_left"), "T2": ("liver", "spleen")}
ORACLE, MISSING = Row(("Full",), PLAIN), "missing as background"
SETTINGS = {
    "disjoint": Setting(
        "Hippocampus, half of the subjects anterior only, the other half posterior only",
        "hippocampus",
        {
            "oracle": ORACLE,
            "ours": Row(("Disjoint",)),
            "ours + entropy": Row(("Disjoint",), options={"entropy": "conditional"}),
            "ours + teacher": Row(("Disjoint",), options={"ema_teacher": "true"}),
            "ours + soft teacher": Row(("Disjoint",), options=SOFT_TEACHER),
            "ours + source heads": Row(("Disjoint",), options={"source_heads": "true"}),
            "ours, nnU-Net's sampling": Row(("Disjoint",), options={"sampling": "nnunet"}),
            "marginal cross-entropy only": Row(("Disjoint",), "nnUNetTrainerMarginalCrossEntropy"),
            MISSING: Row(("Disjoint",), PLAIN),
            "one model per source, fused": Row(("Anterior", "Posterior"), PLAIN),
            "one model per source, half the budget each": Row(
                ("Anterior", "Posterior"), PLAIN, parts=2
            ),
            "zeros ignored": Row(("ZerosIgnored",), PLAIN),
            "sigmoid, masked BCE": Row(("Disjoint",), "nnUNetTrainerMaskedSigmoid"),
        },
    ),
    "disjoint_longer": Setting(
        "Hippocampus, the two disjoint sources with twice as many steps",
        "hippocampus",
        {
            "oracle": ORACLE,
            "ours": Row(("Disjoint",)),
            MISSING: Row(("Disjoint",), PLAIN),
            "one model per source, half the budget each": Row(
                ("Anterior", "Posterior"), PLAIN, parts=2
            ),
        },
        times=2,
    ),
    "ten_percent": Setting(
        "Hippocampus, every tenth subject complete, the others anterior only",
        "hippocampus",
        {
            "oracle": ORACLE,
            "ours": Row(("TenPercent",)),
            "ours, nnU-Net's sampling": Row(("TenPercent",), options={"sampling": "nnunet"}),
            MISSING: Row(("TenPercent",), PLAIN),
        },
    ),
    "merged": Setting(
        "Hippocampus, half of the subjects complete, the others as one class",
        "hippocampus",
        {"oracle": ORACLE, "ours": Row(("Merged",)), MISSING: Row(("Merged",), PLAIN)},
    ),
    "sparse": Setting(
        "Hippocampus, every 5th plane (one source: ours is nnU-Net's ignore label here)",
        "hippocampus",
        {"oracle": ORACLE, "ours": Row(("Sparse",)), MISSING: Row(("SparseZeros",), PLAIN)},
    ),
    "chaos": Setting(
        "CHAOS, T1 with liver and spleen, T2 with the kidneys; no row mirrors",
        "chaos_sequences",
        {
            "oracle": Row(("Sequences",), PLAIN, SIDES),
            "ours + random contrast": Row(("Organs",), options=ANY_CONTRAST),
            "ours": Row(("Organs",), options=SIDES),
            MISSING: Row(("Organs",), PLAIN, SIDES),
        },
        NEVER,
        one_seed=True,
        note="That every patch has a random contrast was chosen on these test patients "
        "and this seed, with a first form of it.",
    ),
    "chaos_longer": Setting(
        "CHAOS, twice as many steps; ours with random contrast and a late teacher",
        "chaos_sequences",
        {
            "oracle": Row(("Sequences",), PLAIN, SIDES),
            "ours": Row(("Organs",), options=LATE_TEACHER),
        },
        NEVER,
        one_seed=True,
        note="Options were chosen on this seed, by the organs that were hidden in training images, "
        "and with an eye on these test patients.",
        times=2,
    ),
    "chaos_phases": Setting(
        "CHAOS, three times as many steps; T1 training images in phase and out of phase, test in "
        "phase",
        "chaos_phases",
        {
            "oracle": Row(("SequencesPhases",), PLAIN, SIDES),
            "ours": Row(("OrgansPhases",), options=LONG_TEACHER),
        },
        NEVER,
        one_seed=True,
        note="Options as with one phase, but for a teacher that begins at the same step and is "
        "surer of background: chosen by the organs that were hidden in training images, and with "
        "an eye on these test patients. Both runs were ended once and went on from a checkpoint "
        "(epochs 300 and 200 of 360), with the random numbers of the first epochs.",
        times=3,
    ),
}


def budget_of(setting: Setting) -> tuple[str, dict[str, int]]:
    """Return configuration and budget of the rows of a setting that spend it once."""
    configuration, budget = BUDGETS[setting.corpus]
    return configuration, {**budget, "epochs": budget["epochs"] * setting.times}


# ------------------------------------------------------------------ one run


def one_run(work: Path, setting: str, row_name: str, seed: int) -> dict[str, Any]:
    """Train on all training cases, predict the test images without mirroring, and score."""
    start = time.perf_counter()
    corpus, row = SETTINGS[setting].corpus, SETTINGS[setting].rows[row_name]
    configuration, budget = budget_of(SETTINGS[setting])
    budget = {**budget, "epochs": budget["epochs"] // row.parts}
    test = work / f"{corpus}_test"
    several = len(row.datasets) > 1
    folders = []
    for name in row.datasets:
        training = Training(
            dataset_folder(name), configuration, row.trainer, budget, test, row.options
        )
        output = work / "runs" / f"{setting}_{row_name}_{seed}_{name}".replace(" ", "_")
        folders.append(train_and_predict(training, seed, output, probabilities=several))
    predictions = _fuse(folders, test) if several else folders[0]
    return {
        "setting": setting, "row": row_name, "seed": seed,
        "dice_tp_fn": scores(predictions, test),
        **what_it_took(start, *(folder.parent for folder in folders)),
    }  # fmt: skip


def _fuse(folders: Sequence[Path], test: Path) -> Path:
    """Give every voxel the most probable class; each model knows background and one class."""
    import SimpleITK

    output = folders[0].parent / "fused"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    for path in (test / "labelsTs").iterdir():
        stem = path.name.removesuffix(".nii.gz")
        found = [np.load(folder / f"{stem}.npz")["probabilities"] for folder in folders]
        background = np.prod([p[0] for p in found], axis=0)
        label = np.argmax([background, *(p[1] for p in found)], axis=0).astype(np.uint8)
        image = SimpleITK.GetImageFromArray(label)
        image.CopyInformation(SimpleITK.ReadImage(str(path)))
        SimpleITK.WriteImage(image, str(output / path.name), True)
    return output


# ------------------------------------------------------------------ all runs


def result_path(setting: str, row: str, seed: int) -> Path:
    """Return where a run's result goes; rows that train the same share the first one's."""
    asked = _trainings(SETTINGS[setting], SETTINGS[setting].rows[row])
    first, of_first = next(
        (name, of_name)
        for name, other in SETTINGS.items()
        for of_name in other.rows
        if _trainings(other, other.rows[of_name]) == asked
    )
    return FOLDER / file_name(first, of_first, seed)


def _trainings(setting: Setting, row: Row) -> tuple[object, ...]:
    """Return what a row trains: its data, how, and the epochs of each model."""
    epochs = budget_of(setting)[1]["epochs"] // row.parts
    return setting.corpus, row.datasets, row.trainer, row.options, epochs


def all_runs(settings: Sequence[str], seeds: Sequence[int]) -> dict[Path, tuple[str, str, str]]:
    """Return file -> setting, row and seed of every run."""
    runs: dict[Path, tuple[str, str, str]] = {}
    for seed in seeds:
        for setting in settings:
            if SETTINGS[setting].one_seed and seed != seeds[0]:
                continue
            for row in SETTINGS[setting].rows:
                runs.setdefault(result_path(setting, row, seed), (setting, row, str(seed)))
    return runs


# ------------------------------------------------------------------ report


def load(setting: str, row: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the finished runs of a row."""
    paths = [result_path(setting, row, seed) for seed in seeds]
    return [read_json(path) for path in paths if path.is_file()]


def setting_table(name: str, seeds: Sequence[int], subjects: Mapping[str, str]) -> str:
    """Return the table of one setting, or a line that says that there is no run yet."""
    setting = SETTINGS[name]
    plan, budget = budget_of(setting)
    steps = budget["epochs"] * budget["iterations_per_epoch"]
    heading = f"## {setting.title}\n\nPlan {plan}, {steps} steps.\n\n"
    finished = {row: runs for row in setting.rows if (runs := load(name, row, seeds))}
    if "ours" not in finished:
        return f"{heading}No run of ours yet."
    ours = finished["ours"]
    classes = list(next(iter(ours[0]["dice_tp_fn"].values())))
    rows = []
    for row, found in finished.items():
        # Only seeds that both have.
        runs = ours if row == "ours" else _of_seeds(found, ours)
        if runs:
            seeds_of_row = ", ".join(str(run["seed"]) for run in runs)
            reference = ours if row == "ours" else _of_seeds(ours, runs)
            rows.append([row, *comparison_row(runs, reference, subjects), seeds_of_row])
    header = ["row", *classes, "mean Dice", "seeds from - to",
              "points against ours [95 %]", "seeds"]  # fmt: skip
    return f"{heading}{table(header, rows)}"


def recall_table(name: str, seeds: Sequence[int]) -> str:
    """Return recall and Dice by sequence and class; nothing without runs of the oracle."""
    setting = SETTINGS[name]
    found = {
        row: {cell: _recall_and_dice(runs, *cell) for cell in _cells(setting, runs)}
        for row in setting.rows
        if (runs := load(name, row, seeds))
    }
    if not setting.never_annotated or "oracle" not in found:
        return ""
    oracle = found["oracle"]
    header = [
        f"{sequence} {key}{' (never)' if key in setting.never_annotated[sequence] else ''}"
        for sequence, key in oracle
    ]
    rows = []
    for row, cells in found.items():
        texts = []
        for cell, (recall, dice) in cells.items():
            share = recall / oracle[cell][0] if oracle[cell][0] else float("nan")
            texts.append(f"{recall:.3f} ({share:.2f}), {dice:.3f}")
        rows.append([row, *texts])
    return (
        "\n\nRecall (its share of the oracle's), Dice; never: no label in any training image of "
        f"the sequence. {setting.note}\n\n{table(['row', *header], rows)}"
    )


def _cells(setting: Setting, runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    classes = next(iter(runs[0]["dice_tp_fn"].values()))
    return [(sequence, key) for sequence in setting.never_annotated for key in classes]


def _recall_and_dice(
    runs: Sequence[Mapping[str, Any]], sequence: str, key: str
) -> tuple[float, float]:
    """Return means over seeds and the cases of a sequence that show the class."""
    found = [
        (tp / (tp + fn), dice)
        for run in runs
        for case, of_classes in run["dice_tp_fn"].items()
        if sequence in case
        for dice, tp, fn in (of_classes[key],)
        if tp + fn > 0
    ]
    recall, dice = np.mean(found, axis=0)
    return float(recall), float(dice)


def _of_seeds(
    runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    seeds = {run["seed"] for run in others}
    return [run for run in runs if run["seed"] in seeds]


def report(seeds: Sequence[int], work: Path) -> str:
    """Return the result page from all finished runs."""
    parts = []
    sources: dict[str, dict[str, Any]] = {}
    for name, setting in SETTINGS.items():
        test_file = work / f"{setting.corpus}_test" / "dataset.json"
        if not test_file.is_file():  # left out by --only
            continue
        test = read_json(test_file)
        parts.append(setting_table(name, seeds, test["subjects"]) + recall_table(name, seeds))
        for row in setting.rows:
            for run in load(name, row, seeds):
                source = {key: run[key] for key in (*provenance(), "threads")}
                sources[footer(source)] = source
    text = "\n\n".join(parts)
    return (
        "# Self-disambiguation against its oracle and its peers\n\n"
        "Made by `python -m benchmarks.self_disambiguation`. All rows of a setting share plan, "
        "steps and seeds (CPU plan, batch 2, AdamW); they are trained on all training cases and "
        "predict unseen subjects without mirroring. Dice: mean over test cases and seeds; "
        'intervals: bootstrap over subjects. "One model per source, fused" spends the budget '
        "twice.\n\n"
        f"{text}\n\nRuns: " + " / ".join(sources) + "\n"
    )


def main() -> None:
    """Prepare what is missing, make the missing runs, write the page."""
    run = ("SETTING", "ROW", "SEED")
    options = parser_of(__doc__, tuple(SETTINGS), seeds=(0, 1, 2), run=run).parse_args()
    work = options.work.resolve()
    use_workspace(work)
    if options.one:
        setting, row, seed = options.one
        FOLDER.mkdir(exist_ok=True)
        write_json(one_run(work, setting, row, int(seed)), result_path(setting, row, int(seed)))
        return
    corpora = {SETTINGS[name].corpus: budget_of(SETTINGS[name])[0] for name in options.only}
    prepare(options.data.resolve(), work, corpora)
    if not options.report:
        runs = all_runs(options.only, options.seeds)
        make_missing("benchmarks.self_disambiguation", runs, work, jobs=options.jobs)
    text = report(options.seeds, work)
    write("self_disambiguation", {"runs": [path.name for path in sorted(FOLDER.iterdir())]}, text)
    print(text)


if __name__ == "__main__":
    main()
