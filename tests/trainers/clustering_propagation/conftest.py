"""Small networks of clustering propagation with no path switched off, and sessions with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnmosaic.trainers.clustering_propagation.network import ClusteringPropagationNet
from nnmosaic.trainers.clustering_propagation.session import ClusteringPropagationSession

DIRECTION = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0)

KINDS = [(False, "gru"), (True, "gru"), (False, "last"), (False, "window")]
"""Regions or labels, and the memory."""


@pytest.fixture(
    params=KINDS,
    ids=[f"{'regions' if regions else 'labels'}-{memory}" for regions, memory in KINDS],
)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the options of a network whose volumes must behave as those of every other one."""
    regions, memory = request.param
    return {"regions": regions, "memory": memory}


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
        network.head.reach.fill_(4.0)
        return network.eval()

    return make


@pytest.fixture
def propagation_image(tmp_path: Path, save: Callable[..., None]) -> Path:
    """Write an image with other spacing than the plan, an empty rim and turned axes."""
    array = np.zeros((13, 27, 31), np.float32)
    inside = np.random.default_rng(0).normal(100, 20, (9, 22, 25))
    array[2:11, 3:25, 4:29] = inside
    path = tmp_path / "images" / "new_0000.nii.gz"
    save(path, array, spacing=(1.1, 0.7, 2.0), direction=DIRECTION)
    return path


@pytest.fixture
def propagation_session(
    request: pytest.FixtureRequest, propagation_image: Path
) -> Callable[..., ClusteringPropagationSession]:
    """Return a function that makes a session with that image, of labels or of regions."""

    def make(*, regions: bool = False) -> ClusteringPropagationSession:
        made = ClusteringPropagationSession(torch.device("cpu"))
        name = "region_propagation_model" if regions else "propagation_model"
        made.initialize_from_trained_model_folder(request.getfixturevalue(name))
        reader = made.predictor.plans_manager.image_reader_writer_class()
        made.set_image(*reader.read_images([str(propagation_image)]))
        return made

    return make
