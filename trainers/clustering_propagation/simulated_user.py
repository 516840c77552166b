"""A user who clicks on clips while the network trains (clustering_propagation.md, 2)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.clicks import (
    Interaction,
    SliceView,
    add_to,
    click_per_class,
    correction,
    first_round,
)
from nnmosaic.trainers.clustering_propagation.clip import Clip, ClipResult
from nnmosaic.trainers.clustering_propagation.readout import CentreLayout
from nnmosaic.trainers.clustering_propagation.truth import Truth, masks_of

START_AT_FIRST = 0.7
"""Probability that the annotated slice is the first of the clip; else any."""
CORRECT_WORST = 0.5
"""Probability that the slice with the largest error is corrected; else any with an error."""


class SimulatedUser:
    """Knows the labels of a batch of clips.

    Parameters
    ----------
    truth : Truth
        Of shape (B, T, ...).
    positions : Tensor, shape (B, T)
        Millimetres along the axis.
    layout : CentreLayout
    generator : Generator
        Makes all choices.
    """

    def __init__(
        self, truth: Truth, positions: Tensor, layout: CentreLayout, generator: Generator
    ) -> None:
        self.truth, self.positions = truth, positions
        self.layout, self.generator = layout, generator
        objects = truth.masks if layout.regions else truth.masks[:, :, 1:]
        self._areas = objects.flatten(2).sum(2).cpu().numpy()  # (B, T), pixels of objects

    def silent(self) -> Clip:
        """Return the clips without prompts, which begin at their first slice."""
        shape = (*self.positions.shape, len(self.layout.slots), *self.truth.masks.shape[3:])
        starts = torch.zeros(len(self.positions), dtype=torch.long, device=self.positions.device)
        return Clip(self.positions, starts, self.positions.new_zeros(shape))

    def begin(self, clip: Clip, clips: Sequence[int]) -> Clip:
        """Return the clips with first interactions on one slice of some of them."""
        return self._annotate(clip, {b: self._first_slice(b) for b in clips}, first_round)

    def click_each_class(self, clip: Clip) -> Clip:
        """Return all clips with a click on each class of their slice of largest objects."""
        slices = {b: int(areas.argmax()) for b, areas in enumerate(self._areas)}
        return self._annotate(clip, slices, click_per_class)

    def correct(self, result: ClipResult, clips: Sequence[int]) -> Clip:
        """Return some of the clips with a click on an error of one slice, and begun anew there."""
        predicted = masks_of(result.logits, regions=self.layout.regions)
        wrong = ((predicted != self.truth.masks) & self.truth.annotated).any(2)
        areas = wrong.flatten(2).sum(2).cpu().numpy()
        chosen = {b: self._erroneous_slice(areas[b]) for b in clips if areas[b].any()}
        clip = self._annotate(result.clip, chosen, correction, predicted)
        base = torch.zeros_like(result.centres[:, 0]) if clip.base is None else clip.base.clone()
        corrected = torch.zeros(len(base), dtype=torch.bool, device=base.device)
        corrected = corrected if clip.corrected is None else clip.corrected.clone()
        for b, t in chosen.items():
            base[b], corrected[b] = result.centres[b, t], True
        return clip._replace(base=base, corrected=corrected)

    def _first_slice(self, b: int) -> int:
        areas = self._areas[b]
        first = self.generator.uniform() < START_AT_FIRST
        t = 0 if first else int(self.generator.integers(len(areas)))
        shown = np.flatnonzero(areas)
        return t if areas[t] or not len(shown) else int(self.generator.choice(shown))

    def _erroneous_slice(self, areas: np.ndarray) -> int:
        if self.generator.uniform() < CORRECT_WORST:
            return int(areas.argmax())
        return int(self.generator.choice(np.flatnonzero(areas)))

    def _annotate(
        self,
        clip: Clip,
        slices: dict[int, int],
        draw: Callable[[SliceView, Generator], list[Interaction]],
        predicted: Tensor | None = None,
    ) -> Clip:
        """Return the clips with interactions on one slice of each, from which they now begin."""
        prompts, start = clip.prompts.clone(), clip.start.clone()
        for b, t in slices.items():
            view = SliceView(
                self.truth.masks[b, t].cpu().numpy(),
                self.truth.annotated[b, t, 0].cpu().numpy(),
                None if predicted is None else predicted[b, t].cpu().numpy(),
                self.layout.regions,
            )
            add_to(prompts[b, t], draw(view, self.generator))
            start[b] = t
        return clip._replace(prompts=prompts, start=start)
