"""Properties of planning with several sources, on fingerprints without images behind them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.experiment_planning.experiment_planners.residual_unets import (
    residual_encoder_unet_planners as resenc,
)

from nnmosaic.data_conversion.dataset_json import parse_dataset_json
from nnmosaic.planners import mosaic_planner
from nnmosaic.planners.fingerprint import fingerprint_of
from nnmosaic.planners.mosaic_planner import MosaicPlanner, weighted_quantile
from nnmosaic.planners.plans_section import read_section
from nnmosaic.planners.small_machine_planner import SmallMachinePlanner
from nnmosaic.planners.source_statistics import CaseFacts

NAME = "Dataset001_Made"
Geometry = tuple[tuple[int, ...], tuple[float, ...]]

THIN: Geometry = ((40, 90, 80), (1.0, 0.9, 0.9))
THICK: Geometry = ((24, 160, 150), (6.0, 0.8, 0.8))
FLAT: Geometry = ((1, 300, 280), (999.0, 1.0, 1.0))


@pytest.fixture
def planner(
    workspace: Path, make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., MosaicPlanner]:
    """Return a function: source -> geometry of its cases, to a planner for such a dataset."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner cannot stand the 0

    def make(
        sources: Mapping[str, Sequence[Geometry]],
        *,
        cls: type = MosaicPlanner,
        declared: bool = True,
        channel: str = "T1",
        lowest: Mapping[str, float] | None = None,
        empty: str = "",
        **options: Any,
    ) -> MosaicPlanner:
        folder = workspace / "nnUNet_raw" / NAME
        if not folder.is_dir():
            make_dataset(folder, cases=1)
        image = str(folder / "imagesTr" / "case00_0000.nii.gz")
        label = str(folder / "labelsTr" / "case00.nii.gz")
        cases = {
            f"{source}_{i:02d}": geometry
            for source, geometries in sources.items()
            for i, geometry in enumerate(geometries)
        }
        content = {
            "channel_names": {"0": channel},
            "labels": {"background": 0, "bright": 1, "dark": 2},
            "numTraining": len(cases),
            "file_ending": ".nii.gz",
            "dataset": {case: {"images": [image], "label": label} for case in sorted(cases)},
        }
        if declared:
            content["partial_labels"] = {
                "sources": {s: {"pattern": f"^{s}_", "annotated": "all"} for s in sources}
            }
        (folder / "dataset.json").write_text(json.dumps(content))
        rng = np.random.default_rng(0)
        facts = {
            case: CaseFacts(
                shape=shape,
                spacing=list(spacing),
                intensities=[rng.normal(100, 10, 0 if case.startswith(empty or "-") else 50)],
                lowest=[(lowest or {}).get(case.split("_")[0], 0.0)],
                relative_size=1.0,
                objects={1: (20, 1)},
                content=case,
            )
            for case, (shape, spacing) in sorted(cases.items())
        }
        fingerprint = fingerprint_of(facts, parse_dataset_json(content), dict.fromkeys(facts))
        preprocessed = workspace / "nnUNet_preprocessed" / NAME
        preprocessed.mkdir(exist_ok=True)
        (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        result: MosaicPlanner = cls(NAME, **options)
        return result

    return make


@pytest.mark.parametrize("n", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_equal_weights_give_numpys_quantile(n: int, q: float) -> None:
    values = np.random.default_rng(n).integers(0, 5, (n, 3)).astype(float)  # with ties
    np.testing.assert_allclose(
        weighted_quantile(values, np.full(n, 0.3), q), np.quantile(values, q, axis=0), atol=1e-12
    )


def test_a_weighted_quantile_follows_the_weight_and_not_the_order() -> None:
    values, weights = [1.0, 2.0, 3.0, 10.0], [1.0, 1.0, 1.0, 50.0]
    assert float(weighted_quantile(values, weights, 0.5)) > 3.0
    # 1 stands at 0 and 2 at nearly 1 of the weight between the middles of the first and last.
    assert float(weighted_quantile(values, [1e6, 1, 1, 1e-3], 0.5)) == pytest.approx(1.5, abs=1e-3)
    order = [2, 0, 3, 1]
    mixed = weighted_quantile([values[i] for i in order], [weights[i] for i in order], 0.5)
    assert mixed == weighted_quantile(values, weights, 0.5)


def same(plans: dict[str, Any]) -> dict[str, Any]:
    """Return plans without names and without what people read."""
    left_out = ("experiment_planner_used", "plans_name", "nnmosaic")
    text = json.dumps({key: value for key, value in plans.items() if key not in left_out})
    content: dict[str, Any] = json.loads(text.replace(plans["plans_name"], "NAME"))
    return content


@pytest.mark.parametrize(
    "geometries",
    [[THIN] * 5, [THICK] * 5, [THIN], [FLAT] * 5, [THIN, THICK, THICK, THIN, THICK]],
    ids=["isotropic", "anisotropic", "one case", "2D", "mixed"],
)
@pytest.mark.parametrize("declared", [False, True])
def test_one_source_gives_nnunets_plans(
    planner: Callable[..., MosaicPlanner], geometries: list[Geometry], declared: bool
) -> None:
    ours = planner({"A": geometries}, declared=declared).plan_experiment()
    theirs = ExperimentPlanner(NAME, plans_name="stock").plan_experiment()
    assert same(ours) == same(json.loads(json.dumps(theirs)))
    assert "nnmosaic" not in ours


@pytest.mark.parametrize("letter", ["M", "L", "XL"])
def test_residual_presets_are_nnunets(planner: Callable[..., MosaicPlanner], letter: str) -> None:
    own = getattr(mosaic_planner, f"MosaicPlannerResEnc{letter}")
    ours = planner({"A": [THIN] * 5}, cls=own).plan_experiment()
    stock = getattr(resenc, f"nnUNetPlannerResEnc{letter}")(NAME, plans_name="stock")
    assert same(ours) == same(json.loads(json.dumps(stock.plan_experiment())))


def test_large_images_get_a_cascade(planner: Callable[..., MosaicPlanner]) -> None:
    large: Geometry = ((300, 400, 400), (1.0, 0.8, 0.8))
    made = planner({"A": [large] * 5})
    ours = made.plan_experiment()
    assert {"3d_lowres", "3d_cascade_fullres"} < set(ours["configurations"])
    what = [decision.what for decision in made.decisions]
    assert "3d_lowres patch" in what
    assert "3d_lowres" not in what


def test_equal_sources_give_the_plans_of_one(planner: Callable[..., MosaicPlanner]) -> None:
    one = planner({"A": [THICK] * 4}).plan_experiment()
    two = planner({"A": [THICK] * 2, "B": [THICK] * 2}).plan_experiment()
    assert same(one) == same(two)


def test_a_large_source_does_not_dictate(planner: Callable[..., MosaicPlanner]) -> None:
    """9 against 4 + 4 cases, but 3 against 2 + 2 by weight."""
    few = planner({"A": [THIN] * 9, "B": [THICK] * 4, "C": [THICK] * 4})
    weights = dict(zip(["A"] * 9 + ["B"] * 4 + ["C"] * 4, few.case_weights, strict=True))
    assert weights["A"] == pytest.approx(1 / 3)
    assert weights["B"] == pytest.approx(1 / 2)
    assert np.median(few.fingerprint["spacings"], axis=0) == pytest.approx(THIN[1])
    assert few.determine_fullres_target_spacing()[1:] == pytest.approx(THICK[1][1:])
    many = planner({"A": [THIN] * 4, "B": [THICK] * 9}).determine_fullres_target_spacing()
    assert many[1:] == pytest.approx(THICK[1][1:])
    assert many[0] == pytest.approx(1.0)  # the 10th percentile along the thick slices


def test_duplicating_a_source_changes_its_weight_only(
    planner: Callable[..., MosaicPlanner],
) -> None:
    """Two sources of 4 weigh 4, as one of 16 does."""
    twice = planner({"A": [THIN] * 9, "B": [THICK] * 4, "C": [THICK] * 4}).plan_experiment()
    larger = planner({"A": [THIN] * 9, "B": [THICK] * 16})
    as_one = larger.plan_experiment()
    assert (
        twice["configurations"]["3d_fullres"]["spacing"]
        == (as_one["configurations"]["3d_fullres"]["spacing"])
    )
    assert (
        twice["original_median_shape_after_transp"] == as_one["original_median_shape_after_transp"]
    )


def test_permuting_sources_changes_nothing(planner: Callable[..., MosaicPlanner]) -> None:
    one = planner({"A": [THIN] * 7, "B": [THICK] * 4}).plan_experiment()
    other = planner({"B": [THIN] * 7, "A": [THICK] * 4}).plan_experiment()
    assert same(one) == same(other)


def test_scaling_all_spacings_scales_the_target(planner: Callable[..., MosaicPlanner]) -> None:
    def scaled(factor: float) -> np.ndarray:
        thin, thick = (
            (shape, tuple(factor * s for s in spacing)) for shape, spacing in (THIN, THICK)
        )
        made = planner({"A": [thin] * 5, "B": [thick] * 3, "C": [thick, thin, thin]})
        return made.determine_fullres_target_spacing()

    np.testing.assert_allclose(scaled(3.0), 3 * scaled(1.0), rtol=1e-4)


def test_the_section_holds_every_decision_with_its_reason(
    planner: Callable[..., MosaicPlanner],
) -> None:
    plans = planner({"A": [THIN] * 9, "B": [THICK] * 4}).plan_experiment()
    decisions = {d.what: d for d in read_section(json.loads(json.dumps(plans))).decisions}
    assert decisions["target spacing"].reason == "median over the sources, weighted A 60%, B 40%"
    assert decisions["target spacing"].numbers["spacing_of_sources"]["B"]["0.5"] == list(THICK[1])
    assert decisions["3d_fullres batch size"].choice == "2"
    assert not any(decision.warns for decision in decisions.values())


def test_a_ct_channel_with_mr_images_gets_z_score_and_a_warning(
    planner: Callable[..., MosaicPlanner],
) -> None:
    sources = {"A": [THIN] * 3, "B": [THIN] * 3}
    ct = planner(sources, channel="CT", lowest={"A": -1000, "B": -1024}).plan_experiment()
    assert ct["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"]
    mixed = planner(sources, channel="CT", lowest={"A": -1000, "B": 0})
    plans = mixed.plan_experiment()
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["ZScoreNormalization"]
    assert plans["configurations"]["2d"]["normalization_schemes"] == ["ZScoreNormalization"]
    (warning,) = [d for d in mixed.decisions if d.warns]
    assert "images of B have no value below -100" in warning.reason


def test_a_source_without_foreground_plans(planner: Callable[..., MosaicPlanner]) -> None:
    plans = planner({"A": [THIN] * 3, "B": [THIN] * 2}, empty="B").plan_experiment()
    json.dumps(plans, allow_nan=False)


def test_less_memory_and_a_hungry_method_shrink_the_patch(
    planner: Callable[..., MosaicPlanner],
) -> None:
    large: Geometry = ((80, 160, 160), (1.0, 1.0, 1.0))

    def voxels(**options: Any) -> float:
        plans = planner({"A": [large] * 5}, **options).plan_experiment()
        return float(np.prod(plans["configurations"]["3d_fullres"]["patch_size"]))

    full = voxels(gpu_memory_target_in_gb=8)
    hungry = voxels(gpu_memory_target_in_gb=8, memory_factor=2.0)
    assert hungry == voxels(gpu_memory_target_in_gb=4)
    assert hungry < full
    cpu = voxels(cls=SmallMachinePlanner, device="cpu")
    assert voxels(cls=SmallMachinePlanner, device="cpu", size=0.5) < cpu < full
    section = read_section(planner({"A": [THIN] * 5}, memory_factor=2.0).plan_experiment())
    assert section.budget == {"memory_factor": 2.0}


def test_configurations_that_a_user_added_are_kept(
    planner: Callable[..., MosaicPlanner], workspace: Path
) -> None:
    made = planner({"A": [THIN] * 5})
    own = {"inherits_from": "3d_fullres", "batch_size": 9}
    path = workspace / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json"
    path.write_text(json.dumps({"configurations": {"mine": own, "2d": {"old": True}}}))
    configurations = made.plan_experiment()["configurations"]
    assert configurations["mine"] == own
    assert "old" not in configurations["2d"]
