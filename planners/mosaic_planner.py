"""nnU-Net's planners for datasets of several sources, with every decision put into words.

A dataset without declared sources gets exactly nnU-Net's plans. With several, target spacing and
median shape follow the sources with weights ∝ √n, so that one large source does not dictate them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.experiment_planning.experiment_planners.residual_unets import (
    residual_encoder_unet_planners as resenc,
)
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.data_conversion.dataset_json import parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.fingerprint import SECTION as FINGERPRINT_SECTION
from nnmosaic.planners.plans_section import (
    Decision,
    PlansSection,
    RaterPlan,
    RunSettings,
    write_section,
)

HOUNSFIELD_AIR = -100.0
"""HU. An image in Hounsfield units holds air or fat below this, an MR image nothing at all."""
NNUNET_CONFIGURATIONS = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")
SMALL_ANISOTROPIC_PERCENTILE = 10
"""nnU-Net's, for the axis with thick slices."""


def weighted_quantile(
    values: Sequence[Any] | np.ndarray, weights: Sequence[float] | np.ndarray, q: float
) -> np.ndarray:
    """Return the q-quantile along the first axis; with equal weights that of np.quantile.

    Sorted values stand at the middle of their weight; between them it is interpolated linearly,
    and the first and last value stand at 0 and 1.

    Parameters
    ----------
    values : array_like, shape (n,) or (n, k)
    weights : array_like, shape (n,)
        Positive.
    """
    columns = np.asarray(values, float).reshape(len(weights), -1)
    result = np.empty(columns.shape[1])
    for axis, column in enumerate(columns.T):
        order = np.lexsort((np.asarray(weights, float), column))
        w = np.asarray(weights, float)[order]
        middle = np.cumsum(w) - w / 2
        span = middle[-1] - middle[0]
        position = (middle - middle[0]) / span if span > 0 else np.zeros(1)
        result[axis] = np.interp(q, position, column[order])
    return result.reshape(np.asarray(values).shape[1:])


class SourceAwareMixin:
    """Planner behaviour for several sources; comes before a planner of nnU-Net.

    Parameters
    ----------
    memory_factor : float
        Memory of a training step of the chosen method / that of plain nnU-Net; patch and batch are
        planned for the memory target divided by it.

    Other parameters are nnU-Net's. The fingerprint must be nnMosaic's.
    """

    dataset_fingerprint: dict[str, Any]
    dataset_json: dict[str, Any]
    dataset_name: str
    overwrite_target_spacing: Any
    anisotropy_threshold: float
    plans_identifier: str
    UNet_vram_target_GB: float
    UNet_reference_val_corresp_GB: float
    UNet_reference_val_2d: float
    UNet_reference_val_3d: float
    UNet_reference_val_corresp_bs_2d: float
    UNet_reference_val_corresp_bs_3d: float
    lowres_creation_threshold: float
    max_dataset_covered: float
    UNet_min_batch_size: int

    def __init__(self, *arguments: Any, memory_factor: float = 1.0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.memory_gb = self.UNet_vram_target_GB
        self.memory_factor = memory_factor
        self.UNet_vram_target_GB = self.memory_gb / memory_factor
        self.fingerprint = self.dataset_fingerprint
        if FINGERPRINT_SECTION not in self.fingerprint:
            raise InputError(
                f"The fingerprint of {self.dataset_name} was made by nnU-Net. Run nnmosaic "
                "plan_and_preprocess, which makes its own."
            )
        self.sources: dict[str, Any] = self.fingerprint[FINGERPRINT_SECTION]["sources"]
        dataset = parse_dataset_json(self.dataset_json)
        names = self.fingerprint[FINGERPRINT_SECTION]["inputs"]["cases"]
        source_of = [dataset.source_of(name).source for name in names]
        self.case_weights = np.array([self.sources[s]["cases"] ** -0.5 for s in source_of])
        self.decisions: list[Decision] = []

    @property
    def plans_for_gpu(self) -> bool:
        """Whether the memory target means a GPU."""
        return True

    @property
    def has_several_sources(self) -> bool:
        """Whether sources have to be weighted."""
        return len(self.sources) > 1

    # ---------------------------------------------------------------- what nnU-Net asks

    def determine_fullres_target_spacing(self) -> np.ndarray:
        """Return the target spacing (mm): nnU-Net's rule, on weighted quantiles."""
        if not self.has_several_sources or self.overwrite_target_spacing is not None:
            return np.asarray(super().determine_fullres_target_spacing())  # type: ignore[misc]
        spacings, shapes = self.fingerprint["spacings"], self.fingerprint["shapes_after_crop"]
        target = weighted_quantile(spacings, self.case_weights, 0.5)
        size = weighted_quantile(shapes, self.case_weights, 0.5)
        thick = int(np.argmax(target))
        others = [axis for axis in range(len(target)) if axis != thick]
        in_plane = target[others].max()
        if (
            target[thick] > self.anisotropy_threshold * in_plane
            and size[thick] * self.anisotropy_threshold < size[others].min()
        ):
            column = np.asarray(spacings)[:, thick]
            q = SMALL_ANISOTROPIC_PERCENTILE / 100
            small = float(weighted_quantile(column, self.case_weights, q))
            target[thick] = small if small >= in_plane else in_plane + 1e-5
        return target

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(
        self,
    ) -> tuple[list[str], list[bool]]:
        """Return nnU-Net's schemes; z-score for a CT channel that is not CT in every source."""
        schemes, masks = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()  # type: ignore[misc]
        for channel, scheme in enumerate(schemes):
            if scheme == "CTNormalization" and self._not_hounsfield(channel):
                schemes[channel] = "ZScoreNormalization"
        return schemes, masks

    def plan_experiment(self) -> dict[str, Any]:
        """Plan; several sources appear to nnU-Net as one case of weighted median shape."""
        if self.has_several_sources:
            target = self.determine_fullres_target_spacing()
            shapes = [
                compute_new_shape(shape, spacing, target)
                for shape, spacing in zip(
                    self.fingerprint["shapes_after_crop"], self.fingerprint["spacings"], strict=True
                )
            ]
            median = weighted_quantile(shapes, self.case_weights, 0.5)
            self.dataset_fingerprint = {
                **self.fingerprint,
                "spacings": [target.tolist()],
                "shapes_after_crop": [np.round(median).tolist()],
            }
        plans: dict[str, Any] = super().plan_experiment()  # type: ignore[misc]
        return plans

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Complete the plans and keep them here; the command writes them, in one step.

        nnMosaic's section is added where anything deviates from nnU-Net. Configurations that a user
        added to an older plans file stay, as in nnU-Net; a 3d_lowres of older plans does not.
        """
        forward = plans["transpose_forward"]
        if self.has_several_sources:
            for key, entry, number in (
                ("original_median_spacing_after_transp", "spacings", float),
                ("original_median_shape_after_transp", "shapes_after_crop", round),
            ):
                median = weighted_quantile(self.fingerprint[entry], self.case_weights, 0.5)
                plans[key] = [number(value) for value in median[forward]]
        self.decisions = [*self._decisions(plans), *self._own_decisions(plans)]
        budget, settings = self.budget(), self.run_settings()
        raters = parse_dataset_json(self.dataset_json).raters
        multirater = RaterPlan(raters) if raters else None
        if budget or self.has_several_sources or raters:
            decisions = tuple(self.decisions)
            section = PlansSection(budget, settings, decisions, multirater=multirater)
            write_section(plans, section)
        recursive_fix_for_json_export(plans)
        path = Path(nnUNet_preprocessed) / self.dataset_name / f"{self.plans_identifier}.json"
        if path.is_file():
            added = {
                name: configuration
                for name, configuration in read_json(path)["configurations"].items()
                if name not in NNUNET_CONFIGURATIONS
            }
            plans["configurations"] = {**plans["configurations"], **added}

    # ---------------------------------------------------------------- what is written down

    def budget(self) -> dict[str, Any]:
        """Return what the plans are made to fit into, for the plans; empty: nnU-Net's default."""
        return {} if self.memory_factor == 1 else {"memory_factor": self.memory_factor}

    def run_settings(self) -> RunSettings:
        """Return the training that fits the budget, for the plans."""
        return RunSettings()

    def expected_memory_gb(self, feature_map_values: float, configuration: dict[str, Any]) -> float:
        """Return what a training step takes on a GPU, by nnU-Net's rule of three."""
        is_2d = len(configuration["patch_size"]) == 2
        reference = self.UNet_reference_val_2d if is_2d else self.UNet_reference_val_3d
        batch = (
            self.UNet_reference_val_corresp_bs_2d
            if is_2d
            else self.UNet_reference_val_corresp_bs_3d
        )
        used = feature_map_values * configuration["batch_size"] / (reference * batch)
        return float(used * self.UNet_reference_val_corresp_GB * self.memory_factor)

    def _own_decisions(self, plans: dict[str, Any]) -> list[Decision]:
        if self.memory_factor == 1:
            return []
        return [
            Decision(
                "memory",
                f"{self.UNet_vram_target_GB:.1f} of {self.memory_gb:g} GB",
                f"the method needs {self.memory_factor:g} times the memory of plain nnU-Net",
                {"memory_gb": self.memory_gb, "memory_factor": self.memory_factor},
            )
        ]

    def _decisions(self, plans: dict[str, Any]) -> list[Decision]:
        decisions = [self._spacing_decision(plans), *self._normalisation_decisions(plans)]
        full = plans["configurations"].get("3d_fullres", plans["configurations"]["2d"])
        voxels = float(np.prod(full["median_image_size_in_voxels"]))
        for name, configuration in plans["configurations"].items():
            if name in NNUNET_CONFIGURATIONS and "patch_size" in configuration:
                own = configuration["median_image_size_in_voxels"]
                is_2d = len(own) == 2
                decisions += self._size_decisions(
                    name, configuration, voxels if is_2d else float(np.prod(own))
                )
        if "3d_fullres" in plans["configurations"] and ("3d_lowres" not in plans["configurations"]):
            full = plans["configurations"]["3d_fullres"]
            covered = _covered(full)
            decisions.append(
                Decision(
                    "3d_lowres",
                    "none",
                    f"the 3d_fullres patch covers {covered:.0%} of the median image"
                    + ("" if covered >= self.lowres_creation_threshold else ", close to enough"),
                    {"threshold": self.lowres_creation_threshold},
                )
            )
        return decisions

    def _spacing_decision(self, plans: dict[str, Any]) -> Decision:
        forward = plans["transpose_forward"]
        target = np.asarray(self.determine_fullres_target_spacing())[forward]
        median = np.asarray(plans["original_median_spacing_after_transp"])
        reason = "median over all cases"
        numbers: dict[str, Any] = {"median_spacing": median.tolist()}
        if self.overwrite_target_spacing is not None:
            reason = "given"
        elif self.has_several_sources:
            total = sum(self.case_weights)
            share = {n: s["cases"] ** 0.5 / total for n, s in self.sources.items()}
            reason = "median over the sources, weighted " + ", ".join(
                f"{name} {part:.0%}" for name, part in share.items()
            )
            numbers["spacing_of_sources"] = {n: s["spacing"] for n, s in self.sources.items()}
        if self.overwrite_target_spacing is None and not np.allclose(target, median):
            reason += f"; along the thick slices the {SMALL_ANISOTROPIC_PERCENTILE}th percentile"
        return Decision("target spacing", f"{_by(target)} mm", reason, numbers)

    def _normalisation_decisions(self, plans: dict[str, Any]) -> list[Decision]:
        schemes = next(iter(plans["configurations"].values()))["normalization_schemes"]
        channels = self.dataset_json.get("channel_names") or self.dataset_json["modality"]
        decisions = []
        for channel, (scheme, name) in enumerate(zip(schemes, channels.values(), strict=True)):
            own = {n: s["intensities"][str(channel)] for n, s in self.sources.items()}
            reason = f"for channel {name!r} of dataset.json"
            wrong, apart = self._not_hounsfield(channel), _apart(own)
            warns = False
            if name.casefold() == "ct" and wrong:
                warns = True
                reason = (
                    f"called {name!r}, but most images of {', '.join(wrong)} have no value below "
                )
                reason += f"{HOUNSFIELD_AIR:g}, as Hounsfield units have"
            elif apart and scheme != "ZScoreNormalization":
                warns = True
                reason += f"; but the intensities of {apart[0]} and {apart[1]} lie apart"
            decisions.append(
                Decision(f"normalisation of channel {channel}", scheme, reason, own, warns)
            )
        return decisions

    def _size_decisions(
        self, name: str, configuration: dict[str, Any], voxels_of_image: float
    ) -> list[Decision]:
        median = configuration["median_image_size_in_voxels"]
        covered = _covered(configuration)
        batch = configuration["batch_size"]
        patch = Decision(
            f"{name} patch",
            _by(configuration["patch_size"]),
            f"covers {covered:.0%} of the median image"
            + ("" if covered >= 1 else f", bounded by {self._bound()}"),
            {"median_image_size_in_voxels": list(median)},
        )
        voxels = voxels_of_image * self.dataset_json["numTraining"]
        most = round(voxels * self.max_dataset_covered / np.prod(configuration["patch_size"]))
        reason = f"as many as {self._bound()} allows"
        if batch == self.UNet_min_batch_size:
            reason = "nnU-Net's smallest"
        elif batch == most:
            reason = f"{self.max_dataset_covered:.0%} of all voxels in one step"
        numbers = {"bound_by_dataset": most}
        return [patch, Decision(f"{name} batch size", str(batch), reason, numbers)]

    def _bound(self) -> str:
        return f"{self.UNet_vram_target_GB:g} GB"

    def _not_hounsfield(self, channel: int) -> list[str]:
        """Return the sources without air, where others have it."""
        lowest = {
            name: source["intensities"][str(channel)]["lowest_of_image"]
            for name, source in self.sources.items()
        }
        without = [name for name, value in lowest.items() if value > HOUNSFIELD_AIR]
        return without if len(without) < len(lowest) else []


def _apart(sources: dict[str, Any]) -> tuple[str, str] | None:
    """Return two sources of which one's median lies outside the other's 0.5 - 99.5 % range."""
    labelled = {name: source for name, source in sources.items() if "median" in source}
    for name, one in labelled.items():
        for other_name, other in labelled.items():
            low, high = other["percentile_00_5"], other["percentile_99_5"]
            if not low <= one["median"] <= high:
                return name, other_name
    return None


def _covered(configuration: dict[str, Any]) -> float:
    """Return the part of the median image that a patch covers."""
    patch, image = configuration["patch_size"], configuration["median_image_size_in_voxels"]
    return float(np.prod(np.minimum(patch, image)) / np.prod(image))


def _by(values: Any) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


class MosaicPlanner(SourceAwareMixin, ExperimentPlanner):
    """nnU-Net's default planner, aware of sources."""


class MosaicPlannerResEncM(SourceAwareMixin, resenc.nnUNetPlannerResEncM):
    """Residual encoder for 8 GB, aware of sources."""


class MosaicPlannerResEncL(SourceAwareMixin, resenc.nnUNetPlannerResEncL):
    """Residual encoder for 24 GB, aware of sources."""


class MosaicPlannerResEncXL(SourceAwareMixin, resenc.nnUNetPlannerResEncXL):
    """Residual encoder for 40 GB, aware of sources."""
