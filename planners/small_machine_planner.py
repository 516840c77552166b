"""Plans for machines below nnU-Net's smallest preset: a small GPU, or no GPU at all."""

from typing import Any

from nnmosaic.planners.mosaic_planner import MosaicPlanner
from nnmosaic.planners.plans_section import Decision, RunSettings

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


class SmallMachinePlanner(MosaicPlanner):
    """Features, patch and batch that fit a small budget; all else as `MosaicPlanner` does.

    Only the number of features and the bound on the size of the feature maps change, so the patch
    follows from nnU-Net's own loop.

    Parameters
    ----------
    device : {"cpu", "cuda", "mps"}
        For "cpu" the bound is on time, and a short training is written into the plans.
    size : float
        For "cpu": factor on the bound of the feature maps.

    Other parameters are those of `MosaicPlanner`. The memory is used where `device` is not "cpu".
    """

    def __init__(
        self, *arguments: Any, device: str = "cuda", size: float = 1.0, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.device = device
        if device == "cpu":
            self.UNet_base_num_features = CPU_FEATURES
            self.UNet_blocks_per_stage_encoder = CPU_ENCODER_CONVOLUTIONS
            self.UNet_blocks_per_stage_decoder = CPU_DECODER_CONVOLUTIONS
            # nnU-Net scales its reference by memory / 8 GB; here the bound is given directly.
            self.UNet_vram_target_GB = self.UNet_reference_val_corresp_GB
            self.UNet_reference_val_2d = (
                size * CPU_FEATURE_MAP_VALUES[2] * self.UNet_reference_val_corresp_bs_2d / 2
            )
            self.UNet_reference_val_3d = (
                size * CPU_FEATURE_MAP_VALUES[3] * self.UNet_reference_val_corresp_bs_3d / 2
            )
        else:
            self.UNet_base_num_features = next(
                features
                for least, features in FEATURES_FROM_GB
                if self.UNet_vram_target_GB >= least
            )

    @property
    def plans_for_gpu(self) -> bool:
        """Whether the memory target means a GPU."""
        return self.device != "cpu"

    def budget(self) -> dict[str, Any]:
        """Return the device, or the memory of a small GPU."""
        if self.device == "cpu":
            return {"device": "cpu"}
        return {"memory_gb": self.memory_gb, **super().budget()}

    def run_settings(self) -> RunSettings:
        """Return a short training for a CPU."""
        return CPU_RUN if self.device == "cpu" else super().run_settings()

    def _own_decisions(self, plans: dict[str, Any]) -> list[Decision]:
        if self.device != "cpu":
            reason = f"{self._bound()} are less than nnU-Net's presets need"
            features = Decision("features", f"from {self.UNet_base_num_features}", reason)
            return [features, *super()._own_decisions(plans)]
        run = self.run_settings()
        return [
            Decision("features", f"from {CPU_FEATURES}", "the time of a step on a CPU"),
            Decision(
                "training",
                f"{run.epochs} epochs of {run.iterations_per_epoch} steps, {run.optimizer}, "
                f"learning rate {run.initial_lr:g}",
                "a CPU makes few steps, and AdamW comes further in them than SGD",
            ),
        ]

    def _bound(self) -> str:
        return "the time of a step on a CPU" if self.device == "cpu" else super()._bound()
