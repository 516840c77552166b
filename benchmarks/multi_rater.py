"""Both stages for many raters against what they must beat, on photographs and in 3D.

``python -m benchmarks.multi_rater``: photographs in three folds by person, and the hippocampus
with three simulated raters, of whom some are missing. One JSON file per run; finished runs are
skipped. The first seed has all rows, further ones those that decide.
"""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.grid import (
    RESAMPLES,
    file_name,
    make_missing,
    parser_of,
    use_workspace,
    what_it_took,
)
from benchmarks.rater_data import (
    PATCH,
    PHOTO_FOLDS,
    TIE,
    Photographs,
    SimulatedRaters,
    keep_largest,
    prepare,
    save_png,
    subjects_file,
    tie_of,
)
from benchmarks.report import RESULTS, footer, provenance, table, write
from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import DatasetJson, parse_dataset_json

FOLDER = RESULTS / "multi_rater"
RADII = range(-4, 5)
"""Voxels by which the best constant morphology may erode (below 0) or dilate a mask."""
PLAIN = "nnUNetTrainerMosaic"
FIRST, SECOND = "nnUNetTrainerMultiRaterDiversified", "nnUNetTrainerMultiRaterPersonalized"
OPTIONS = {
    "probabilistic U-Net": {"bound_weight": "0", "energy_weight": "0", "mean_opinion_weight": "0"},
    "losses as released": {
        "kl_weight": "1", "posterior": "all", "energy_weight": "0", "mean_opinion_weight": "0",
    },
}  # fmt: skip
"""Of first stages other than ours."""
PROBABILISTIC, RELEASED = OPTIONS
OURS, FUSED = "ours", "fused nnU-Net"
FUSED_AS_LONG = "fused nnU-Net, as many steps"
ONE_EACH, RANDOM, SOFT = "one model per rater", "random rater", "soft mean of the raters"
ONE_MASK = {RANDOM: "nnUNetTrainerRandomRater", SOFT: "nnUNetTrainerSoftMean"}
DECISIVE = (FUSED, OURS, PROBABILISTIC, FUSED_AS_LONG)
PHOTO_ROWS = (*DECISIVE, RANDOM, SOFT, ONE_EACH, RELEASED)
"""Ours: both stages, after the fused nnU-Net, with which other first stages begin, too. All that
give one mask, and the models for single raters together, have as many steps as the three. A fused
nnU-Net also makes the row of constant morphology."""
VOLUME_ROWS = (FUSED, OURS, FUSED_AS_LONG)


@dataclass(frozen=True)
class Setting:
    """What is trained on.

    Attributes
    ----------
    dataset : str
        nnU-Net's name of it.
    epochs : tuple of int
        Of the fused nnU-Net, the first and the second stage, of `STEPS` steps.
    reference : str
        The setting whose row "ours" others of the same subjects are held against.
    """

    title: str
    dataset: str
    source: Photographs | SimulatedRaters
    rows: tuple[str, ...]
    folds: int
    epochs: tuple[int, int, int]
    reference: str


STEPS = 50
PEOPLE = [f"Person{person}_{tool}" for person in (1, 3, 4, 5) for tool in ("Amira", "ImageJ")]
CHASE = Photographs(
    "chase_db1", ("vessel",), ("R", "G", "B"),
    {"first": "labels_1stHO/{stem}_1stHO.png", "second": "labels_2ndHO/{stem}_2ndHO.png"},
)  # fmt: skip
BUBIL = Photographs(
    "bubil_rat_cells", ("cell",), ("grey",),
    {name: f"labels/{name}/[sS]eg_{{stem}}.png" for name in PEOPLE}, foreground_is_zero=True,
    single=True,
)  # fmt: skip
MISSING = {"complete": 0.0, "half": 0.5, "quarter": 0.75}
SETTINGS = {
    "chase": Setting(
        "CHASE_DB1: retinal vessels, 2 observers", "Dataset641_Chase", CHASE, PHOTO_ROWS,
        PHOTO_FOLDS, (20, 20, 8), "chase",
    ),
    "bubil": Setting(
        "BU-BIL 1: cells, 4 people x 2 tools", "Dataset642_Bubil", BUBIL, PHOTO_ROWS,
        PHOTO_FOLDS, (20, 20, 8), "bubil",
    ),
    **{
        name: Setting(
            f"Hippocampus, 3 simulated raters, {missing:.0%} of the annotations missing",
            f"Dataset65{i}_{name.capitalize()}", SimulatedRaters(missing), VOLUME_ROWS,
            1, (32, 24, 8), "complete",
        )
        for i, (name, missing) in enumerate(MISSING.items())
    },
}  # fmt: skip


# ------------------------------------------------------------------ one run


def one_run(work: Path, name: str, row: str, fold: int, seed: int) -> dict[str, Any]:
    """Train on one fold, and return how its validation cases are scored."""
    import benchmarks.baselines  # noqa: F401 - registers the peers

    start = time.perf_counter()
    run = Run(work, name, row, fold, seed)
    epochs = run.setting.epochs
    fused, first, second = epochs
    result: dict[str, Any] = {"setting": name, "row": row, "fold": fold, "seed": seed}
    if row == OURS:
        result["diversified"] = run.scored(run.train(FIRST, epochs=first))
        result["personalised"] = run.scored(run.train(SECOND, epochs=second))
    elif row in OPTIONS:
        result["diversified"] = run.scored(run.train(FIRST, epochs=first, options=OPTIONS[row]))
    elif row in ONE_MASK:
        result["one mask"] = run.scored(run.train(ONE_MASK[row], epochs=sum(epochs)))
    elif row == ONE_EACH:
        result["personalised"] = run.scored(run.train_one_each())
    else:
        masks = run.train(PLAIN, epochs=fused if row == FUSED else sum(epochs))
        result["one mask"] = run.scored(masks)
        if isinstance(run.setting.source, Photographs):
            result["morphology"] = run.scored(run.with_morphology(masks))
    subjects = read_json(subjects_file(work, run.setting.dataset))
    return {
        **result,
        "tie": tie_of(work, run.setting.dataset),
        "subjects": subjects,
        "epochs and steps": [*epochs, STEPS],
        **what_it_took(start),
    }


class Run:
    """One row of a setting on one fold."""

    def __init__(self, work: Path, name: str, row: str, fold: int, seed: int) -> None:
        self.setting, self.fold, self.seed = SETTINGS[name], fold, seed
        self.results = work / "results" / f"{name}_{row}_{seed}"
        self.fused = work / "results" / f"{name}_{FUSED}_{seed}" / self.setting.dataset
        self.base = work / "nnUNet_preprocessed" / self.setting.dataset

    @property
    def dataset(self) -> DatasetJson:
        """The dataset that is trained on."""
        return parse_dataset_json(read_json(self.base / "dataset.json"))

    def train(
        self,
        trainer: str,
        *,
        epochs: int,
        options: Mapping[str, str] | None = None,
        steps: int = STEPS,
        into: str = "",
    ) -> Path:
        """Train with so many steps an epoch, and return the folder of the validation cases."""
        from nnmosaic.pipeline.train import is_finished, train
        from nnmosaic.pipeline.workspace import open_workspace
        from nnmosaic.planners.plans_section import RunSettings

        os.environ["nnUNet_results"] = str(self.results / into)
        settings = RunSettings(
            epochs=epochs, iterations_per_epoch=steps,
            val_iterations_per_epoch=1, seed=self.seed, options=options,
        )  # fmt: skip
        configuration = self.setting.source.configuration
        models = self.results / into / self.setting.dataset
        folder = models / f"{trainer}__nnUNetPlans__{configuration}" / f"fold_{self.fold}"
        if not is_finished(folder, trainer, self.dataset):
            train(
                open_workspace(None), self.setting.dataset, configuration, self.fold,
                trainer=trainer, plans_name="nnUNetPlans", settings=settings, device="cpu",
                pretrained_weights=self._begin_with(folder) if trainer == FIRST else None,
            )  # fmt: skip
        return folder / "validation"

    def _begin_with(self, folder: Path) -> Path | None:
        """Return the fused model of the fold, unless its first stage has begun."""
        if any(folder.glob("checkpoint_*.pth")):
            return None
        model = f"{PLAIN}__nnUNetPlans__{self.setting.source.configuration}"
        return self.fused / model / folder.name / "checkpoint_final.pth"

    def train_one_each(self) -> Path:
        """Train a model for each rater, all together with at least as many steps as ours."""
        target = self.results / f"masks_{self.fold}"
        for number, rater in enumerate(self.dataset.raters, start=1):
            masks = self.train(
                "nnUNetTrainerOneRater", epochs=sum(self.setting.epochs),
                options={"rater": str(number)}, steps=-(-STEPS // len(self.dataset.raters)),
                into=rater,
            )  # fmt: skip
            (target / "raters").mkdir(parents=True, exist_ok=True)
            shutil.copytree(masks, target / "raters" / rater, dirs_exist_ok=True)
        return target

    def scored(self, predictions: Path) -> dict[str, Any]:
        """Return the scores of predicted validation cases."""
        from nnmosaic.planners.preprocessing import RATER_REFERENCES_FOLDER
        from nnmosaic.trainers.multi_rater.evaluation import evaluate_raters

        if isinstance(self.setting.source, Photographs) and self.setting.source.single:
            keep_largest(predictions)
        return evaluate_raters(self.base / RATER_REFERENCES_FOLDER, predictions, self.dataset)

    def with_morphology(self, predictions: Path) -> Path:
        """Write fused masks, eroded or dilated by the best radius of each rater.

        The radius is learnt from the fused references and the annotations of the training cases.
        """
        from skimage import io

        from nnmosaic.planners.preprocessing import RATER_REFERENCES_FOLDER

        references = self.base / RATER_REFERENCES_FOLDER
        split = read_json(self.base / "splits_final.json")[self.fold]
        target = predictions.parent / "morphology"
        for rater in self.dataset.raters:
            names = [f"{case}.png" for case in split["train"]]
            fused = [io.imread(self.base / "gt_segmentations" / name) > 0 for name in names]
            drawn = [io.imread(references / rater / name) > 0 for name in names]
            dice = [
                np.mean([_dice(changed(f, r), d) for f, d in zip(fused, drawn, strict=True)])
                for r in RADII
            ]
            radius = RADII[int(np.argmax(dice))]
            for case in split["val"]:
                mask = io.imread(predictions / f"{case}.png") > 0
                save_png(changed(mask, radius), target / "raters" / rater, case)
        return target


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


def runs_of(settings: Sequence[str], seeds: Sequence[int]) -> dict[Path, tuple[str, ...]]:
    """Return file -> arguments of every run; seeds other than 0 have the rows that decide."""
    return {
        result_path(name, row, fold, seed): (name, row, str(fold), str(seed))
        for seed in seeds
        for name in settings
        for row in SETTINGS[name].rows
        if seed == 0 or row in DECISIVE
        for fold in range(SETTINGS[name].folds)
    }


@dataclass(frozen=True)
class Scored:
    """A row of a setting, over its finished folds and seeds."""

    runs: Sequence[Mapping[str, Any]]

    def values(self, part: str, *keys: str) -> dict[str, float]:
        """Return case -> one score, the mean over classes, raters and seeds."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            for case in run.get(part, {}).get("metric_per_case", ()):
                value: Any = case
                for key in keys:
                    value = value[key]
                if isinstance(value, Mapping):
                    value = float(np.mean(list(value.values())))
                found.setdefault(case["case"], []).append(value)
        return {case: float(np.mean(several)) for case, several in found.items()}

    def identified(self, part: str) -> list[str]:
        """Return how often a mask is nearest to its rater, and an annotation to its rater's mask.

        Each with its interval over people, its chance, and what it would be with masks dealt to
        the wrong raters (95 %).
        """
        from nnmosaic.trainers.multi_rater.set_metrics import rater_identification

        cases = [
            case
            for run in self.runs
            for case in run.get(part, {}).get("metric_per_case", ())
            if "Dice_matrix" in case
        ]
        if not cases:
            return ["-", "-"]
        found = []
        for transposed in (False, True):
            matrices = [np.array(case["Dice_matrix"]) for case in cases]
            matrices = [m.T if transposed else m for m in matrices]
            told = rater_identification(matrices)
            scores: dict[str, list[float]] = {}
            for case, matrix in zip(cases, matrices, strict=True):
                if len(matrix) < 2:
                    continue
                score = rater_identification([matrix], swaps=1).score
                scores.setdefault(case["case"], []).append(score)
            mean = {case: float(np.mean(several)) for case, several in scores.items()}
            low, high = told.swapped
            found.append(
                f"{interval(mean, self.subjects(), digits=2)} (chance {told.chance:.2f}, swapped "
                f"{low:.2f} - {high:.2f})"
            )
        return found

    def subjects(self) -> dict[str, str]:
        """Return case -> person."""
        return {case: person for run in self.runs for case, person in run["subjects"].items()}


def finished(name: str, row: str, seeds: Sequence[int]) -> Scored:
    """Return what is there of a row."""
    paths = [path for path, run in runs_of([name], seeds).items() if run[1] == row]
    runs = [read_json(path) for path in paths if path.is_file()]
    epochs = [*SETTINGS[name].epochs, STEPS]
    for run in runs:
        if run["epochs and steps"] != epochs:
            raise RuntimeError(f"{name}, {row}: a run was made with other epochs. Remove its file.")
    return Scored(runs)


def interval(values: Mapping[str, float], people: Mapping[str, str], *, digits: int = 4) -> str:
    """Return the mean over cases, and its 95 % bootstrap interval over people."""
    members: dict[str, list[float]] = {}
    for case, value in values.items():
        members.setdefault(people[case], []).append(value)
    groups = list(members.values())
    rng = np.random.default_rng(0)
    means = [
        np.mean(np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]))
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(means, (2.5, 97.5))
    numbers = (np.mean(list(values.values())), low, high)
    mean, low, high = (f"{number:.{digits}f}" for number in numbers)
    return f"{mean} [{low}, {high}]"


def _against(
    values: Mapping[str, float], reference: Mapping[str, float], people: Mapping[str, str]
) -> str:
    """Return the difference on the cases of both, with its interval."""
    common = {case: value - reference[case] for case, value in values.items() if case in reference}
    return interval(common, people) if common else "-"


def setting_tables(name: str, seeds: Sequence[int]) -> str:
    """Return the tables of a setting from the finished runs."""
    setting = SETTINGS[name]
    reference = finished(setting.reference, OURS, seeds)
    ged = reference.values("diversified", "samples", "GED")
    dice = reference.values("personalised", "raters", "Dice")
    samples, masks = [], []
    for row in setting.rows:
        found = finished(name, row, seeds)
        people, runs = found.subjects(), str(len(found.runs))
        own = found.values("diversified", "samples", "GED")
        if own:
            others = [
                interval(found.values("diversified", "samples", key), people)
                for key in ("dice_soft", "max_of_annotations", "match", "variance_ratio")
            ]
            change = "-" if found.runs == reference.runs else _against(own, ged, people)
            others.append(interval(found.values("diversified", "calibration", "ECE"), people))
            samples.append([row, interval(own, people), change, *others, runs])
        for part in ("personalised", "one mask", "morphology"):
            own = found.values(part, "raters", "Dice")
            if own:
                change = "-" if found.runs == reference.runs else _against(own, dice, people)
                title = f"{row}, constant morphology" if part == "morphology" else row
                masks.append([title, interval(own, people), change, *found.identified(part), runs])
    against = "ours" if setting.reference == name else "ours, complete"
    header = ["samples of the first stage", "GED", f"minus that of {against}", "Dice_soft",
              "Dice_max", "Dice_match", "variance ratio", "ECE", "runs"]  # fmt: skip
    second = ["masks of raters", "Dice_mean, strict", f"minus that of {against}",
              "masks nearest to their rater", "raters nearest to their mask", "runs"]  # fmt: skip
    return f"## {setting.title}\n\n{table(header, samples)}\n\n{table(second, masks)}"


def note_on_ties(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on the runs whose fused references had another rule of ties, if any."""
    old = sorted({run["commit"] for run in runs if run.get("tie") != TIE})
    if not old:
        return ""
    return (
        "In runs made before that rule ties went to the first rater, so that with two observers "
        "the fused reference is the first observer's mask, and the baselines learnt this observer: "
        f"commit {', '.join(old)}. "
    )


def main() -> None:
    """Prepare what is missing, make the missing runs, write the page."""
    run = ("SETTING", "ROW", "FOLD", "SEED")
    parser = parser_of(__doc__, tuple(SETTINGS), seeds=(0,), run=run)
    parser.set_defaults(work=Path("benchmark_work/multi_rater"))
    options = parser.parse_args()
    work = options.work.resolve()
    use_workspace(work)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.one:
        name, row, fold, seed = options.one
        write_json(one_run(work, name, row, int(fold), int(seed)), result_path(*options.one))
        return
    if not options.report:
        for group in dict.fromkeys(SETTINGS[name].reference for name in options.only):
            members = [s for s in SETTINGS.values() if s.reference == group]
            prepare(options.data.resolve(), work, {s.dataset: s.source for s in members})
        runs = runs_of(options.only, options.seeds)
        for fused in (True, False):  # others begin with it
            some = {path: run for path, run in runs.items() if (run[1] == FUSED) == fused}
            make_missing("benchmarks.multi_rater", some, work, jobs=options.jobs)
    sources, contents = {}, [read_json(path) for path in sorted(FOLDER.iterdir())]
    for content in contents:
        source = {key: content[key] for key in (*provenance(), "threads", "epochs and steps")}
        sources[footer(source)] = source
    begun = [
        name for name in SETTINGS
        if any(path.is_file() for path in runs_of([name], options.seeds))
    ]  # fmt: skip
    tables = "\n\n".join(setting_tables(name, options.seeds) for name in begun)
    steps = "; ".join(
        f"{name} {', '.join(str(STEPS * epochs) for epochs in SETTINGS[name].epochs)}"
        for name in SETTINGS
    )
    text = (
        "# Many raters against their baselines\n\nMade by `python -m benchmarks.multi_rater`. "
        f"Photographs: {PHOTO_FOLDS} folds by person, CPU plan with a patch of {PATCH}, half "
        "resolution; of cells, in all rows, the largest component. Hippocampus: every fourth "
        "subject is unseen, and has all raters. Seeds "
        f"{', '.join(map(str, options.seeds))}. Steps of the fused nnU-Net and of both stages: "
        f"{steps}. First stages begin with the fused nnU-Net. Other models with one mask, and "
        "those for single raters together, take as many steps as all three. 10 samples. "
        "Intervals: 95 %, "
        "bootstrap over people, of the mean over seeds. Variance ratio: that of the samples over "
        "that of the raters. ECE: of the share of samples, against every rater. Fused: the "
        f"majority, ties {TIE}. {note_on_ties(contents)}"
        "Strict: the mask of a rater against this rater only; a "
        "model with one mask is held against each. Nearest: the "
        "share of masks whose Dice is highest with their own rater, and of annotations with their "
        "own rater's mask; "
        f"swapped: with masks dealt to the wrong raters, 95 %.\n\n{tables}\n\n"
        f"Runs: {' / '.join(sources)}\n"
    )
    write("multi_rater", {"runs": [path.name for path in sorted(FOLDER.iterdir())]}, text)
    print(text)


if __name__ == "__main__":
    main()
