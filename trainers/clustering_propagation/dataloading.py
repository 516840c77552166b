"""Clips of slices instead of single ones (clustering_propagation.md, 5.2).

nnU-Net draws a slice and a box in it; here neighbours of that slice come along, in the same box.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from threadpoolctl import threadpool_limits
from torch import Tensor

GAPS = (1, 2, 3)
LARGEST_GAP_MM = 8.0
REPEATED_CLIPS = 0.05
"""Share of clips that show one slice over and over: its mask must not change (invariant 5)."""


def draw_slices(anchor: int, depth: int, spacing: float, number: int) -> list[int]:
    """Draw equidistant slices, one of which is the anchor, in either direction.

    Of a volume with fewer slices the first and the last are repeated: to see a slice again is a
    case like any other.

    Parameters
    ----------
    anchor : int
        A slice that must be among them, at a random place.
    depth : int
        Slices of the volume.
    spacing : float
        Millimetres from slice to slice; gaps are at most `LARGEST_GAP_MM`, or 1 slice.
    number : int
    """
    if np.random.uniform() < REPEATED_CLIPS:
        return [anchor] * number
    places = {
        gap: [
            place
            for place in range(number)
            if anchor >= place * gap and anchor + (number - 1 - place) * gap < depth
        ]
        for gap in GAPS
        if gap == 1 or gap * spacing <= LARGEST_GAP_MM
    }
    possible = [gap for gap, found in places.items() if found]
    gap = possible[np.random.randint(len(possible))] if possible else 1
    found = places[gap] or range(number)
    first = anchor - found[np.random.randint(len(found))] * gap
    slices = [min(max(first + i * gap, 0), depth - 1) for i in range(number)]
    return slices[::-1] if np.random.uniform() < 0.5 else slices


class ClipLoader(nnUNetDataLoader):
    """nnU-Net's 2D loader, whose samples are clips.

    A batch holds "data" (B, C, T, H, W), "target" (B, 1, T, H, W) or of regions (B, R, T, H, W),
    "positions" (B, T), the millimetres of the slices along the axis, and "keys".

    Parameters
    ----------
    slices : int
        Of a clip, T.
    axis : int
        The one of the stored spacing along which slices follow each other.
    """

    def __init__(self, *arguments: Any, slices: int, axis: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.slices, self.axis = slices, axis

    def generate_train_batch(self) -> dict[str, Any]:
        """Return a batch of clips."""
        keys = self.get_indices()
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            clips = [self._clip(key, self.get_do_oversample(j)) for j, key in enumerate(keys)]
        data, target, positions = (torch.stack(parts) for parts in zip(*clips, strict=True))
        return {"data": data, "target": target, "positions": positions, "keys": keys}

    def _clip(self, key: str, force_foreground: bool) -> tuple[Tensor, Tensor, Tensor]:
        data, labels, _, properties = self._data.load_case(key)
        lower, upper = self.get_bbox(
            data.shape[1:], force_foreground, properties["class_locations"]
        )
        spacing = float(properties["spacing"][self.axis])
        slices = draw_slices(int(lower[0]), data.shape[1], spacing, self.slices)
        box = [list(side) for side in zip(lower[1:], upper[1:], strict=True)]
        sample = {
            "image": _read(data, slices, box, fill=0).float(),
            "segmentation": _read(labels, slices, box, fill=-1).to(torch.int16),
        }
        if self.transforms is not None:
            sample = self.transforms(**sample)
        positions = torch.tensor(slices, dtype=torch.float32) * spacing
        return sample["image"].float(), sample["segmentation"], positions


def _read(volume: Any, slices: Sequence[int], box: Sequence[list[int]], *, fill: int) -> Tensor:
    """Return (C, T, H, W): a box of some slices, each read by itself from a stored volume."""
    read = {
        z: torch.from_numpy(crop_and_pad_nd(volume, [[z, z + 1], *box], fill)) for z in set(slices)
    }
    return torch.cat([read[z] for z in slices], 1)


class InPlaneBlur(GaussianBlurTransform):
    """nnU-Net's blur, which does not mix the slices of a clip."""

    @classmethod
    def like(cls, blur: GaussianBlurTransform) -> "InPlaneBlur":
        """Return the same blur within the plane."""
        return cls(
            blur.blur_sigma, blur.synchronize_channels, blur.synchronize_axes,
            blur.p_per_channel, blur.benchmark,
        )  # fmt: skip

    def _benchmark_wrapper(self, img: Tensor, sigma: float, dim_to_blur: int) -> Tensor:
        if dim_to_blur == 0:
            return img
        blurred: Tensor = super()._benchmark_wrapper(img, sigma, dim_to_blur)
        return blurred


def keep_slices_apart(transforms: ComposeTransforms) -> ComposeTransforms:
    """Return nnU-Net's transforms of a clip, with the blur in the plane only."""
    return ComposeTransforms([
        RandomTransform(InPlaneBlur.like(step.transform), step.apply_probability)
        if isinstance(getattr(step, "transform", None), GaussianBlurTransform)
        else step
        for step in transforms.transforms
    ])  # fmt: skip
