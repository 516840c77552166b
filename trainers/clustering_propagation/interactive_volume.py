"""One volume that a person corrects slice by slice (clustering_propagation.md, 3, interactive).

The automatic result is a sweep up and a sweep down. A slice with marks is an anchor: it is decoded
again in both sweeps, from the centres that it had, with the marks; what it finds travels on to the
next anchor in each direction, and no further. Between two anchors the sweeps are weighted by their
distance; the end of the volume counts as half an anchor, since nobody looked there. What is no
anchor is averaged with the slices beside it, as without marks (see `smoothing`). Marked pixels
get their class whatever is found, and clicks count for the pixels around them (see `nearby`).
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.memory import State
from nnmosaic.trainers.clustering_propagation.nearby import ACROSS, FARTHEST, share_of_clicks, told
from nnmosaic.trainers.clustering_propagation.network import SliceResult
from nnmosaic.trainers.clustering_propagation.smoothing import smoothed
from nnmosaic.trainers.clustering_propagation.travel import blend, neighbour_of, steps_of, travel
from nnmosaic.trainers.clustering_propagation.volume_features import VolumeFeatures

UNDO_LEVELS = 8
"""Each keeps the logits of the slices that it changed."""
SHARES_BYTES = 2**28
"""Of what clicks say of slices, which is kept."""
UNCHANGED_SLICES, UNCHANGED_DICE = 3, 0.995
"""A correction has died out when so many slices in a row are as good as they were (3)."""


@dataclass(frozen=True, eq=False)
class Marks:
    """What a person marked on one slice.

    Attributes
    ----------
    weights : Tensor, shape (slots, H, W)
        As `ClusteringPropagationNet.pool_prompts` takes them, without padding.
    on, off : Tensor, shape (K, H, W), bool
        Pixels that surely are, and are not, of a class.
    clicked : Tensor, shape (H, W), bool
        Those of them that speak for the pixels around them, too: an object that was drawn ends
        where it was drawn.
    """

    weights: Tensor
    on: Tensor
    off: Tensor
    clicked: Tensor

    def __add__(self, other: "Marks") -> "Marks":
        """Return both; where they disagree about a pixel, the other one, which is later, counts."""
        return Marks(
            self.weights + other.weights,
            self.on & ~other.off | other.on,
            self.off & ~other.on | other.off,
            self.clicked | other.clicked,
        )


@dataclass(eq=False)
class _Sweep:
    """One direction through the volume.

    Attributes
    ----------
    before : list of State
        The memory with which each slice begins.
    centres : list of Tensor, each (copies, N, D)
        What each slice ended with; on an anchor, what it ended with before it was marked.
    logits : Tensor, shape (K, Z, H, W), half precision
    overwritten : dict
        Slice -> what was known of it when `begin` was called, if it is another thing now.
    """

    step: Literal[1, -1]
    before: list[State]
    centres: list[Tensor]
    logits: Tensor
    overwritten: dict[int, tuple[State, Tensor, Tensor]] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget what was overwritten so far."""
        self.overwritten = {}

    def put(
        self, index: int, *, before: State, centres: Tensor | None, logits: Tensor | None
    ) -> None:
        """Write what is known of a slice; None: as it was."""
        if index not in self.overwritten:
            old = self.before[index], self.centres[index], self.logits[:, index].clone()
            self.overwritten[index] = old
        self.before[index] = before
        if centres is not None:
            self.centres[index] = centres
        if logits is not None:
            self.logits[:, index] = logits

    def restore(self, overwritten: Mapping[int, tuple[State, Tensor, Tensor]]) -> None:
        """Put back what was overwritten."""
        for index, old in overwritten.items():
            self.before[index], self.centres[index], self.logits[:, index] = old


@dataclass(frozen=True, eq=False)
class _Undo:
    changed: range
    marks: Mapping[int, Marks]
    overwritten: Sequence[Mapping[int, tuple[State, Tensor, Tensor]]]


class InteractiveVolume:
    """A volume with the automatic result, which marks change.

    Parameters
    ----------
    features : VolumeFeatures
        With room for all slices, or every correction works them out again.
    distance_mm, pixel_mm : float
        Between neighbouring slices, and between neighbouring pixels.
    undo_levels : int
        So many calls of `add` can be taken back.
    honour_marks : bool
        Whether marked pixels get their class on their slice, whatever the network says, and speak
        for those around them.
    """

    def __init__(
        self,
        features: VolumeFeatures,
        *,
        distance_mm: float,
        pixel_mm: float,
        undo_levels: int = UNDO_LEVELS,
        honour_marks: bool = True,
    ) -> None:
        self.features, self.distance_mm, self.honour_marks = features, distance_mm, honour_marks
        self.pixels_per_slice = distance_mm / pixel_mm
        self.marks: Mapping[int, Marks] = {}
        """Slice -> what was marked on it."""
        self._sweeps = [self._automatic(1), self._automatic(-1)]
        self._undo: deque[_Undo] = deque(maxlen=undo_levels)
        self._shares: OrderedDict[tuple[int, int, float, bytes], Tensor] = OrderedDict()

    # ---------------------------------------------------------------- what is found

    def logits(self, slices: Iterable[int] | None = None) -> Tensor:
        """Return logits (K, slices, H, W), half precision; default: of all slices."""
        wanted = range(len(self.features)) if slices is None else slices
        merged = lru_cache(3)(self._merged)  # neighbours share it
        return torch.stack([self._slice_logits(index, merged) for index in wanted], 1)

    def _slice_logits(self, index: int, merged: Callable[[int], Tensor]) -> Tensor:
        logits = merged(index)
        if index not in self.marks:  # an anchor stands for itself, and keeps the sides apart
            beside = [n for n in (index - 1, index + 1) if 0 <= n < len(self.features)]
            logits = smoothed(logits, [merged(n) for n in beside])
        return self._told(logits, index) if self.honour_marks else logits

    def _merged(self, index: int) -> Tensor:
        """Return the logits (K, H, W) of a slice from both sweeps."""
        up, down = (sweep.logits[:, index] for sweep in self._sweeps)
        return blend(up, down, self._weight_of_up(index))

    def _anchors_around(self, index: int) -> tuple[int | None, int | None]:
        """Return the last anchor up to a slice, and the first one from it on."""
        below = max((anchor for anchor in self.marks if anchor <= index), default=None)
        above = min((anchor for anchor in self.marks if anchor >= index), default=None)
        return below, above

    def _weight_of_up(self, index: int) -> float:
        below, above = self._anchors_around(index)
        if (below is None and above is None) or below == above:
            return 0.5
        if above is None and below is not None:
            return 1 - 0.5 * (index - below) / (len(self.features) - below)
        if below is None and above is not None:
            return 0.5 * (above - index) / (above + 1)
        return (above - index) / (above - below)  # type: ignore[operator]

    def _told(self, logits: Tensor, index: int) -> Tensor:
        """Return logits (K, H, W) of a slice that follow the marks on the anchors around it."""
        regions = self.features.network.layout.regions
        on, off = torch.zeros(2, *logits.shape)
        if index in self.marks:
            on, off = self.marks[index].on.float(), self.marks[index].off.float()
        reach = self.features.network.head.reach.cpu()
        for anchor in {anchor for anchor in self._anchors_around(index) if anchor is not None}:
            marks = self.marks[anchor]
            kinds = [(on, marks.on, reach)]
            if regions:  # what is not of a region may be of any other one
                kinds.append((off, marks.off, reach.min().expand_as(reach)))
            for share, sure, far in kinds:
                for k in (sure & marks.clicked).flatten(1).any(1).nonzero().flatten().tolist():
                    near = self._share(sure[k] & marks.clicked, anchor, index, float(far[k]))
                    share[k] = torch.maximum(share[k], near)
        return told(logits, on, off, regions=regions) if on.any() or off.any() else logits

    def _share(self, clicked: Tensor, anchor: int, index: int, reach: float) -> Tensor:
        """Return to which part pixels of a slice share what some on an anchor were said to be.

        What was worked out is kept: other marks do not change it.
        """
        across = ACROSS * abs(index - anchor) * self.pixels_per_slice
        if across > FARTHEST * reach:
            return torch.zeros(clicked.shape)
        key = anchor, index, reach, clicked.nonzero().numpy().tobytes()
        if key not in self._shares:
            there, here = self.features.intensities(anchor), self.features.intensities(index)
            share = share_of_clicks(clicked, there, here, across=across, reach=reach).half()
            self._shares[key] = share
            if len(self._shares) * share.numel() * share.element_size() > SHARES_BYTES:
                self._shares.popitem(last=False)
        self._shares.move_to_end(key)
        return self._shares[key].float()

    def doubtful_slice(self) -> int | None:
        """Return the slice without marks that is least sure; None: all have some.

        By the entropy of the mean probabilities, summed over the slice: it grows with the doubt of
        each sweep and with their disagreement.
        """
        regions = self.features.network.layout.regions
        doubts = {}
        for index in set(range(len(self.features))) - set(self.marks):
            found = torch.stack([sweep.logits[:, index] for sweep in self._sweeps]).float()
            mean = found.sigmoid().mean(0) if regions else found.softmax(1).mean(0)
            doubt = -mean * mean.clamp_min(1e-6).log()
            if regions:
                doubt = doubt - (1 - mean) * (1 - mean).clamp_min(1e-6).log()
            doubts[index] = float(doubt.sum())
        return max(doubts, key=lambda index: (doubts[index], -index)) if doubts else None

    # ---------------------------------------------------------------- what is marked

    def add(self, marks: Mapping[int, Marks]) -> range:
        """Take marks of some slices into account; return the slices that may have changed.

        All marks of one call are taken together: their order does not matter.
        """
        if not marks:
            return range(0)
        changed = self._reach(marks)
        for sweep in self._sweeps:
            sweep.begin()
        done = _Undo(changed, self.marks, [sweep.overwritten for sweep in self._sweeps])
        added = {i: self.marks[i] + new if i in self.marks else new for i, new in marks.items()}
        self.marks = {**self.marks, **added}
        try:
            for sweep in self._sweeps:
                for index in sorted(marks, reverse=sweep.step < 0):
                    self._spread(sweep, index, new=marks.keys())
        except BaseException:
            self._take_back(done)
            raise
        self._undo.append(done)
        return changed

    def undo(self) -> range | None:
        """Take the last `add` back exactly; return the slices that changed, None: nothing left."""
        if not self._undo:
            return None
        last = self._undo.pop()
        self._take_back(last)
        return last.changed

    def _take_back(self, done: _Undo) -> None:
        self.marks = done.marks
        for sweep, overwritten in zip(self._sweeps, done.overwritten, strict=True):
            sweep.restore(overwritten)

    def _reach(self, marks: Mapping[int, Marks]) -> range:
        """Return all slices up to the anchors around, which do not change unless marked again."""
        low, high = min(marks), max(marks)
        first = max((anchor + 1 for anchor in self.marks if anchor < low), default=0)
        last = min((anchor for anchor in self.marks if anchor > high), default=len(self.features))
        return range(first, last)

    # ---------------------------------------------------------------- sweeps

    def _automatic(self, step: Literal[1, -1]) -> _Sweep:
        features = self.features
        number = len(features)
        state = features.network.initial_state(len(features.copies))
        before: list[State] = [state] * number
        centres: list[Tensor] = [torch.empty(0)] * number
        logits: Tensor | None = None
        for index, result, merged, after in travel(
            features, range(number)[::step], state, distance_mm=self.distance_mm
        ):
            if logits is None:
                logits = merged.new_zeros(len(merged), number, *merged.shape[1:])
            logits[:, index], before[index], centres[index] = merged, state, result.centres
            state = after
        if logits is None:
            raise ValueError("a volume must have slices")
        return _Sweep(step, before, centres, logits)

    def _spread(self, sweep: _Sweep, anchor: int, *, new: Iterable[int]) -> None:
        """Decode an anchor again, and carry what it shows to the next one."""
        state = self._decode_anchor(sweep, anchor)
        new = set(new)
        calm = 0
        way = range(anchor + sweep.step, len(self.features) if sweep.step > 0 else -1, sweep.step)
        for index in way:
            if index in self.marks:
                if index in new:
                    sweep.put(index, before=state, centres=None, logits=None)
                return
            ((_, result, logits, after),) = travel(
                self.features, [index], state, distance_mm=self.distance_mm,
                before=self._logits_before(sweep, index),
            )  # fmt: skip
            calm = calm + 1 if self._alike(logits, sweep.logits[:, index]) else 0
            sweep.put(index, before=state, centres=result.centres, logits=logits)
            if calm == UNCHANGED_SLICES and not new & set(way[way.index(index) :]):
                return
            state = after

    def _logits_before(self, sweep: _Sweep, index: int) -> Tensor | None:
        """Return the logits of the slice that a sweep visits before this one, if there is one."""
        index -= sweep.step
        return sweep.logits[:, index] if 0 <= index < len(self.features) else None

    def _decode_anchor(self, sweep: _Sweep, anchor: int) -> State:
        features, network = self.features, self.features.network
        before = sweep.before[anchor]
        step = steps_of(features, self.distance_mm)
        with torch.inference_mode(), features.autocast():
            here = features[anchor]
            weights = features.mirrored(self.marks[anchor].weights).to(features.device)
            prompts = network.pool_prompts(here, weights)
            # The base is what was there before any mark: all marks are told again each time.
            centres = network.initial_centres(before, prompts, base=sweep.centres[anchor])
            neighbour = neighbour_of(features, self._logits_before(sweep, anchor), self.distance_mm)
            result: SliceResult = network.decode(here, centres, neighbour)
            shown = prompts.given[:, : network.layout.classes]
            gate = network.found_classes(result) | shown
            after = network.update_state(before, result, step, gate)
        logits = features.merged(result.logits)
        sweep.put(anchor, before=before, centres=None, logits=logits)
        return after

    def _alike(self, one: Tensor, other: Tensor) -> bool:
        """Return whether the masks of a slice are the same but for a few pixels."""
        if self.features.network.layout.regions:
            first, second = one > 0, other > 0
        else:
            first, second = one.argmax(0), other.argmax(0)
        different = int((first != second).sum())
        area = int((first > 0).sum() + (second > 0).sum())
        return 2 * different <= (1 - UNCHANGED_DICE) * area
