"""Context reconstruction with few labels, against plain nnU-Net at equal steps and equal compute.

``python -m benchmarks.context_reconstruction --data SHARED_DATA`` needs ``msd_task04_hippocampus``
and ``chaos_mr_t2spir`` in that folder. Every run is one JSON file in
``results/context_reconstruction``; finished ones are skipped, so the command can be stopped and
run again. ``--jobs`` run at the same time on their share of the cores. ``--only SETTING`` leaves
out the others.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import self_disambiguation
from benchmarks.grid import (
    Training,
    command,
    comparison_row,
    file_name,
    make_missing,
    mean_dice,
    parser_of,
    preprocess_with_one_plan,
    scores,
    train_and_predict,
    use_workspace,
    what_it_took,
)
from benchmarks.raw_data import write_chaos
from benchmarks.report import RESULTS, footer, provenance, table, write
from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.planners.few_shot import few_shot_folds

FOLDER = RESULTS / "context_reconstruction"
PLAIN, OURS = "nnUNetTrainerMosaic", "nnUNetTrainerContextReconstruction"
SOURCES, BOTH = "nnUNetTrainerSelfDisambiguation", "nnUNetTrainerSelfDisambiguationContext"
HIPPOCAMPUS, PARTIAL, CHAOS = "Dataset611_Full", "Dataset601_Disjoint", "Dataset621_ChaosT2"
PLAIN_ROW, EQUAL = "plain nnU-Net", "equal compute"
PLAIN_EQUAL = f"plain, {EQUAL}"
STEPS_PER_EPOCH = 40
EPOCHS = 30
DRAWS = 3


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes
    ----------
    compute : float
        Steps of this row, in those of the others.
    """

    trainer: str = OURS
    options: Mapping[str, str] = field(default_factory=dict)
    compute: float = 1.0


@dataclass(frozen=True)
class Setting:
    """What is trained on.

    Attributes
    ----------
    cases : int, optional
        Training cases, in each of the draws; None: all, and a draw is only a seed.
    reference : str
        The row that others are compared with.
    epochs : int
        Of a row with compute 1, of `STEPS_PER_EPOCH` steps.
    configuration : str
        Of nnU-Net's plans.
    """

    title: str
    dataset: str
    cases: int | None
    rows: Mapping[str, Row]
    draws: tuple[int, ...] = tuple(range(DRAWS))
    reference: str = PLAIN_ROW
    epochs: int = EPOCHS
    configuration: str = "3d_fullres"


BEFORE_FEW_CASES = {"few_cases": "1000"}
"""What runs did whose file does not name this option: they are older."""
AS_MEANT = {
    "mask_kind": "block", "mask_ratio": "0.4", "mask_min_cells": "6", "mask_fill": "zero",
    "mask_foreground": "false", "mask_per_sample": "true", "mask_curriculum": "false",
    "masked_weight": "1", "masked_fraction": "1", "every_k": "1", "reconstruction": "kl",
    "reconstruction_weight": "0.5", "reconstruction_goal": "teacher",
    "reconstruction_region": "all", "reconstruction_ramp": "0.1", "temperature": "1",
    "momentum": "cosine", "momentum_base": "0.996", "momentum_warmup": "0.01",
    **BEFORE_FEW_CASES,
}  # fmt: skip
"""Every option, so that a row means the same when a default of the trainer changes."""
AS_RELEASED = {
    **AS_MEANT, "mask_kind": "tube", "mask_per_sample": "false", "reconstruction": "mse_over_norm",
    "reconstruction_ramp": "0", "momentum": "released",
}  # fmt: skip
MASKED_ONLY = {**AS_MEANT, "reconstruction_weight": "0"}
COMPUTE_AS_MEANT = 7 / 3
"""A step of the full form, in plain steps (spec 5.5)."""
CANDIDATES: Mapping[str, Mapping[str, str]] = {
    "foreground-aware masks": {"mask_foreground": "true"},
    "foreign tissue": {"mask_fill": "foreign"},
    "ratio curriculum to 0.6": {"mask_ratio": "0.6", "mask_curriculum": "true"},
    "complementary pairs, ratio 0.5": {"mask_ratio": "0.5", "reconstruction_goal": "complement"},
    "hidden voxels only": {"reconstruction_region": "hidden"},
    "larger cells (8)": {"mask_min_cells": "5"},
    "tubes": {"mask_kind": "tube"},
    "ratio 0.6": {"mask_ratio": "0.6"},
    "teacher as mean teacher": {"momentum": "mean_teacher", "momentum_base": "0.99"},
    "every second step": {"every_k": "2"},
    "half of the batch": {"masked_fraction": "0.5"},
    "teacher without masked labels": {"masked_weight": "0", "reconstruction_weight": "1"},
}
"""The search (spec section 7), written down before the first run. All ran on draw 0; on draw 1 only
the two best together did (`COMBINED`)."""
CHOSEN = {**AS_MEANT, "mask_fill": "foreign", "mask_min_cells": "5", "every_k": "2"}
"""The recipe that the search chose."""
COMPUTE_OF_CHOSEN = 5 / 3
CHOSEN_ROW = "foreign tissue, larger cells, every second step"
COMBINED: Mapping[str, Mapping[str, str]] = {
    CHOSEN_ROW: CHOSEN,
    f"{CHOSEN_ROW}, rel_mse": {**CHOSEN, "reconstruction": "rel_mse"},
}
"""The two best of draw 0 together, every second step since a default may take 1.75 plain steps:
written down after draw 0 of the search, and before these ran. The first one was chosen."""
AS_WITH_FEW = "as with few cases"
WITH_ALL_CASES: Mapping[str, Mapping[str, str]] = {
    AS_WITH_FEW: CHOSEN,
    "half the weights": {**CHOSEN, "masked_weight": "0.5", "reconstruction_weight": "0.25"},
    "every fourth step": {**CHOSEN, "every_k": "4"},
    "every 36th step": {**CHOSEN, "every_k": "36"},
}
"""The first had lost 0.8 points with all cases; the next two were written down before they ran. The
last one was a default that had 36 = 2 * 143 / 8 for this many cases: its files were renamed."""
WITH_TEACHER = {**CHOSEN, "few_cases": "8"}
"""Of up to 8 cases: the default has no masked pass with more than 4, since these runs."""
DEFAULT = {**WITH_TEACHER, "reconstruction_weight": "0"}
"""Without teacher: the cheapest that keeps the gain, in "few4" and "confirm"."""
TEACHER_ROW, DEFAULT_ROW = "context reconstruction, with teacher", "context reconstruction"
CONFIRMED = {PLAIN_ROW, PLAIN_EQUAL, TEACHER_ROW, CHOSEN_ROW}
AGAINST = {PLAIN_ROW: Row(PLAIN), PLAIN_EQUAL: Row(PLAIN, compute=COMPUTE_OF_CHOSEN)}
DEFAULT_ROWS = {**AGAINST, DEFAULT_ROW: Row(options=DEFAULT)}
TEACHER_ROWS = {**AGAINST, TEACHER_ROW: Row(options=WITH_TEACHER)}
TEACHER_LONGER_ROW = f"{TEACHER_ROW}, 5/3 of the steps"
LONGER_ROW = f"{DEFAULT_ROW}, 5/3 of the steps"
"""As many steps as `PLAIN_EQUAL`."""
SETTINGS = {
    "few4": Setting(
        "Hippocampus, 4 training cases",
        HIPPOCAMPUS,
        4,
        {
            PLAIN_ROW: Row(PLAIN),
            PLAIN_EQUAL: Row(PLAIN, compute=COMPUTE_AS_MEANT),
            "masked supervision only": Row(options=MASKED_ONLY),
            "teacher as released": Row(options=AS_RELEASED),
            "teacher as meant, kl": Row(options=AS_MEANT),
            "teacher as meant, rel_mse": Row(options={**AS_MEANT, "reconstruction": "rel_mse"}),
        },
    ),
    "search": Setting(
        "Search: hippocampus, 4 training cases",
        HIPPOCAMPUS,
        4,
        {name: Row(options={**AS_MEANT, **options}) for name, options in CANDIDATES.items()},
        draws=(0, 1),
    ),
    "combined": Setting(
        "The best of the search together: hippocampus, 4 training cases (0/0 and 1/1 chose)",
        HIPPOCAMPUS,
        4,
        {name: Row(options=options) for name, options in COMBINED.items()},
    ),
    "confirm": Setting(
        "Hippocampus, 4 training cases, draws on which nothing was chosen",
        HIPPOCAMPUS,
        4,
        {
            **DEFAULT_ROWS,
            **TEACHER_ROWS,
            LONGER_ROW: Row(options=DEFAULT, compute=COMPUTE_OF_CHOSEN),
            TEACHER_LONGER_ROW: Row(options=WITH_TEACHER, compute=COMPUTE_OF_CHOSEN),
        },
        draws=(3, 4, 5),
    ),
    "few2": Setting(
        "Hippocampus, 2 training cases", HIPPOCAMPUS, 2, {**DEFAULT_ROWS, **TEACHER_ROWS}
    ),
    "few8": Setting("Hippocampus, 8 training cases", HIPPOCAMPUS, 8, TEACHER_ROWS),
    "chaos": Setting(
        "CHAOS T2, 3 training patients, 3d_lowres, twice the steps",
        CHAOS,
        3,
        DEFAULT_ROWS,
        draws=(0, 1),
        epochs=2 * EPOCHS,
        configuration="3d_lowres",
    ),
    "partial": Setting(
        "Hippocampus, 8 training cases, some of them anterior only, the others posterior only",
        PARTIAL,
        8,
        {
            "self-disambiguation": Row(SOURCES),
            f"self-disambiguation, {EQUAL}": Row(SOURCES, compute=COMPUTE_OF_CHOSEN),
            f"with {TEACHER_ROW}": Row(BOTH, WITH_TEACHER),
        },
        reference="self-disambiguation",
    ),
    "full": Setting(
        "Hippocampus, all cases (the default has no masked pass there)",
        HIPPOCAMPUS,
        None,
        {PLAIN_ROW: Row(PLAIN), PLAIN_EQUAL: Row(PLAIN, compute=COMPUTE_OF_CHOSEN)},
    ),
    "full_search": Setting(
        "Hippocampus, all cases: what costs accuracy",
        HIPPOCAMPUS,
        None,
        {name: Row(options=options) for name, options in WITH_ALL_CASES.items()},
        draws=(0,),
    ),
    "full_longer": Setting(
        "Hippocampus, all cases, three times the steps",
        HIPPOCAMPUS,
        None,
        {PLAIN_ROW: Row(PLAIN), AS_WITH_FEW: Row(options=CHOSEN)},
        draws=(0,),
        epochs=3 * EPOCHS,
    ),
}
"""The last one since 1200 steps are no plateau with all cases."""


# ------------------------------------------------------------------ data


def prepare_chaos(data: Path, work: Path) -> None:
    """Make and preprocess the CHAOS dataset; every second patient is for testing."""
    write_chaos(data / "chaos_mr_t2spir", work / "nnUNet_raw" / CHAOS, work / "chaos_test")
    preprocess_with_one_plan(work / "nnUNet_preprocessed", [CHAOS], "3d_lowres")


def prepare(data: Path, work: Path, settings: Sequence[str]) -> None:
    """Make and preprocess what the settings need, unless it is there, and add few-shot folds."""
    datasets = {SETTINGS[name].dataset for name in settings}
    if datasets & {HIPPOCAMPUS, PARTIAL}:
        self_disambiguation.prepare(data, work, {"hippocampus"})
        for setting in SETTINGS.values():
            if setting.cases and setting.dataset in (HIPPOCAMPUS, PARTIAL):
                draws = str(max(setting.draws) + 1)
                command("few_shot", "-d", setting.dataset, "--cases", str(setting.cases),
                        "--draws", draws)  # fmt: skip
    if CHAOS in datasets:
        done = work / "chaos_3d_lowres_prepared"
        if not done.is_file():
            prepare_chaos(data, work)
            done.touch()
        command("few_shot", "-d", CHAOS, "--cases", "3", "--draws", str(DRAWS))


def test_folder(work: Path, setting: Setting) -> Path:
    """Return the folder with unseen images."""
    return work / ("chaos_test" if setting.dataset == CHAOS else "hippocampus_test")


# ------------------------------------------------------------------ runs


def one_run(work: Path, name: str, row_name: str, draw: int, seed: int) -> dict[str, Any]:
    """Train, predict unseen subjects without mirroring, and score."""
    start = time.perf_counter()
    setting = SETTINGS[name]
    row = setting.rows[row_name]
    fold: int | str = "all"
    if setting.cases is not None:
        path = work / "nnUNet_preprocessed" / setting.dataset / "splits_final.json"
        wanted = {"cases": setting.cases, "draw": draw}
        fold = next(fold for fold, what in few_shot_folds(path).items() if what == wanted)
    test = test_folder(work, setting)
    training = Training(
        setting.dataset, setting.configuration, row.trainer,
        {"epochs": round(setting.epochs * row.compute), "iterations_per_epoch": STEPS_PER_EPOCH},
        test, row.options, fold,
    )  # fmt: skip
    output = work / "runs" / file_name("context", name, row_name, draw, seed).removesuffix(".json")
    predictions = train_and_predict(training, seed, output)
    return {
        "setting": name, "row": row_name, "draw": draw, "seed": seed,
        "trainer": row.trainer, "options": dict(row.options),
        "dice_tp_fn": scores(predictions, test), **what_it_took(start, output),
    }  # fmt: skip


def result_path(setting: str, row: str, draw: int, seed: int) -> Path:
    """Return where a run's result goes."""
    return FOLDER / file_name(setting, row, draw, seed)


def best_half() -> list[str]:
    """Return the candidates of the search with the highest mean Dice on draw 0, best first."""
    dice = {}
    for row in CANDIDATES:
        found = mean_dice([read_json(result_path("search", row, 0, 0))])
        dice[row] = np.mean(list(found.values()))
    return sorted(CANDIDATES, key=lambda row: -dice[row])[: len(CANDIDATES) // 2]


def runs_of_draw(
    settings: Sequence[str], seeds: Sequence[int], draw: int
) -> dict[Path, tuple[str, ...]]:
    """Return file -> arguments of every run of a draw, which is added to the seed.

    Raises
    ------
    FileNotFoundError
        If the search's runs of draw 0 are missing, and this is another one.
    """
    runs = {}
    for name in settings:
        for seed in seeds if draw in SETTINGS[name].draws else ():
            rows = list(SETTINGS[name].rows)
            if seed:  # a further one confirms what was chosen
                rows = [row for row in rows if row in CONFIRMED]
            elif name == "search" and draw:
                rows = best_half()
            for row in rows:
                run = (name, row, str(draw), str(draw + seed))
                runs[result_path(name, row, draw, draw + seed)] = run
    return runs


# ------------------------------------------------------------------ report


def setting_table(name: str, subjects: Mapping[str, str]) -> str:
    """Return the table of one setting, on the draws and seeds that its reference has, too."""
    setting = SETTINGS[name]
    with_reference = "full" if setting.cases is None else "few4"
    holder = name if setting.reference in setting.rows else with_reference
    runs: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    for path in sorted({*FOLDER.glob(f"{name}__*.json"), *FOLDER.glob(f"{holder}__*.json")}):
        run = read_json(path)
        row_now = setting.rows.get(run["row"]) if run["setting"] == name else None
        if row_now is not None and dict(row_now.options) not in (
            run["options"],
            {**BEFORE_FEW_CASES, **run["options"]},
        ):
            raise RuntimeError(f"{path} was made with other options than its row has. Remove it.")
        runs.setdefault(run["row"], {})[run["draw"], run["seed"]] = run
    drawn = runs.get(setting.reference, {})
    equal = next((row for row in runs if row.endswith(EQUAL) and setting.cases), "")
    rows = []
    classes: list[str] = []
    for row in dict.fromkeys([setting.reference, *setting.rows]):
        both = sorted(set(runs.get(row, {})) & set(drawn))
        if both:
            ours, reference = [runs[row][which] for which in both], [drawn[w] for w in both]
            classes = list(next(iter(ours[0]["dice_tp_fn"].values())))
            compared = comparison_row(
                ours,
                ours if row == setting.reference else reference,
                subjects,
                resample_runs=True,
            )
            as_long = sorted(set(runs[row]) & set(runs.get(equal, {})))
            if row not in (setting.reference, equal) and as_long:
                pairs = ([runs[which][run] for run in as_long] for which in (row, equal))
                compared.append(comparison_row(*pairs, subjects, resample_runs=True)[-1])
            else:
                compared.append("")
            minutes = sum(run["seconds"] for run in ours) / len(ours) / 60
            which = ", ".join(f"{draw}/{seed}" for draw, seed in both)
            rows.append([row, *compared, f"{minutes:.1f}", which])
    if not rows:
        return f"## {setting.title}\n\nNo run of {setting.reference} yet."
    header = ["row", *classes, "mean Dice", "runs from - to",
              f"points against {setting.reference} [95 %]", f"against {EQUAL}", "minutes",
              "draw/seed"]  # fmt: skip
    return f"## {setting.title}\n\n{table(header, rows)}"


def report(work: Path) -> str:
    """Return the result page from all finished runs."""
    parts = []
    sources: dict[str, dict[str, Any]] = {}
    for name, setting in SETTINGS.items():
        test = test_folder(work, setting) / "dataset.json"
        if test.is_file():
            parts.append(setting_table(name, read_json(test)["subjects"]))
    for path in sorted(FOLDER.glob("*.json")):
        run = read_json(path)
        source = {key: run[key] for key in (*provenance(), "threads")}
        sources[footer(source)] = source
    text = "\n\n".join(parts)
    return (
        "# Context reconstruction against plain nnU-Net\n\n"
        "Made by `python -m benchmarks.context_reconstruction`. All rows of a setting share plan "
        f"(CPU plan, batch 2, AdamW), training cases and seeds; {EPOCHS * STEPS_PER_EPOCH} steps "
        "unless the title says otherwise, with equal compute 5/3 of them, in the first three "
        "tables 7/3: what a teacher takes at most; the default, without one, takes 3/2. What more "
        "steps give plain nnU-Net says how far a setting is from a plateau. "
        "They predict unseen subjects without mirroring. Dice: mean over test cases and runs; "
        "intervals: bootstrap over draws and test subjects, of the difference on the same draws "
        "and seeds. Minutes: training and prediction on one core, "
        f"beside another run.\n\n{text}\n\nRuns: " + " / ".join(sources) + "\n"
    )


def main() -> None:
    """Prepare what is missing, make the missing runs, write the page."""
    run = ("SETTING", "ROW", "DRAW", "SEED")
    options = parser_of(__doc__, tuple(SETTINGS), seeds=(0,), run=run).parse_args()
    work = options.work.resolve()
    use_workspace(work)
    FOLDER.mkdir(exist_ok=True)
    if options.one:
        setting, row, draw, seed = options.one
        result = one_run(work, setting, row, int(draw), int(seed))
        write_json(result, result_path(setting, row, int(draw), int(seed)))
        return
    if not options.report:
        prepare(options.data.resolve(), work, options.only)
        for draw in sorted({draw for name in options.only for draw in SETTINGS[name].draws}):
            runs = runs_of_draw(options.only, options.seeds, draw)
            make_missing("benchmarks.context_reconstruction", runs, work, jobs=options.jobs)
    text = report(work)
    write("context_reconstruction", {"runs": [p.name for p in sorted(FOLDER.iterdir())]}, text)
    print(text)


if __name__ == "__main__":
    main()
