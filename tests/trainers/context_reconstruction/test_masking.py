"""Masks: how many cells, which ones, and what stands there (spec section 6, groups 1 - 3)."""

from math import floor, sqrt

import numpy as np
import pytest
import torch

from nnmosaic.trainers.context_reconstruction.masking import (
    block_size,
    check_ratio,
    draw_mask,
    filler,
    foreground_of_cells,
    to_voxels,
)
from nnmosaic.trainers.generator import generator_of


def strides(*stages: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(1,) * len(stages[0]), *stages]


ANISOTROPIC = strides((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))


@pytest.mark.parametrize(
    ("patch", "stages", "expected"),
    [
        ((128,) * 3, strides(*[(2, 2, 2)] * 5), (16, 16, 16)),
        ((20, 256, 224), ANISOTROPIC, (4, 32, 32)),
        ((512, 512), strides(*[(2, 2)] * 7), (64, 64)),
        ((40, 56, 40), strides(*[(2, 2, 2)] * 3), (4, 4, 4)),
        ((8, 8, 8), strides(*[(2, 2, 2)] * 2), (2, 2, 2)),  # too small for 6 cells: floor
    ],
)
def test_the_block_comes_from_the_plan(
    patch: tuple[int, ...], stages: list[tuple[int, ...]], expected: tuple[int, ...]
) -> None:
    assert block_size(patch, stages) == expected


def test_fewer_cells_are_larger() -> None:
    assert block_size((40, 56, 40), strides(*[(2, 2, 2)] * 3), min_cells=5) == (8, 8, 8)


def test_blocks_that_do_not_tile_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Blocks of \[2, 2\] voxels do not tile \[9, 8\]"):
        block_size((9, 8), strides((2, 2)))


GRIDS = [(5, 8, 7), (8, 7)]
KINDS = ("tube", "block", "random_tube")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_count_is_exact_in_every_sample(grid: tuple[int, ...], kind: str) -> None:
    hidden = draw_mask(grid, 6, ratio=0.4, kind=kind, generator=generator_of(1))
    for sample in hidden:
        shares = {
            floor(0.4 * np.prod(plane)) / np.prod(plane)
            for plane in ([np.delete(grid, k) for k in range(3)] if len(grid) == 3 else [grid])
        }
        if kind == "tube" and len(grid) == 3:
            assert sample.sum() == floor(0.4 * 56) * 5
            assert torch.equal(sample, sample[:1].expand_as(sample))
        elif kind == "block" or len(grid) == 2:
            assert sample.sum() == floor(0.4 * sample.numel())
        else:
            assert any(sample.float().mean().item() == pytest.approx(s) for s in shares)
    assert not torch.equal(hidden[0], hidden[1])


def test_random_tubes_run_along_every_axis() -> None:
    grid = (4, 5, 6)
    hidden = draw_mask(grid, 30, ratio=0.4, kind="random_tube", generator=generator_of(2))
    along = [
        sum(torch.equal(m, m.narrow(axis, 0, 1).expand_as(m)) for m in hidden) for axis in range(3)
    ]
    assert sum(along) == 30
    assert min(along) > 2


@pytest.mark.parametrize("ratio", [0.0, 0.01, 1.0])
def test_all_or_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"hides (0|56) of 56 cells.*choose at least 0\.0179"):
        draw_mask((8, 7), 1, ratio=ratio, kind="block", generator=generator_of(0))


def test_every_cell_is_hidden_equally_often_and_no_other_generator_moves() -> None:
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    draws, ratio = 10_000, 0.4
    hidden = draw_mask((5, 8), draws, ratio=ratio, kind="block", generator=generator_of(3))
    frequency = hidden.float().mean(0)
    assert (frequency - ratio).abs().max() < 4 * sqrt(ratio * (1 - ratio) / draws)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_the_draw_depends_on_seed_process_and_iteration_only() -> None:
    def drawn(*counter: int) -> torch.Tensor:
        return draw_mask((8, 7), 2, ratio=0.5, kind="block", generator=generator_of(*counter))

    assert torch.equal(drawn(1, 0, 7), drawn(1, 0, 7))
    for other in ((2, 0, 7), (1, 1, 7), (1, 0, 8)):
        assert not torch.equal(drawn(1, 0, 7), drawn(*other))


def test_foreground_is_hidden_more_often() -> None:
    foreground = torch.zeros(2000, 4, 5)
    foreground[:, 0] = 1
    hidden = draw_mask(
        (4, 5), 2000, ratio=0.4, kind="block", generator=generator_of(4), foreground=foreground
    )
    assert (hidden.flatten(1).sum(1) == 8).all()
    share = hidden.float().mean((0, 2))
    assert share[0] > 0.8
    assert (share[1:] - share[1:].mean()).abs().max() < 0.03
    first = draw_mask(
        (4, 5), 2000, ratio=0.05, kind="block", generator=generator_of(5), foreground=foreground
    )
    odds = first[:, 0].sum() / (first[:, 1:].sum() / 3)
    assert odds == pytest.approx(10, rel=0.15)  # as documented: ten times as likely


def test_tubes_see_the_foreground_along_them() -> None:
    foreground = torch.zeros(500, 3, 4, 4)
    foreground[:, :, 2, 1] = 1
    hidden = draw_mask(
        (3, 4, 4), 500, ratio=0.1, kind="tube", generator=generator_of(6), foreground=foreground
    )
    assert hidden[:, 0].float().mean(0).argmax() == 2 * 4 + 1


@pytest.mark.parametrize("block", [(2, 3), (1, 2, 3)])
def test_voxels_of_a_cell_share_its_fate(block: tuple[int, ...]) -> None:
    grid = (4, 5, 6)[: len(block)]
    cells = draw_mask(grid, 2, ratio=0.5, kind="block", generator=generator_of(7))
    voxels = to_voxels(cells, block)
    assert voxels.shape == (2, 1, *(g * b for g, b in zip(grid, block, strict=True)))
    for where in np.ndindex(*voxels.shape[2:]):
        cell = tuple(w // b for w, b in zip(where, block, strict=True))
        assert torch.equal(voxels[(slice(None), 0, *where)], cells[(slice(None), *cell)])


def test_foreground_of_cells_counts_labels_but_not_ignored_voxels() -> None:
    target = torch.zeros(1, 1, 4, 4)
    target[0, 0, :2, :2] = 2
    target[0, 0, 2, 2] = 1
    target[0, 0, 0, 3] = 9
    share = foreground_of_cells(target, (2, 2), ignore_label=9)
    assert share.tolist() == [[[1.0, 0.0], [0.0, 0.25]]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 4, 5), (2, 9, 2)])
@pytest.mark.parametrize("ratio", [0.05, 0.07, 0.2, 0.5, 0.97])
def test_a_checked_ratio_never_fails_later(grid: tuple[int, ...], kind: str, ratio: float) -> None:
    def fails() -> bool:
        for seed in range(30):
            try:
                draw_mask(grid, 1, ratio=ratio, kind=kind, generator=generator_of(seed))
            except ValueError:
                return True
        return False

    try:
        check_ratio(grid, ratio, kind)
    except ValueError:
        assert fails()
    else:
        assert not fails()


@pytest.mark.parametrize("fill", ["zero", "noise", "foreign"])
def test_fillers(fill: str) -> None:
    data = torch.rand(2, 3, 8, 8) + 1
    others = data.flip(0)
    kept = others.clone()
    filled = filler(data, fill, generator=lambda: generator_of(8), others=others, label_channels=1)
    assert filled.shape == data.shape
    assert (filled[:, -1] == 0).all()
    assert torch.equal(others, kept)
    first = filled[:, :2]
    if fill == "zero":
        assert (first == 0).all()
    elif fill == "noise":
        assert abs(first.mean().item()) < 0.3
        assert first.std().item() == pytest.approx(1, abs=0.2)
    else:
        assert torch.equal(first, others[:, :2])
