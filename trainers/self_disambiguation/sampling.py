"""Which case and which class a training sample shows (self_disambiguation.md, 3).

Every (case, class) pair has one probability, worked out before training; drawing is separate, so
the shares of sources, classes and cases are exact and can be printed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

Mode = Literal["nnunet", "sqrt", "class_first"]
BACKGROUND = 0


@dataclass(frozen=True)
class SampledCase:
    """A training case.

    Attributes
    ----------
    modality : str
        Of its source; the authors draw it before the source.
    classes : tuple of int
        Labels that occur in it, without the background.
    """

    identifier: str
    source: str
    modality: str
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Pairs:
    """All (case, class) pairs that can be drawn, those of a source side by side.

    Attributes
    ----------
    cases : ndarray of int, shape (n,)
        Position in the list of cases.
    classes : ndarray of int, shape (n,)
        The class that the patch is centred on; 0: anywhere.
    probabilities : ndarray of float, shape (n,)
        Sums to 1.
    """

    cases: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray

    def at(self, place: float) -> tuple[int, int]:
        """Return the case and the class at a place in [0, 1) of the summed probabilities."""
        k = int(np.searchsorted(np.cumsum(self.probabilities), place, side="right"))
        k = min(k, len(self.probabilities) - 1)  # the sum may be 1 less a rounding error
        return int(self.cases[k]), int(self.classes[k])

    def share(self, chosen: np.ndarray) -> float:
        """Return the probability of a subset, given as a mask over pairs."""
        return float(self.probabilities[chosen].sum())


def mixture(first: Pairs, second: Pairs, share: float) -> Pairs:
    """Return pairs of which a ``share`` is drawn from the second."""
    return Pairs(
        np.concatenate([first.cases, second.cases]),
        np.concatenate([first.classes, second.classes]),
        np.concatenate([(1 - share) * first.probabilities, share * second.probabilities]),
    )


def describe(cases: Sequence[SampledCase], pairs: Pairs, names: Mapping[int, str]) -> list[str]:
    """Return a line per source: its number of cases, its share, and those of its classes."""
    sources = np.array([case.source for case in cases])
    owners = sources[pairs.cases]
    lines = []
    for source in np.unique(sources):
        mine = owners == source
        classes = ", ".join(
            f"{names[c]} {pairs.share(mine & (pairs.classes == c)):.3f}"
            for c in sorted(set(pairs.classes[mine].tolist()))
        )
        number = int((sources == source).sum())
        lines.append(f"{source}, {number} cases, share {pairs.share(mine):.3f} ({classes})")
    return lines


def pair_probabilities(
    cases: Sequence[SampledCase],
    mode: Mode,
    *,
    cap: float,
    with_background: bool = True,
) -> Pairs:
    """Return the probability of every (case, class) pair.

    ``sqrt``: source with probability proportional to the square root of its number of cases, then
    class uniform among those that occur in the source and the background, then case uniform among
    those that show it (3.3). ``class_first``: class, modality, source and case, each uniform among
    those that have the ones before (3.2, the authors').

    Parameters
    ----------
    cap : float
        No case is drawn more than this many times as often as under uniform sampling.
    with_background : bool
        False: foreground only, where there is any, for the samples in which nnU-Net guarantees it.
    """
    pairs = [(i, c) for i, case in enumerate(cases) for c in case.classes]
    if with_background or not pairs:
        pairs += [(i, BACKGROUND) for i in range(len(cases))]
    pairs.sort(key=lambda pair: (cases[pair[0]].source, pair[1]))
    weigh = _sqrt_weights if mode == "sqrt" else _class_first_weights
    weights = np.array(weigh(cases, pairs))
    index = np.array([i for i, _ in pairs])
    return Pairs(
        index,
        np.array([c for _, c in pairs]),
        _capped(weights / weights.sum(), index, cap),
    )


def _sqrt_weights(cases: Sequence[SampledCase], pairs: Sequence[tuple[int, int]]) -> list[float]:
    size = _counts(case.source for case in cases)
    classes = _counts({(cases[i].source, c) for i, c in pairs}, key=lambda item: item[0])
    showing = _counts((cases[i].source, c) for i, c in pairs)
    return [
        size[source] ** 0.5 / classes[source] / showing[source, c]
        for source, c in ((cases[i].source, c) for i, c in pairs)
    ]


def _class_first_weights(
    cases: Sequence[SampledCase], pairs: Sequence[tuple[int, int]]
) -> list[float]:
    leaves = [(c, cases[i].modality, cases[i].source) for i, c in pairs]
    modalities = _counts({leaf[:2] for leaf in leaves}, key=lambda item: item[0])
    sources = _counts(set(leaves), key=lambda item: item[:2])
    images = _counts(leaves)
    return [1 / modalities[leaf[0]] / sources[leaf[:2]] / images[leaf] for leaf in leaves]


def _counts(items: Any, key: Any = lambda item: item) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for item in items:
        counts[key(item)] = counts.get(key(item), 0) + 1
    return counts


def _capped(probabilities: np.ndarray, cases: np.ndarray, cap: float) -> np.ndarray:
    """Lower the cases above ``cap`` times the mean share, and raise the others in proportion."""
    drawable, owner = np.unique(cases, return_inverse=True)
    number = len(drawable)
    limit = max(cap, 1.0) / number
    for _ in range(number):
        share = np.bincount(owner, probabilities, number)
        if not (share > limit * (1 + 1e-9)).any():
            break
        full = share >= limit * (1 - 1e-9)
        factor = np.full(number, (1 - limit * full.sum()) / max(share[~full].sum(), 1e-12))
        factor[full] = limit / share[full]
        probabilities = probabilities * factor[owner]
    return probabilities


class SourceAwareDataLoader(nnUNetDataLoader):
    """nnU-Net's loader, which draws case and class together.

    Samples in which nnU-Net guarantees foreground show a class; the others may show any place. The
    places of a batch are spread evenly over the probabilities (systematic sampling): every sample
    has the same shares as if drawn alone, and a batch holds the sources in proportion.

    Parameters
    ----------
    pairs, foreground_pairs : Pairs
        As returned by `pair_probabilities`, with and without background, over the cases of the
        dataset in its order.
    """

    def __init__(
        self, *arguments: Any, pairs: Pairs, foreground_pairs: Pairs, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.pairs, self.foreground_pairs = pairs, foreground_pairs
        self._classes: list[int] = []

    def get_indices(self) -> list[str]:
        """Draw the cases of a batch, and keep the class of each for `get_bbox`."""
        places = (np.random.permutation(self.batch_size) + np.random.uniform()) / self.batch_size
        drawn = [
            (self.foreground_pairs if self.get_do_oversample(j) else self.pairs).at(place)
            for j, place in enumerate(places)
        ]
        self._classes = [c for _, c in drawn]
        return [self.indices[i] for i, _ in drawn]

    def get_bbox(
        self,
        data_shape: np.ndarray,
        force_fg: bool,
        class_locations: Mapping[Any, Any] | None,
        overwrite_class: Any = None,
        verbose: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Return the patch of the next sample: around its class, or anywhere."""
        drawn = self._classes.pop(0)
        box: tuple[list[int], list[int]] = super().get_bbox(
            data_shape, drawn != BACKGROUND, class_locations, drawn or None, verbose
        )
        return box
