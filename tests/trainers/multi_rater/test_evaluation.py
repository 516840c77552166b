"""Folders of several raters against slow loops over sets of voxels (spec 7.8, invariants 3, 5)."""

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnmosaic.data_conversion.dataset_json import DatasetJson, parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.multi_rater.evaluation import evaluate_raters

RATERS = ("B", "A", "C")  # not in alphabetical order
LABELS = {"background": 0, "core": 1, "rim": 2}
SHAPES = {".nii.gz": (2, 3, 4), ".png": (5, 4)}
Maps = Mapping[str, np.ndarray]
Write = Callable[..., None]


def declared(ending: str = ".nii.gz", **extra: Any) -> DatasetJson:
    content = {"channel_names": {"0": "T1"}, "labels": LABELS, "file_ending": ending}
    content["multirater"] = {"raters": list(RATERS), "identity": "persistent"}
    return parse_dataset_json({**content, **extra})


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "references", tmp_path / "predictions"


@pytest.fixture
def write(folders: tuple[Path, Path], save: Callable[..., None]) -> Write:
    """Return a function that writes one case: annotations, personalised masks, samples, fused."""
    references, predictions = folders

    def write(
        case: str,
        annotations: Maps,
        *,
        masks: Maps | None = None,
        samples: list[np.ndarray] | None = None,
        fused: np.ndarray | None = None,
        probabilities: np.ndarray | None = None,
        ending: str = ".nii.gz",
    ) -> None:
        files = {references / rater: label for rater, label in annotations.items()}
        files |= {predictions / "raters" / rater: m for rater, m in (masks or {}).items()}
        files |= {predictions / "samples" / f"{i:03d}": s for i, s in enumerate(samples or ())}
        if fused is not None:
            files[predictions] = fused
        for folder, label in files.items():
            save(folder / f"{case}{ending}", label)
        if probabilities is not None:
            np.savez_compressed(predictions / f"{case}.npz", probabilities=probabilities)

    return write


def drawing(rng: np.random.Generator, ending: str = ".nii.gz") -> np.ndarray:
    return rng.choice(3, SHAPES[ending], p=[0.5, 0.3, 0.2]).astype(np.uint8)


Region = set[tuple[int, ...]]


def region(label: np.ndarray, value: int) -> Region:
    return {where for where in np.ndindex(label.shape) if label[where] == value}


def dice(a: Region, b: Region) -> float:
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def jaccard_distance(a: Region, b: Region) -> float:
    return 1 - len(a & b) / len(a | b) if a or b else 0.0


def energy(drawn: list[Region], found: list[Region]) -> float:
    def distance(one: list[Region], other: list[Region]) -> float:
        total = 0.0
        for a in one:
            for b in other:
                total += jaccard_distance(a, b)
        return total / len(one) / len(other)

    return 2 * distance(drawn, found) - distance(drawn, drawn) - distance(found, found)


def match(drawn: list[Region], found: list[Region]) -> float:
    few, many = sorted((drawn, found), key=len)
    orders = permutations(many, len(few))
    return max(float(np.mean([dice(*p) for p in zip(few, o, strict=True)])) for o in orders)


def soft(drawn: list[Region], probability: Mapping[tuple[int, ...], float]) -> float:
    scores = []
    for tenths in (1, 3, 5, 7, 9):
        voters = [
            where
            for where in probability
            if sum(where in a for a in drawn) * 10 > tenths * len(drawn)
        ]
        sure = {where for where, p in probability.items() if p > tenths / 10}
        scores.append(dice(set(voters), sure))
    return float(np.mean(scores))


def spread(regions: list[Region]) -> float:
    total = 0.0
    for where in set().union(*regions):
        share = sum(where in one for one in regions) / len(regions)
        total += share * (1 - share)
    return total


def of_samples(annotations: list[np.ndarray], samples: list[np.ndarray]) -> dict[str, float]:
    """Return the scores of one case, by loops."""
    scores: dict[str, list[float]] = {}
    for value in (1, 2):
        drawn = [region(label, value) for label in annotations]
        found = [region(label, value) for label in samples]
        share = {w: sum(w in s for s in found) / len(found) for w in np.ndindex(samples[0].shape)}
        one = {
            "GED": energy(drawn, found),
            "dice_soft": soft(drawn, share),
            "match": match(drawn, found),
            "max_of_annotations": float(np.mean([max(dice(a, s) for s in found) for a in drawn])),
            "max_of_predictions": float(np.mean([max(dice(a, s) for a in drawn) for s in found])),
            "coverage": min(1, len(found) / len(drawn)),
        }
        if spread(drawn):
            one["variance_ratio"] = spread(found) / spread(drawn)
        for key, score in one.items():
            scores.setdefault(key, []).append(score)
    return {key: float(np.mean(values)) for key, values in scores.items()}


def mean_dice(a: np.ndarray, b: np.ndarray) -> float:
    return (dice(region(a, 1), region(b, 1)) + dice(region(a, 2), region(b, 2))) / 2


def part_of_nearest(rater: str, scores: Mapping[str, float]) -> float:
    nearest = [other for other, score in scores.items() if score > max(scores.values()) - 1e-9]
    return (rater in nearest) / len(nearest)


PRESENT = {"c1": "ABC", "c2": "AC", "c3": "B", "c4": "ABC"}


@pytest.mark.parametrize("ending", SHAPES)
@pytest.mark.parametrize("number", [2, 4])
def test_scores_equal_the_loops(
    folders: tuple[Path, Path], write: Write, ending: str, number: int
) -> None:
    rng = np.random.default_rng(number)
    drawn, masks, samples = {}, {}, {}
    for case, raters in PRESENT.items():
        drawn[case] = {rater: drawing(rng, ending) for rater in raters}
        masks[case] = {rater: drawing(rng, ending) for rater in raters}
        samples[case] = [drawing(rng, ending) for _ in range(number)]
        write(case, drawn[case], masks=masks[case], samples=samples[case], ending=ending)
    summary = evaluate_raters(*folders, declared(ending))

    strict = {
        rater: [mean_dice(masks[c][rater], drawn[c][rater]) for c in PRESENT if rater in drawn[c]]
        for rater in RATERS
    }
    assert list(summary["raters"]["Dice"]) == list(RATERS)
    means = {rater: np.mean(scores) for rater, scores in strict.items()}
    assert summary["raters"]["Dice"] == pytest.approx(means)
    assert summary["raters"]["n_cases"] == {"B": 3, "A": 3, "C": 3}
    assert summary["raters"]["Dice_mean"] == pytest.approx(np.mean(list(means.values())))
    sets = [of_samples(list(drawn[c].values()), list(masks[c].values())) for c in PRESENT]
    for key in ("match", "GED"):
        assert summary["raters"][key] == pytest.approx(np.mean([case[key] for case in sets]))

    expected = [of_samples(list(drawn[c].values()), samples[c]) for c in PRESENT]
    assert summary["samples"].pop("number") == number
    assert set(summary["samples"]) == set(expected[0])
    for key, value in summary["samples"].items():
        assert value == pytest.approx(np.mean([case[key] for case in expected if key in case])), key
    for case, scores in zip(summary["metric_per_case"], expected, strict=True):
        assert case["n_raters"] == len(drawn[case["case"]])
        assert case["n_samples"] == number
        assert case["samples"] == pytest.approx(
            {"variance_ratio": float("nan"), **scores}, nan_ok=True
        )

    own = [mean_dice(drawn[c]["A"], drawn[c]["C"]) for c in ("c1", "c2", "c4")]
    assert summary["between_raters"]["A/C"] == {"Dice": pytest.approx(np.mean(own)), "n_cases": 3}
    assert set(summary["between_raters"]) == {"B/A", "B/C", "A/C"}
    parts = [
        part_of_nearest(
            rater, {other: mean_dice(masks[c][rater], a) for other, a in drawn[c].items()}
        )
        for c in PRESENT
        for rater in drawn[c]
        if len(drawn[c]) > 1
    ]
    assert summary["identification"]["score"] == pytest.approx(np.mean(parts))
    assert summary["identification"]["chance"] == pytest.approx(3 / 8)
    json.dumps(summary)


@pytest.mark.parametrize("ending", SHAPES)
def test_probabilities_are_calibrated_and_give_the_soft_dice(
    folders: tuple[Path, Path], write: Write, ending: str
) -> None:
    rng = np.random.default_rng(5)
    drawn = {rater: drawing(rng, ending) for rater in "AB"}
    samples = [drawing(rng, ending) for _ in range(2)]
    probabilities = rng.dirichlet((3, 1, 1), SHAPES[ending]).astype(np.float32)
    probabilities = np.moveaxis(probabilities, -1, 0)
    stored = probabilities if ending == ".nii.gz" else probabilities[:, None]
    fused = probabilities.argmax(0).astype(np.uint8)
    kwargs = {"fused": fused, "probabilities": stored, "ending": ending}
    write("c1", drawn, samples=samples, **kwargs)
    summary = evaluate_raters(*folders, declared(ending))
    expected = np.mean([
        soft(
            [region(label, value) for label in drawn.values()],
            {where: float(p) for where, p in np.ndenumerate(probabilities[value])},
        )
        for value in (1, 2)
    ])  # fmt: skip
    assert summary["samples"]["dice_soft"] == pytest.approx(expected)
    assert summary["calibration"]["dice_soft"] == pytest.approx(expected)
    bins: dict[int, list[float]] = {}
    for where in np.ndindex(SHAPES[ending]):
        sure = float(probabilities[(slice(None), *where)].max())
        for label in drawn.values():
            bins.setdefault(min(int(sure * 20), 19), []).append(
                (label[where] == fused[where]) - sure
            )
    gaps = {k: abs(sum(values)) for k, values in bins.items()}
    assert summary["calibration"]["ECE"] == pytest.approx(
        sum(gaps.values()) / (2 * fused.size), abs=1e-6
    )
    assert summary["calibration"]["ACE"] == pytest.approx(
        np.mean([gap / len(bins[k]) for k, gap in gaps.items()]), abs=1e-6
    )
    shutil.rmtree(folders[1] / "samples")
    again = evaluate_raters(*folders, declared(ending))
    assert again["calibration"] == summary["calibration"]
    assert "samples" not in again


def test_shares_of_samples_stand_for_probabilities(
    folders: tuple[Path, Path], write: Write
) -> None:
    rng = np.random.default_rng(6)
    drawn = {rater: drawing(rng) for rater in "AB"}
    samples = [drawing(rng) for _ in range(4)]
    write("c1", drawn, samples=samples, fused=samples[0])
    by_shares = evaluate_raters(*folders, declared())
    shares = np.stack([(np.stack(samples) == k).mean(0, dtype=np.float32) for k in range(3)])
    write("c1", drawn, samples=samples, fused=samples[0], probabilities=shares)
    by_probabilities = evaluate_raters(*folders, declared())
    assert by_probabilities["samples"] == by_shares["samples"]
    assert by_probabilities["calibration"].pop("of") == "mean probability"
    assert by_shares["calibration"].pop("of") == "share of samples"
    assert by_probabilities["calibration"] == by_shares["calibration"]


def test_one_rater_per_case(folders: tuple[Path, Path], write: Write) -> None:
    rng = np.random.default_rng(1)
    distances = []
    for case, rater in (("c1", "A"), ("c2", "B")):
        a, own, samples = drawing(rng), drawing(rng), [drawing(rng) for _ in range(3)]
        write(case, {rater: a}, masks={rater: own}, samples=samples)
        for value in (1, 2):
            found = [region(s, value) for s in samples]
            across = np.mean([jaccard_distance(region(a, value), s) for s in found])
            within = np.mean([jaccard_distance(s, t) for s in found for t in found])
            distances.append(2 * across - within)
    summary = evaluate_raters(*folders, declared())
    assert summary["samples"]["GED"] == pytest.approx(np.mean(distances))
    assert np.isnan(summary["samples"]["variance_ratio"])
    assert summary["raters"]["match"] == pytest.approx(summary["raters"]["Dice_mean"])
    assert np.isnan(summary["raters"]["Dice"]["C"])
    assert summary["raters"]["n_cases"]["C"] == 0
    assert summary["between_raters"] == {}
    assert "identification" not in summary


def test_swapping_raters_lowers_only_what_depends_on_their_names(
    folders: tuple[Path, Path], write: Write
) -> None:
    rng = np.random.default_rng(2)
    for case in ("c1", "c2", "c3"):
        drawn = {rater: drawing(rng) for rater in RATERS}
        noise = {rater: drawing(rng) for rater in RATERS}
        keep = rng.random(SHAPES[".nii.gz"]) < 0.7
        masks = {rater: np.where(keep, drawn[rater], noise[rater]) for rater in RATERS}
        write(case, drawn, masks=masks, samples=[drawing(rng) for _ in range(3)])
    before = evaluate_raters(*folders, declared())
    assert before["raters"]["match"] >= before["raters"]["Dice_mean"] - 1e-12
    assert before["samples"]["max_of_annotations"] >= before["samples"]["match"]
    for parent, first, second in (("raters", "A", "B"), ("samples", "000", "002")):
        folder = folders[1] / parent
        (folder / first).rename(folder / "other")
        (folder / second).rename(folder / first)
        (folder / "other").rename(folder / second)
    after = evaluate_raters(*folders, declared())
    assert after["raters"]["Dice_mean"] < before["raters"]["Dice_mean"] - 0.1
    assert after["identification"]["score"] <= before["identification"]["score"] - 0.5
    for key in ("match", "GED"):
        assert after["raters"][key] == pytest.approx(before["raters"][key])
    assert after["samples"] == pytest.approx(before["samples"])


def test_masks_that_are_the_annotations_are_perfect(
    folders: tuple[Path, Path], write: Write
) -> None:
    rng = np.random.default_rng(3)
    for case in ("c1", "c2"):
        drawn = {rater: drawing(rng) for rater in RATERS}
        write(case, drawn, masks=drawn, samples=list(drawn.values()))
    summary = evaluate_raters(*folders, declared())
    assert summary["raters"]["Dice"] == dict.fromkeys(RATERS, 1)
    assert summary["identification"]["score"] == 1
    assert summary["samples"]["GED"] == pytest.approx(0)
    assert summary["samples"]["variance_ratio"] == pytest.approx(1)
    assert summary["samples"]["dice_soft"] == 1


def test_the_mask_of_an_absent_rater_changes_nothing(
    folders: tuple[Path, Path], write: Write
) -> None:
    rng = np.random.default_rng(4)
    drawn = {rater: drawing(rng) for rater in "AB"}
    masks = {rater: drawing(rng) for rater in RATERS}
    write("c1", drawn, masks=masks)
    with_mask = evaluate_raters(*folders, declared())
    shutil.rmtree(folders[1] / "raters" / "C")
    assert str(evaluate_raters(*folders, declared())) == str(with_mask)  # NaN is not NaN


def test_one_prediction_is_held_against_every_rater(
    folders: tuple[Path, Path], write: Write
) -> None:
    rng = np.random.default_rng(6)
    dice_of: dict[str, list[float]] = {}
    for case, raters in PRESENT.items():
        drawn, fused = {rater: drawing(rng) for rater in raters}, drawing(rng)
        write(case, drawn, fused=fused)
        for rater, label in drawn.items():
            dice_of.setdefault(rater, []).append(mean_dice(label, fused))
    summary = evaluate_raters(*folders, declared())
    expected = {rater: np.mean(scores) for rater, scores in dice_of.items()}
    assert summary["raters"].pop("Dice") == pytest.approx(expected)
    assert summary["raters"] == {
        "personalised": False,
        "n_cases": {"B": 3, "A": 3, "C": 3},
        "Dice_mean": pytest.approx(np.mean(list(expected.values()))),
    }
    assert not {"identification", "samples", "calibration"} & set(summary)


def test_empty_label_maps_agree(folders: tuple[Path, Path], write: Write) -> None:
    empty = np.zeros((2, 3, 4), np.uint8)
    write("c1", {"A": empty, "B": empty}, masks={"A": empty, "B": empty}, samples=[empty, empty])
    summary = evaluate_raters(*folders, declared())
    assert summary["raters"]["Dice_mean"] == 1
    assert summary["samples"]["GED"] == 0
    assert summary["samples"]["dice_soft"] == 1
    assert summary["identification"]["score"] == 0.5  # nobody can be told apart


def test_cases_of_one_side_only_are_left_out(folders: tuple[Path, Path], write: Write) -> None:
    label = drawing(np.random.default_rng(7))
    for case in ("c1", "c2", "c3"):
        write(case, {"A": label}, fused=label)
    (folders[1] / "c2.nii.gz").unlink()
    (folders[0] / "A" / "c3.nii.gz").unlink()
    summary = evaluate_raters(*folders, declared())
    assert (summary["n_cases"], summary["not_predicted"]) == (1, ["c2"])
    assert summary["identity"] == "persistent"
    slots = {"raters": list(RATERS), "identity": "exchangeable"}
    assert evaluate_raters(*folders, declared(multirater=slots))["identity"] == "exchangeable"


@pytest.fixture
def two_cases(folders: tuple[Path, Path], write: Write) -> tuple[Path, Path]:
    """Everything there can be of two cases with two raters and two samples."""
    rng = np.random.default_rng(8)
    for case in ("c1", "c2"):
        maps = {rater: drawing(rng) for rater in "AB"}
        probabilities = np.full((3, 2, 3, 4), 1 / 3)
        samples = list(maps.values())
        kinds = {"masks": maps, "samples": samples, "fused": maps["A"]}
        write(case, maps, probabilities=probabilities, **kinds)
    assert evaluate_raters(*folders, declared())["n_cases"] == 2
    return folders


@pytest.mark.parametrize("gone", ["samples/001/c2.nii.gz", "raters/B/c2.nii.gz", "c2.npz"])
def test_incomplete_predictions_are_named(two_cases: tuple[Path, Path], gone: str) -> None:
    (two_cases[1] / gone).unlink()
    with pytest.raises(InputError, match=f"{gone} does not exist, but .* Predict the case again"):
        evaluate_raters(*two_cases, declared())


@pytest.mark.parametrize("where", [0, 1])
def test_folders_of_unknown_raters_are_refused(two_cases: tuple[Path, Path], where: int) -> None:
    stranger = (two_cases[0], two_cases[1] / "raters")[where] / "D"
    stranger.mkdir()
    with pytest.raises(InputError, match=r"D belongs to no rater of dataset\.json.* B, A, C\. Ren"):
        evaluate_raters(*two_cases, declared())


def test_files_of_another_grid_or_label_are_refused(
    two_cases: tuple[Path, Path], save: Callable[..., None]
) -> None:
    path = two_cases[1] / "samples" / "001" / "c2.nii.gz"
    save(path, np.zeros((2, 3, 5), np.uint8))
    with pytest.raises(InputError, match=r"001/c2\.nii\.gz has the shape 2 x 3 x 5, .* 2 x 3 x 4"):
        evaluate_raters(*two_cases, declared())
    save(path, np.zeros((2, 3, 4), np.uint8), spacing=(2, 2, 2))
    with pytest.raises(InputError, match=r"001/c2\.nii\.gz has another spacing"):
        evaluate_raters(*two_cases, declared())
    save(path, np.full((2, 3, 4), 3, np.uint8))
    with pytest.raises(InputError, match="holds the label value 3"):
        evaluate_raters(*two_cases, declared())


def test_probabilities_that_do_not_fit_are_refused(two_cases: tuple[Path, Path]) -> None:
    path = two_cases[1] / "c1.npz"
    np.savez(path, probabilities=np.zeros((2, 2, 3, 4)))
    with pytest.raises(InputError, match=r"shape \(2, 2, 3, 4\), expected \(3, 2, 3, 4\)"):
        evaluate_raters(*two_cases, declared())
    np.savez(path, softmax=np.zeros(1))
    with pytest.raises(InputError, match=r"c1\.npz holds no probabilities"):
        evaluate_raters(*two_cases, declared())
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(InputError, match=r"c1\.npz holds no probabilities"):
        evaluate_raters(*two_cases, declared())


def test_folders_with_nothing_to_compare_are_refused(two_cases: tuple[Path, Path]) -> None:
    references, predictions = two_cases
    with pytest.raises(
        InputError, match=r"holds no folder of a rater \(B, A, C\).*labelsTr_raters"
    ):
        evaluate_raters(references / "A", predictions, declared())
    with pytest.raises(InputError, match=r"have no \.nii\.gz file in common"):
        evaluate_raters(references, predictions / "nowhere", declared())


def test_datasets_without_raters_or_with_gaps_are_refused(two_cases: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r'no "multirater".*nnmosaic evaluate'):
        evaluate_raters(*two_cases, declared(multirater=None))
    for labels in ({**LABELS, "ignore": 3}, {**LABELS, "rim": [1, 2]}):
        with pytest.raises(InputError, match="overlapping regions, an ignore label or partial_la"):
            evaluate_raters(*two_cases, declared(labels=labels))
    sources = {"S": {"pattern": "c", "annotated": ["core"]}}
    partly = declared(
        partial_labels={"sources": {**sources, "T": {"pattern": "x", "annotated": "all"}}}
    )
    with pytest.raises(InputError, match="overlapping regions, an ignore label or partial_la"):
        evaluate_raters(*two_cases, partly)
