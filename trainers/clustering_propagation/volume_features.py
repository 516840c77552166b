"""Features of the slices of a volume, worked out when they are asked for.

They do not depend on the centres, so that sweeps and corrections share them
(clustering_propagation.md, 3). Whole slices: centres belong to all of a slice.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, combinations, repeat
from typing import Any

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.features import SliceFeatures
from nnmosaic.trainers.clustering_propagation.nearby import smooth
from nnmosaic.trainers.clustering_propagation.network import ClusteringPropagationNet

BLOCK = 8
"""Slices that go through the U-Net together. Blocks begin at multiples of it, so that the features
of a slice are the same whichever slice was asked for."""
MOST_BYTES = 2**28
"""Of features that are kept; a longer volume works them out again for the second sweep. So memory
does not grow with the volume."""


def mirrored_copies(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the combinations of in-plane axes (0: rows, 1: columns) that a slice is flipped along.

    The first is none of them.
    """
    return [axes_ for n in range(len(axes) + 1) for axes_ in combinations(axes, n)]


class VolumeFeatures:
    """Features of slices and their mirrored copies, each copy a sample of a batch.

    Parameters
    ----------
    network : ClusteringPropagationNet
        In evaluation mode, on ``device``.
    image : Tensor, shape (channels, Z, H, W)
        Preprocessed. Slices are padded with 0, as nnU-Net pads patches.
    patch_size : sequence of int
        Slices are padded to this at least, and to multiples of the strides.
    copies : sequence of tuple of int
        See `mirrored_copies`.
    most_bytes : int
        Of features that are kept; those that were not used for longest go first.
    """

    def __init__(
        self,
        network: ClusteringPropagationNet,
        image: Tensor,
        *,
        patch_size: Sequence[int],
        copies: Sequence[tuple[int, ...]] = ((),),
        device: torch.device,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        strides = torch.tensor(network.encoder.strides).prod(0).tolist()
        self.image, inside = pad_nd_image(
            image, patch_size, "constant", {"value": 0}, True, shape_must_be_divisible_by=strides
        )
        self._inside = (..., *inside[-2:])
        self.network, self.device, self.most_bytes = network, device, most_bytes
        self.copies = [tuple(axis - 2 for axis in axes) for axes in copies]  # of the last two
        self._blocks: OrderedDict[int, list[SliceFeatures]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of slices."""
        return int(self.image.shape[1])

    @property
    def slice_shape(self) -> tuple[int, int]:
        """Rows and columns with padding."""
        return self.image.shape[2], self.image.shape[3]

    def __getitem__(self, index: int) -> SliceFeatures:
        """Return the features of a slice; samples are its mirrored copies."""
        block, place = divmod(index, BLOCK)
        if block not in self._blocks:
            self._blocks[block] = self._encoded(block * BLOCK, self._taken_back())
        self._blocks.move_to_end(block)
        return self._blocks[block][place]

    def intensities(self, index: int) -> Tensor:
        """Return a slice of the image, (channels, H, W), slightly smoothed, without padding."""
        return smooth(self.image[:, index][self._inside].cpu().numpy())

    def autocast(self) -> AbstractContextManager[Any]:
        """Return nnU-Net's autocast: on CUDA only."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def _taken_back(self) -> list[SliceFeatures]:
        """Return the block that was not used for longest, if there is no room for another one.

        Its memory is written again: freed and asked for anew, it would lie in pieces in between
        the network's, and the process would grow with the volume.
        """
        sizes = [sum(map(_bytes, block)) for block in self._blocks.values()]
        if not sizes or len(sizes) < max(1, self.most_bytes // max(sizes)):
            return []
        return self._blocks.popitem(last=False)[1]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _encoded(self, first: int, room: Sequence[SliceFeatures]) -> list[SliceFeatures]:
        slices = self.image[:, first : first + BLOCK].transpose(0, 1).to(self.device)
        with self.autocast():
            found = [self.network.encode(slices.flip(axes)) for axes in self.copies]
        return [
            _joined([features.select(slice(i, i + 1)) for features in found], into)
            for i, into in zip(range(len(slices)), chain(room, repeat(None)), strict=False)
        ]

    def mirrored(self, maps: Tensor) -> Tensor:
        """Return maps (S, H, W), without padding, for all copies: (copies, S, H, W), padded."""
        padded = maps.new_zeros(len(maps), *self.slice_shape)
        padded[self._inside] = maps
        return torch.stack([padded.flip(axes) for axes in self.copies])

    def merged(self, logits: Tensor) -> Tensor:
        """Return the mean of the copies, turned back, without padding: (K, H, W), on the CPU.

        Half precision, as nnU-Net keeps logits.
        """
        return self._turned_back(logits).half().cpu()

    def _turned_back(self, maps: Tensor) -> Tensor:
        back = [one.flip(axes) for one, axes in zip(maps.float(), self.copies, strict=True)]
        return torch.stack(back).mean(0)[self._inside]


def _joined(parts: Sequence[SliceFeatures], into: SliceFeatures | None) -> SliceFeatures:
    """Return one batch of several, in memory of its own; with ``into`` in this one's."""
    tensors = list(zip(*map(_tensors, parts), strict=True))
    if into is not None:
        for pieces, room in zip(tensors, _tensors(into), strict=True):
            torch.cat(pieces, out=room)
        return into
    inputs, values, embeddings = (
        tuple(torch.cat(level) for level in zip(*levels, strict=True))
        for levels in zip(*(part[:3] for part in parts), strict=True)
    )
    return SliceFeatures(inputs, values, embeddings, *map(torch.cat, tensors[-2:]))


def _tensors(features: SliceFeatures) -> list[Tensor]:
    return [*chain(*features[:3]), features.mask_map, features.plain]


def _bytes(features: SliceFeatures) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(features))
