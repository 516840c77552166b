"""Prediction of volumes slice by slice, with centres that travel (clustering_propagation.md, 3)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.interactive_volume import (
    UNDO_LEVELS,
    InteractiveVolume,
)
from nnmosaic.trainers.clustering_propagation.marks import apply_prompts
from nnmosaic.trainers.clustering_propagation.slice_prompts import SlicePrompt
from nnmosaic.trainers.clustering_propagation.smoothing import smooth_
from nnmosaic.trainers.clustering_propagation.sweeps import Sweep
from nnmosaic.trainers.clustering_propagation.travel import blend, travel
from nnmosaic.trainers.clustering_propagation.volume_features import (
    MOST_BYTES,
    VolumeFeatures,
    mirrored_copies,
)
from nnmosaic.trainers.predictor import MosaicPredictor
from nnmosaic.trainers.resumable import plain_network

LOOKED_AT = 4
"""Every how many slices ``centre_out`` looks for the one to start from."""


class PropagationPredictor(MosaicPredictor):
    """nnU-Net's predictor with whole slices and sweeps in the place of a sliding window.

    Attributes
    ----------
    sweep : str
        See `SWEEPS`.
    slice_distance : float
        Millimetres between the slices of the next image.
    prompts : sequence of SlicePrompt
        What a person marked in the next image; it is then swept both ways.
    """

    sweep: Sweep = "both"
    slice_distance: float = 1.0
    prompts: Sequence[SlicePrompt] = ()

    def set_case(self, properties: dict[str, Any], prompts: Sequence[SlicePrompt] = ()) -> None:
        """Say what is known of the next image: what nnU-Net's preprocessor noted, and prompts."""
        axis = self.plans_manager.transpose_forward[0]
        self.slice_distance = float(properties["spacing"][axis])
        self.prompts = prompts

    def volume_features(self, image: Tensor, *, most_bytes: int = MOST_BYTES) -> VolumeFeatures:
        """Return the features of a preprocessed image, (channels, Z, H, W), with this network."""
        axes = self.allowed_mirroring_axes if self.use_mirroring else None
        return VolumeFeatures(
            plain_network(self.network).to(self.device).eval(),
            image,
            patch_size=self.configuration_manager.patch_size,
            copies=mirrored_copies(axes or ()),
            device=self.device,
            most_bytes=most_bytes,
        )

    def interactive_volume(
        self, features: VolumeFeatures, *, undo_levels: int = UNDO_LEVELS
    ) -> InteractiveVolume:
        """Return the volume that marks in the image change."""
        return InteractiveVolume(
            features,
            distance_mm=self.slice_distance,
            pixel_mm=float(np.mean(self.configuration_manager.spacing)),
            undo_levels=undo_levels,
        )

    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Return logits (K, Z, H, W), half precision, of an image (channels, Z, H, W)."""
        features = self.volume_features(input_image)
        if self.prompts:
            volume = self.interactive_volume(features, undo_levels=0)
            apply_prompts(volume, self.prompts, self.label_manager)
            return volume.logits()
        sweeps = ("up", "down") if self.sweep == "both" else (self.sweep,)
        found: Tensor | None = None
        for sweep in sweeps:
            for index, logits in self._swept(features, sweep):
                if found is None:
                    found = logits.new_zeros(len(logits), len(features), *logits.shape[1:])
                again = sweep != sweeps[0]
                found[:, index] = blend(found[:, index], logits, 0.5) if again else logits
        if found is None:
            raise ValueError(f"input_image must have slices, got shape {tuple(input_image.shape)}")
        if self.sweep != "none":
            smooth_(found)
        return found

    def _swept(self, features: VolumeFeatures, sweep: str) -> Iterator[tuple[int, Tensor]]:
        """Yield index and logits (K, H, W) of all slices."""
        ways = self._ways(features, sweep)
        state = features.network.initial_state(len(features.copies))
        before: Tensor | None = None
        for way in ways:
            for slice_ in travel(
                features, way, state, distance_mm=self.slice_distance, before=before
            ):
                if slice_.number == ways[0][0] and sweep != "none":
                    state, before = slice_.state, slice_.logits
                yield slice_.number, slice_.logits

    def _ways(self, features: VolumeFeatures, sweep: str) -> list[Sequence[int]]:
        """Return the orders in which slices are visited; each goes on from the very first slice."""
        last = len(features)
        if sweep == "none":
            return [[index] for index in range(last)]
        if sweep in ("up", "down"):
            return [range(last)[:: 1 if sweep == "up" else -1]]
        start = self._fullest(features)
        return [range(start, last), range(start - 1, -1, -1)]

    def _fullest(self, features: VolumeFeatures) -> int:
        """Return the slice that shows the classes best: presence times area, summed."""
        layout = features.network.layout
        empty = features.network.initial_state(len(features.copies))
        scores = {}
        for index in range(0, len(features), LOOKED_AT):
            ((_, result, _, _),) = travel(features, [index], empty, distance_mm=0)
            seen = result.presence.sigmoid() * layout.areas(result.logits)
            scores[index] = float(seen[:, 0 if layout.regions else 1 :].sum())
        return max(scores, key=scores.__getitem__)
