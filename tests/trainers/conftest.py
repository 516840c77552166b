"""What the tests of trainers share."""

from collections.abc import Iterator

import pytest
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform, blur_dimension
from torch import Tensor


@pytest.fixture(autouse=True, scope="session")
def _one_way_to_blur() -> Iterator[None]:
    """Let nnU-Net's augmentation blur by convolution always.

    It times two ways and takes the faster one, which differ in the last bits: on a busy machine,
    equal seeds would not give equal batches.
    """

    def blur(_: GaussianBlurTransform, image: Tensor, sigma: float, dimension: int) -> Tensor:
        return blur_dimension(image, sigma, dimension, force_use_fft=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GaussianBlurTransform, "_benchmark_wrapper", blur)
        yield
