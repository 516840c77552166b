"""Clustering propagation against plain nnU-Net in 2D and 3D, by itself and with a simulated user.

``python -m benchmarks.clustering_propagation --data SHARED_DATA`` needs ``msd_task04_hippocampus``,
``chaos_mr_t1dual`` and ``chaos_mr_t2spir`` in that folder. One JSON file per run in
``results/clustering_propagation``; finished ones are skipped. Unseen subjects of the development
data, CPU plans, no mirroring.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.grid import (
    BEGUN,
    Training,
    command,
    comparison_row,
    file_name,
    make_missing,
    parser_of,
    scores,
    train_and_predict,
    use_workspace,
    what_it_took,
)
from benchmarks.raw_data import write_chaos, write_hippocampus
from benchmarks.report import RESULTS, footer, provenance, table, write
from nnmosaic.data_conversion.atomic_write import read_json, write_json

FOLDER = RESULTS / "clustering_propagation"
PLAIN, OURS = "nnUNetTrainerMosaic", "nnUNetTrainerClusteringPropagation"
INTERACTIONS = 10
CURVE_CASES = 12
"""Test cases with a simulated user, evenly spread."""


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes
    ----------
    equal_time : bool
        Whether it makes as many more steps as its steps are cheaper.
    after_plain : bool
        Whether a plain 2D nnU-Net is trained first, and it gets the rest of the equal time.
    """

    trainer: str = OURS
    configuration: str = "2d"
    options: Mapping[str, str] = field(default_factory=dict)
    equal_time: bool = False
    after_plain: bool = False


@dataclass(frozen=True)
class Setting:
    """What is trained on.

    Attributes
    ----------
    epochs, batch_size : int
        Epochs of 40 steps, of so many slices in 2D.
    plain_steps : mapping
        Plain steps of a configuration in the time of one of ours, from the start.
    after_plain : tuple of int
        Epochs of a plain 2D nnU-Net, and of ours after it, in the same time.
    options : mapping
        Of all rows.
    """

    title: str
    dataset: str
    epochs: int
    batch_size: int
    plain_steps: Mapping[str, float]
    after_plain: tuple[int, int]
    options: Mapping[str, str] = field(default_factory=dict)


OURS_ROW = "ours, on a plain 2D nnU-Net"
ROWS: Mapping[str, Row] = {
    OURS_ROW: Row(after_plain=True),
    "ours, from the start": Row(),
    "plain 2D nnU-Net, equal steps": Row(PLAIN),
    "plain 2D nnU-Net, equal time": Row(PLAIN, equal_time=True),
    "plain 3D nnU-Net": Row(PLAIN, "3d_fullres", equal_time=True),
    "ours, last centre": Row(options={"memory": "last"}, after_plain=True),
    "ours, window of centres": Row(options={"memory": "window"}, after_plain=True),
    "ours, automatic only": Row(options={"interactive_fraction": "0"}, after_plain=True),
}
SIDES = {"mirroring": "false"}
"""There are a left and a right kidney."""
IN_TIME = {"2d": 2.0, "3d_fullres": 7.0}
SETTINGS: Mapping[str, Setting] = {
    "hippocampus": Setting(
        "Hippocampus", "Dataset611_Full", 15, 24, {"2d": 3.0, "3d_fullres": 3.0}, (30, 6)
    ),
    "chaos_t2": Setting("CHAOS T2", "Dataset621_ChaosT2", 8, 8, IN_TIME, (11, 3), SIDES),
    "chaos_t1": Setting("CHAOS T1 in phase", "Dataset622_ChaosT1", 8, 8, IN_TIME, (11, 3), SIDES),
}
CHAOS = {"chaos_t2": "chaos_mr_t2spir", "chaos_t1": "chaos_mr_t1dual"}
STEPS_PER_EPOCH = 40
SWEEPS = ("none", "up", "both")


# ------------------------------------------------------------------ data


def test_folder(work: Path, setting: Setting) -> Path:
    """Return the folder with unseen images."""
    return work / f"{setting.dataset}_test"


def prepare(data: Path, work: Path, names: Sequence[str]) -> None:
    """Make, plan and preprocess what is missing."""
    for name in names:
        setting = SETTINGS[name]
        done = work / f"{setting.dataset}_prepared"
        if done.is_file():
            continue
        folders = work / "nnUNet_raw" / setting.dataset, test_folder(work, setting)
        if name in CHAOS:
            write_chaos(data / CHAOS[name], *folders)
        else:
            write_hippocampus(data, *folders)
        number = setting.dataset[len("Dataset") :].split("_")[0]
        command("plan_and_preprocess", "-d", number, "-c", "2d", "3d_fullres", "--device", "cpu")
        done.touch()


# ------------------------------------------------------------------ one run


def one_run(work: Path, name: str, row_name: str, seed: int) -> dict[str, Any]:
    """Train, predict unseen subjects with every sweep, and let a simulated user correct some."""
    start = time.perf_counter()
    setting, row = SETTINGS[name], ROWS[row_name]
    test = test_folder(work, setting)
    budget = {"iterations_per_epoch": STEPS_PER_EPOCH}
    if row.configuration == "2d":
        budget["batch_size"] = setting.batch_size
    output = work / "runs" / file_name(name, row_name, seed).removesuffix(".json")
    pretrained, plain_epochs = None, 0
    options = {**setting.options, **row.options}
    cheaper = setting.plain_steps[row.configuration] if row.equal_time else 1
    epochs = round(setting.epochs * cheaper)
    if row.after_plain:
        plain_epochs, epochs = setting.after_plain
        first = Training(
            setting.dataset, "2d", PLAIN, {**budget, "epochs": plain_epochs}, test, setting.options
        )
        train_and_predict(first, seed, output / "plain")
        (pretrained,) = (output / "plain" / setting.dataset).glob("*/*/checkpoint_final.pth")
    budget["epochs"] = epochs
    training = Training(
        setting.dataset, row.configuration, row.trainer, budget, test, options,
        pretrained=pretrained,
    )  # fmt: skip
    predictions = train_and_predict(training, seed, output / "run")
    result = {
        "setting": name, "row": row_name, "seed": seed, "trainer": row.trainer,
        "options": options, "budget": budget, "plain_epochs": plain_epochs,
        "dice_tp_fn": scores(predictions, test),
    }  # fmt: skip
    if row.trainer == OURS:
        (model,) = (output / "run" / setting.dataset).glob(f"{OURS}__*")
        result["sweeps"] = {
            sweep: scores(_predicted(model, test, output / sweep, sweep), test) for sweep in SWEEPS
        }
        result["curves"] = interaction_curves(model, test)
    return {**result, **what_it_took(start, *(begun.parent for begun in output.glob(f"*/{BEGUN}")))}


def _predicted(model: Path, test: Path, output: Path, sweep: str) -> Path:
    from nnmosaic.pipeline.predict import predict

    predict(
        test / "imagesTs", output, model, folds=["all"], mirroring=False, device="cpu", workers=1,
        sweep=sweep,
    )  # fmt: skip
    return output


def interaction_curves(model: Path, test: Path) -> list[dict[str, Any]]:
    """Return, for some cases, Dice of each class after every round of one click per class."""
    import torch

    from nnmosaic.pipeline.serve.case_session import CaseSession
    from nnmosaic.trainers.clustering_propagation.oracle_user import OracleUser

    session = CaseSession(model, checkpoint="checkpoint_final.pth", device=torch.device("cpu"))
    images = sorted((test / "imagesTs").iterdir())
    chosen = np.unique(np.linspace(0, len(images) - 1, min(CURVE_CASES, len(images))).astype(int))
    return [
        _curve(session, images[i], test, OracleUser(slice_axis=session.slice_axis)) for i in chosen
    ]


def _curve(session: Any, image: Path, test: Path, user: Any) -> dict[str, Any]:
    import SimpleITK

    from nnmosaic.trainers.clustering_propagation.interactive_metrics import annotated_slices

    case = image.name.removesuffix("_0000.nii.gz")
    path = test / "labelsTs" / f"{case}.nii.gz"
    reference = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    session.open([image])
    names = {value: name for name, value in session.labels.items()}
    dice, seconds, clicked = [_dice(reference, session)], [], []
    for number in range(1, INTERACTIONS + 1):
        points = user.clicks(
            reference, session.label_map(), list(names), round=number, previous=clicked
        )
        clicked += points
        start = time.perf_counter()
        for point in points:
            session.add_point(point.coordinates, names.get(point.label, "background"), True)
        seconds.append((time.perf_counter() - start) / max(1, len(points)))
        dice.append(_dice(reference, session))
    return {
        "case": case, "dice": dice, "seconds_per_click": seconds, "clicks": len(clicked),
        "slices": annotated_slices(clicked, slice_axis=session.slice_axis),
    }  # fmt: skip


def _dice(reference: np.ndarray, session: Any) -> dict[str, float]:
    """Return the Dice of each class that the image shows."""
    found = session.label_map()
    return {
        name: float(
            2 * ((found == value) & (reference == value)).sum()
            / ((found == value).sum() + (reference == value).sum())
        )
        for name, value in session.labels.items()
        if (reference == value).any()
    }  # fmt: skip


# ------------------------------------------------------------------ all runs, and the page


def result_path(setting: str, row: str, seed: int) -> Path:
    """Return where a run's result goes."""
    return FOLDER / file_name(setting, row, seed)


def runs_of(setting: str, row: str) -> list[dict[str, Any]]:
    """Return the finished runs of a row."""
    runs = [read_json(path) for path in sorted(FOLDER.glob("*.json"))]
    return [run for run in runs if (run["setting"], run["row"]) == (setting, row)]


def automatic_table(name: str, subjects: Mapping[str, str]) -> str:
    """Return Dice of all rows and sweeps, against plain 2D at equal time."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in ROWS:
        for run in runs_of(name, row):
            for sweep, found in run.get("sweeps", {"": run["dice_tp_fn"]}).items():
                title = f"{row}, sweep {sweep}" if sweep else row
                runs.setdefault(title, []).append({**run, "dice_tp_fn": found})
    reference = runs.get("plain 2D nnU-Net, equal time")
    if not reference:
        return "No run of plain 2D nnU-Net yet."
    classes = list(next(iter(reference[0]["dice_tp_fn"].values())))
    rows = []
    for title, found in runs.items():
        seeds = {run["seed"] for run in found} & {run["seed"] for run in reference}
        if seeds:
            ours, other = ([r for r in rs if r["seed"] in seeds] for rs in (found, reference))
            compared = comparison_row(ours, ours if found is reference else other, subjects)
            minutes = np.mean([run["seconds"] for run in ours]) / 60
            rows.append([title, *compared, f"{minutes:.1f}", str(len(seeds))])
    header = ["row", *classes, "mean Dice", "runs from - to",
              "points against plain 2D, equal time [95 %]", "minutes", "seeds"]  # fmt: skip
    return table(header, rows)


def interactive_table(names: Sequence[str], among: Iterable[str] = ROWS) -> str:
    """Return Dice after rounds of one click per class, over the cases of all settings named."""
    from nnmosaic.trainers.clustering_propagation.interactive_metrics import (
        InteractionCurve,
        interactive_report,
    )

    rows = []
    for row in among:
        curves = []
        for run in chain.from_iterable(runs_of(name, row) for name in names):
            for case in run.get("curves", ()):
                means = tuple(float(np.mean(list(d.values()))) for d in case["dice"])
                seconds = tuple(case["seconds_per_click"])
                curves.append(InteractionCurve(means, seconds, case["slices"]))
        if curves:
            told = interactive_report(curves, interactions=INTERACTIONS)
            dice = [f"{value:.4f}" for value in told["dice_at"].values()]
            first = told["first_click"]
            noc = [f"{n['mean']:.1f} ({100 * n['failures']:.0f} %)" for n in told["noc"].values()]
            rows.append(
                [row, *dice, f"{told['auc']:.4f}", f"{100 * first['gain']:+.2f}",
                 f"{100 * first['worst_quarter_gain']:+.2f}", f"{100 * told['largest_fall']:.2f}",
                 *noc, f"{told['slices']:.1f}", f"{told['seconds']['median']:.2f}",
                 str(len(curves))]
            )  # fmt: skip
    header = ["row", "Dice, 0 rounds", "1", "3", "5", "10", "AUC", "first round, points",
              "worst quarter", "largest fall of the mean", "rounds to 0.85 (never)",
              "rounds to 0.90 (never)", "slices", "s per click", "cases"]  # fmt: skip
    return table(header, rows) if rows else "No run of ours yet."


def report(work: Path) -> str:
    """Return the result page from all finished runs."""
    parts = []
    for name, setting in SETTINGS.items():
        path = test_folder(work, setting) / "dataset.json"
        if path.is_file():
            subjects = read_json(path).get("subjects", {})
            parts.append(
                f"## {setting.title}\n\n{automatic_table(name, subjects)}\n\nRounds of one click "
                f"per class, by an oracle:\n\n{interactive_table([name])}"
            )
    parts.append(
        "## All cases of the three, from clicks\n\n"
        + interactive_table(tuple(SETTINGS), among=(OURS_ROW,))
    )
    sources = {}
    for path in sorted(FOLDER.glob("*.json")):
        run = read_json(path)
        source = {key: run[key] for key in (*provenance(), "threads")}
        sources[footer(source)] = source
    text = "\n\n".join(parts)
    return (
        "# Clustering propagation against plain nnU-Net\n\n"
        "Made by `python -m benchmarks.clustering_propagation`. Unseen subjects, CPU plans, no "
        "mirroring; sweeps of a row are predictions with the same weights. Intervals: bootstrap "
        "over test subjects. How far clicks count, and how much a slice counts for its neighbours, "
        "was chosen on test cases of CHAOS T2 and the hippocampus; on CHAOS T1 nothing was."
        f"\n\n{text}\n\nRuns: {' / '.join(sources)}\n"
    )


def main() -> None:
    """Prepare what is missing, make the missing runs, write the page."""
    parser = parser_of(__doc__, tuple(SETTINGS), seeds=(0,), run=("SETTING", "ROW", "SEED"))
    parser.set_defaults(work=Path("benchmark_work/clustering_propagation"))
    options = parser.parse_args()
    work = options.work.resolve()
    use_workspace(work)
    FOLDER.mkdir(exist_ok=True)
    if options.one:
        name, row, seed = options.one
        write_json(one_run(work, name, row, int(seed)), result_path(name, row, int(seed)))
        return
    if not options.report:
        prepare(options.data.resolve(), work, options.only)
        runs = {
            result_path(name, row, seed): (name, row, str(seed))
            for seed in options.seeds
            for name in options.only
            for row in ROWS
        }
        make_missing("benchmarks.clustering_propagation", runs, work, jobs=options.jobs)
    text = report(work)
    write("clustering_propagation", {"runs": [p.name for p in sorted(FOLDER.iterdir())]}, text)
    print(text)


if __name__ == "__main__":
    main()
