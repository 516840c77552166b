"""Shares of sources, classes and cases: T19 of methods/self_disambiguation.md, 3.3 and 6.6."""

import math
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nnmosaic.trainers.self_disambiguation.sampling import (
    Pairs,
    SampledCase,
    SourceAwareDataLoader,
    describe,
    pair_probabilities,
)

# name: (modality, images, classes), shares of class-first and of square root (3.3)
EIGHT_SOURCES = {
    "AbdomenCT-1K": (("CT", 893, (1, 2, 3, 6, 10)), 0.0261, 0.2345),
    "AMOS CT": (("CT", 270, tuple(range(1, 16))), 0.1143, 0.1289),
    "AMOS MR": (("MR", 54, tuple(range(1, 16))), 0.4706, 0.0577),
    "BTCV": (("CT", 27, (*range(1, 13), 16)), 0.0996, 0.0408),
    "FLARE22": (("CT", 45, tuple(range(1, 14))), 0.0776, 0.0526),
    "NIH-Pancreas": (("CT", 73, (10,)), 0.0079, 0.0670),
    "TotalSegmentator": (("CT", 1081, (*range(1, 15), 16)), 0.1143, 0.2580),
    "UroGram": (("CT", 109, (2, 3, 14)), 0.0194, 0.0819),
    "WORD": (("CT", 100, (*range(1, 8), *range(10, 15))), 0.0702, 0.0785),
}


def eight_sources(names: Collection[str] = EIGHT_SOURCES.keys()) -> list[SampledCase]:
    cases = []
    for source in names:
        modality, images, classes = EIGHT_SOURCES[source][0]
        for i in range(images):
            rare = source == "AMOS MR" and i > 1  # 14 and 15 occur in two of these images only
            shown = tuple(c for c in classes if not (rare and c in (14, 15)))
            cases.append(SampledCase(f"{source} {i}", source, modality, shown))
    return cases


def source_share(cases: list[SampledCase], pairs: Pairs, source: str) -> float:
    return pairs.share(np.array([cases[i].source == source for i in pairs.cases]))


def test_t19_shares_of_the_eight_sources() -> None:
    cases = eight_sources()
    assert len(cases) == 2652
    first = pair_probabilities(cases, "class_first", cap=math.inf)
    root = pair_probabilities(cases, "sqrt", cap=math.inf)
    for source, (_, class_first, square_root) in EIGHT_SOURCES.items():
        assert source_share(cases, first, source) == pytest.approx(class_first, abs=6e-5)
        assert source_share(cases, root, source) == pytest.approx(square_root, abs=6e-5)
    share = np.bincount(first.cases, first.probabilities)
    assert sorted(share)[-2:] == pytest.approx([0.0371, 0.0371], abs=1e-4)


@pytest.mark.parametrize(
    "shares",
    [
        {"AMOS CT": 0.2010, "AMOS MR": 0.4706, "BTCV": 0.1863, "FLARE22": 0.1422},
        {"AbdomenCT-1K": 0.1010, "NIH-Pancreas": 0.0281, "TotalSegmentator": 0.4969,
         "UroGram": 0.0646, "WORD": 0.3094},
    ],
)  # fmt: skip
def test_t19_shares_of_fewer_sources(shares: dict[str, float]) -> None:
    cases = eight_sources(shares)
    pairs = pair_probabilities(cases, "class_first", cap=math.inf)
    for source, share in shares.items():
        assert source_share(cases, pairs, source) == pytest.approx(share, abs=6e-5)


def test_t19_draws_follow_the_shares() -> None:
    cases = eight_sources()
    pairs = pair_probabilities(cases, "class_first", cap=math.inf)
    loader = a_loader(cases, pairs, batch_size=2)
    drawn = [name.rsplit(" ", 1)[0] for _ in range(2000) for name in loader.get_indices()]
    for source, (_, share, _) in EIGHT_SOURCES.items():
        sigma = math.sqrt(share * (1 - share) / 4000)
        assert abs(drawn.count(source) / 4000 - share) < 4 * sigma


def test_a_batch_holds_the_sources_in_proportion() -> None:
    cases = [SampledCase(f"{source}{i}", source, "", (1,)) for source in "AB" for i in range(5)]
    pairs = pair_probabilities(cases, "sqrt", cap=math.inf)
    loader = a_loader(cases, pairs, batch_size=4)
    firsts = set()
    for _ in range(50):
        names = loader.get_indices()
        assert sorted(name[0] for name in names) == ["A", "A", "B", "B"]
        firsts.add(names[0])
    assert len(firsts) == 10  # and every case comes at every position


@pytest.mark.parametrize("mode", ["sqrt", "class_first"])
@pytest.mark.parametrize("cap", [1.0, 3.0, 10.0])
def test_t19_the_cap_is_kept(mode: Any, cap: float) -> None:
    cases = eight_sources()
    free, capped = (pair_probabilities(cases, mode, cap=limit) for limit in (math.inf, cap))
    shares = [np.bincount(p.cases, p.probabilities, len(cases)) for p in (free, capped)]
    assert shares[1].sum() == pytest.approx(1.0)
    assert shares[1].max() <= cap / len(cases) * (1 + 1e-6)
    if cap == 10:  # whoever is below the cap keeps its proportion to the others below it
        below = shares[1] < 0.999 * cap / len(cases)
        ratio = shares[1][below] / shares[0][below]
        assert ratio.max() == pytest.approx(ratio.min())


@pytest.mark.parametrize("cap", [1.0, 3.0, 10.0])
def test_the_cap_counts_only_cases_that_can_be_drawn(cap: float) -> None:
    cases = [SampledCase(str(i), "A", "", (1,) if i < 5 else ()) for i in range(100)]
    forced = pair_probabilities(cases, "sqrt", cap=cap, with_background=False)
    assert forced.probabilities == pytest.approx([0.2] * 5)


def test_shares_by_hand() -> None:
    cases = [
        SampledCase("a", "A", "", (1, 2)),
        SampledCase("b", "A", "", (1,)),
        SampledCase("c", "A", "", ()),
        SampledCase("d", "A", "", ()),
        SampledCase("e", "B", "", (3,)),
    ]
    pairs = pair_probabilities(cases, "sqrt", cap=math.inf)
    rows = zip(pairs.cases, pairs.classes, pairs.probabilities, strict=True)
    table = {(cases[i].identifier, c): p for i, c, p in rows}
    assert table["a", 1] == pytest.approx(2 / 3 / 3 / 2)
    assert table["a", 2] == pytest.approx(2 / 3 / 3)
    assert table["d", 0] == pytest.approx(2 / 3 / 3 / 4)
    assert table["e", 0] == pytest.approx(1 / 3 / 2)
    assert describe(cases, pairs, {0: "background", 1: "liver", 2: "spleen", 3: "aorta"}) == [
        "A, 4 cases, share 0.667 (background 0.222, liver 0.222, spleen 0.222)",
        "B, 1 cases, share 0.333 (background 0.167, aorta 0.167)",
    ]
    forced = pair_probabilities(cases, "sqrt", cap=math.inf, with_background=False)
    assert set(forced.classes.tolist()) == {1, 2, 3}
    assert forced.share(forced.classes == 2) == pytest.approx(math.sqrt(4) / (math.sqrt(4) + 1) / 2)
    empty = pair_probabilities(cases[2:4], "sqrt", cap=math.inf, with_background=False)
    assert empty.classes.tolist() == [0, 0]


class FakeData:
    """A dataset of 8 x 8 x 8 images with one voxel of class 1 at (6, 6, 6) and 2 at (1, 1, 1)."""

    def __init__(self, identifiers: list[str]) -> None:
        self.identifiers = identifiers


def a_loader(
    cases: list[SampledCase], pairs: Pairs, *, batch_size: int, foreground: Pairs | None = None
) -> SourceAwareDataLoader:
    labels = SimpleNamespace(all_labels=[0, 1, 2], has_ignore_label=False)
    np.random.seed(0)
    return SourceAwareDataLoader(
        FakeData([case.identifier for case in cases]), batch_size, (4, 4, 4), (4, 4, 4), labels,
        oversample_foreground_percent=0.33, pairs=pairs, foreground_pairs=foreground or pairs,
    )  # fmt: skip


def test_the_patch_holds_the_class_that_was_drawn() -> None:
    cases = [SampledCase("a", "A", "", (1, 2)), SampledCase("b", "B", "", (2,))]
    pairs = pair_probabilities(cases, "sqrt", cap=math.inf)
    forced = pair_probabilities(cases, "sqrt", cap=math.inf, with_background=False)
    loader = a_loader(cases, pairs, batch_size=3, foreground=forced)
    locations = {1: np.array([[0, 6, 6, 6]]), 2: np.array([[0, 1, 1, 1]])}
    guaranteed, seen = [], set()
    for _ in range(100):
        names = loader.get_indices()
        classes = list(loader._classes)
        guaranteed.append(classes[-1])
        for name, c in zip(names, classes, strict=True):
            lower, upper = loader.get_bbox(np.array([8, 8, 8]), False, locations)
            if c > 0:
                voxel = locations[c][0][1:]
                assert all(a <= v < b for a, v, b in zip(lower, voxel, upper, strict=True))
            assert not (name == "b" and c == 1)
            seen.add((name, c))
    assert min(guaranteed) > 0
    assert seen == {("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 2)}
