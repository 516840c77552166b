"""Small networks of clustering propagation in which no path is switched off."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnmosaic.trainers.clustering_propagation.network import ClusteringPropagationNet


@pytest.fixture
def make_network() -> Callable[..., ClusteringPropagationNet]:
    """Return a function that makes a network of 2 channels and 3 classes, in evaluation mode."""

    def make(**options: Any) -> ClusteringPropagationNet:
        torch.manual_seed(0)
        unet = PlainConvUNet(
            2, 3, (4, 8, 8), nn.Conv2d, 3, [(1, 1), (2, 2), (2, 1)], num_classes=3,
            n_conv_per_stage=1, n_conv_per_stage_decoder=1, norm_op=nn.InstanceNorm2d,
            norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
        )  # fmt: skip
        network = ClusteringPropagationNet(
            unet, **{"classes": 3, "regions": False, "memory": "gru", **options}
        )
        for parameter in network.head.parameters():
            if not parameter.detach().any():
                nn.init.normal_(parameter, std=0.3)
        nn.init.constant_(network.head.presence[-1].bias, 2.0)  # what is found is remembered
        return network.eval()

    return make
