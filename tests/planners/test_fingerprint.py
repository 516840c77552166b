"""The fingerprint's shortcuts against numpy's own functions."""

import numpy as np
import pytest

from nnmosaic.planners.fingerprint import _intensity_properties


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 100, 101, 200, 201, 999, 20_000])
def test_percentiles_and_extremes_equal_numpys(size: int, dtype: type) -> None:
    for seed in range(20):
        values = np.random.default_rng(seed).normal(1e4, 300, size).astype(dtype)
        properties = _intensity_properties(np.array_split(values, 3))
        expected = np.percentile(values, [0.5, 50.0, 99.5])
        names = ("percentile_00_5", "median", "percentile_99_5")
        assert [properties[name] for name in names] == list(expected)
        assert (properties["min"], properties["max"]) == (values.min(), values.max())
        assert properties["mean"] == float(values.mean())
