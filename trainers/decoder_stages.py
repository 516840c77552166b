"""The outputs of a U-Net's decoder, for methods that put layers of their own on them."""

from typing import Any

import torch
from torch import Tensor


def decoder_stages(encoder: Any, decoder: Any, x: Tensor) -> list[Tensor]:
    """Return what each stage of the decoder finds, coarse to fine.

    Parameters
    ----------
    encoder, decoder : nn.Module
        As dynamic_network_architectures makes them; ``decoder.seg_layers`` is not used.
    x : Tensor, shape (B, channels, *spatial)
    """
    skips = encoder(x)
    found = []
    below = skips[-1]
    for s, stage in enumerate(decoder.stages):
        up = decoder.transpconvs[s](below)
        below = stage(torch.cat((up, skips[-(s + 2)]), 1))
        found.append(below)
    return found
