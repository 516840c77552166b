"""Plans for machines below nnU-Net's smallest preset: a small GPU, or no GPU at all."""

from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)

from nnmosaic.planners.plans_section import PlansSection, RunSettings, write_section

SMALLEST_PRESET_GB = 8
"""Memory that nnU-Net's default planner and its smallest preset (ResEnc M) are made for."""

FEATURES_FROM_GB = ((6.0, 32), (4.0, 24), (2.0, 16), (0.0, 8))
"""Features of the first stage from this much memory on; the patch then shrinks less than at 32."""

CPU_FEATURES = 8
CPU_ENCODER_CONVOLUTIONS = (1, *(2,) * 13)
CPU_DECODER_CONVOLUTIONS = (1,) * 13
"""One convolution at full resolution and one per decoder stage (as in nnU-Net's ResEnc presets): on
two cores a step takes half the time, and the patch need not shrink."""
CPU_FEATURE_MAP_VALUES = {2: 1.5e6, 3: 4.0e6}
"""Most values in all feature maps of one sample, by dimension. With batch 2 a 3D training step then
takes about 0.2 s on 2 cores (40 x 56 x 40 voxels)."""

CPU_RUN = RunSettings(
    epochs=40,
    iterations_per_epoch=50,
    val_iterations_per_epoch=5,
    optimizer="adamw",
    initial_lr=5e-3,
)
"""2000 steps: about 10 minutes per fold. AdamW comes further than SGD in so few steps."""


class SmallMachinePlanner(ExperimentPlanner):
    """nnU-Net's default planner with features, patch and batch that fit a small budget.

    Spacing, normalisation, topology rules and file format stay nnU-Net's; only the number of
    features and the bound on the size of the feature maps change, so the patch follows from
    nnU-Net's own loop.

    Parameters
    ----------
    dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, \
    overwrite_target_spacing, suppress_transpose
        As in nnU-Net's planner. The memory is used where `device` is not "cpu".
    device : {"cpu", "cuda", "mps"}
        For "cpu" the bound is on time, and a short training is written into the plans.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = SMALLEST_PRESET_GB,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetPlans",
        overwrite_target_spacing: list[float] | None = None,
        suppress_transpose: bool = False,
        *,
        device: str = "cuda",
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        self.device = device
        if device == "cpu":
            self.UNet_base_num_features = CPU_FEATURES
            self.UNet_blocks_per_stage_encoder = CPU_ENCODER_CONVOLUTIONS
            self.UNet_blocks_per_stage_decoder = CPU_DECODER_CONVOLUTIONS
            # nnU-Net scales its reference by memory / 8 GB; here the bound is given directly.
            self.UNet_vram_target_GB = self.UNet_reference_val_corresp_GB
            self.UNet_reference_val_2d = (
                CPU_FEATURE_MAP_VALUES[2] * self.UNet_reference_val_corresp_bs_2d / 2
            )
            self.UNet_reference_val_3d = (
                CPU_FEATURE_MAP_VALUES[3] * self.UNet_reference_val_corresp_bs_3d / 2
            )
        else:
            self.UNet_base_num_features = next(
                features for least, features in FEATURES_FROM_GB if gpu_memory_target_in_gb >= least
            )

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Add nnMosaic's section, then save as nnU-Net does."""
        on_cpu = self.device == "cpu"
        budget = {"device": "cpu"} if on_cpu else {"memory_gb": self.UNet_vram_target_GB}
        write_section(plans, PlansSection(budget, CPU_RUN if on_cpu else RunSettings()))
        super().save_plans(plans)
