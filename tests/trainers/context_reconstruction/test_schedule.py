"""The teacher's momentum (spec section 6, groups 4 and 5)."""

import pytest

from nnmosaic.trainers.context_reconstruction.schedule import cosine_momentum, warmup_momentum


def test_it_rises_from_0_over_the_base_to_1() -> None:
    total, warmup = 90_000, 900
    values = [cosine_momentum(n, total, base=0.996, warmup=warmup) for n in range(0, total, 10)]
    assert values[0] == 0
    assert values == sorted(values)
    assert cosine_momentum(warmup - 1, total, base=0.996, warmup=warmup) == pytest.approx(0.996)
    assert cosine_momentum(warmup, total, base=0.996, warmup=warmup) == pytest.approx(0.996)
    assert cosine_momentum(total - 1, total, base=0.996, warmup=warmup) == pytest.approx(
        1, abs=1e-8
    )


@pytest.mark.parametrize(
    ("index", "warmup", "golden"), [(17, 18 * 50, 0.018834), (249, 500 * 10, 0.049611)]
)
def test_the_released_codes_momentum_stays_near_0(index: int, warmup: int, golden: float) -> None:
    assert warmup_momentum(index, base=0.996, warmup=warmup) == pytest.approx(golden, abs=5e-7)
