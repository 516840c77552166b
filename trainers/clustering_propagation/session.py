"""Correcting an image with clicks, with the surface of nnInteractive's sessions.

Names and meaning follow nnInteractive 2 (clustering_propagation.md, 5.6), extended by labels: the
model knows all its classes at once. Positions are indices of the image array that was set.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.interactions import (
    Box,
    Interaction,
    Label,
    Point,
    Prompts,
    Scribble,
)
from nnmosaic.trainers.clustering_propagation.corrected_image import ChangedBox
from nnmosaic.trainers.clustering_propagation.session_surface import SessionSurface
from nnmosaic.trainers.clustering_propagation.slice_prompts import SlicePrompt

INITIAL_SLICES = 5
"""Of an initial segmentation that count as drawn by the user: those where a label is largest."""
UNKNOWN_SHOWN = 10
"""So many of the values that a segmentation should not have are named."""


class ClusteringPropagationSession(SessionSurface):
    """One image at a time, automatic at first, then corrected.

    What it is made with, and how it meets a model and an image: see `SessionSurface`.

    Attributes
    ----------
    negative_to : str
        What is where a label is said not to be: "background", or, with "auto", the likeliest of
        all others (of a drawn mark: that of most of its pixels). A box that an object is not in
        is always background, and regions overlap: of them only the one that was named is not there.
    """

    negative_to: Literal["background", "auto"] = "background"

    # ---------------------------------------------------------------- marks

    def add_point_interaction(
        self,
        coordinates: Sequence[float],
        include_interaction: bool,
        run_prediction: bool = True,
        override_capability_checks: bool = False,
        *,
        label: str | int | None = None,
    ) -> ChangedBox | None:
        """Take a click into account, at an index of the image array.

        Parameters
        ----------
        include_interaction : bool
            Whether the label is there; if not, see `negative_to`.
        run_prediction : bool
            If not, the mark waits for the next one.
        override_capability_checks : bool
            Whether to take it although `supported_interactions` says no.
        label : str or int, optional
            Default: `active_label`.

        Returns
        -------
        list of list of int, or None
            The box that holds all changes; None: nothing ran, or nothing changed.

        Raises
        ------
        InputError
            If the position is outside of the image, the label is unknown, or points are switched
            off. Nothing has changed.
        """
        self._check_supported("points", override_capability_checks)
        place = self.image.in_file([coordinates])[0]
        found = self._label(label, place, include_interaction)
        point = Point(found, place, include_interaction, self.image.round)
        return self._add(point, run_prediction)

    def add_scribble(
        self,
        coordinates: Sequence[Sequence[float]],
        include_interaction: bool,
        run_prediction: bool = True,
        *,
        label: str | int | None = None,
        radius: float = 1.0,
    ) -> ChangedBox | None:
        """Take a line through indices of the image array into account; see above.

        Parameters
        ----------
        radius : float
            Half of its width, in voxels of the image.
        """
        places = self.image.in_file(coordinates)
        line = Scribble(
            self._label(label, places[0], include_interaction), tuple(places), radius,
            include_interaction, self.image.round,
        )  # fmt: skip
        return self._add(line, run_prediction)

    def add_bbox_interaction(
        self,
        bbox_coords: Sequence[Sequence[int]],
        include_interaction: bool,
        run_prediction: bool = True,
        override_capability_checks: bool = False,
        *,
        label: str | int | None = None,
    ) -> ChangedBox | None:
        """Take a box around an object into account, [[first, behind the last], ...]; see above.

        Over several slices it counts on each of them.

        Raises
        ------
        ValueError
            If the box is empty.
        """
        if any(low >= high for low, high in bbox_coords):
            sides = [list(side) for side in bbox_coords]
            raise ValueError(f"bbox_coords: the box must not be empty, got {sides}")
        flat = any(high - low == 1 for low, high in bbox_coords)
        self._check_supported("bbox2d" if flat else "bbox3d", override_capability_checks)
        corners = self.image.in_file(
            [[low for low, _ in bbox_coords], [high - 1 for _, high in bbox_coords]]
        )
        low, high = (tuple(map(function, *corners)) for function in (min, max))
        middle: Any = tuple((a + b) / 2 for a, b in zip(low, high, strict=True))
        found = self._label(label, middle, include_interaction)
        marked = Box(found, low, high, include_interaction, self.image.round)
        return self._add(marked, run_prediction)

    def add_scribble_interaction(
        self,
        scribble_image: np.ndarray,
        include_interaction: bool,
        run_prediction: bool = True,
        override_capability_checks: bool = False,
        interaction_bbox: Sequence[Sequence[int]] | None = None,
        *,
        label: str | int | None = None,
    ) -> ChangedBox | None:
        """Take voxels above 0 into account, as those of a line; see `add_point_interaction`.

        As a click, they speak for what is around them, too.

        Parameters
        ----------
        scribble_image : ndarray
            In the shape of the image; with ``interaction_bbox`` of this box alone.
        """
        self._check_supported("scribble", override_capability_checks)
        voxels = self._drawn_voxels("scribble", scribble_image, interaction_bbox)
        return self._add_voxels(
            voxels, include_interaction, run_prediction, label=label, clicked=True
        )

    def add_lasso_interaction(
        self,
        lasso_image: np.ndarray,
        include_interaction: bool,
        run_prediction: bool = True,
        override_capability_checks: bool = False,
        interaction_bbox: Sequence[Sequence[int]] | None = None,
        *,
        label: str | int | None = None,
    ) -> ChangedBox | None:
        """Take the inside of a lasso, voxels above 0, into account: it ends where it was drawn.

        Else as `add_scribble_interaction`.
        """
        self._check_supported("lasso", override_capability_checks)
        voxels = self._drawn_voxels("lasso", lasso_image, interaction_bbox)
        return self._add_voxels(
            voxels, include_interaction, run_prediction, label=label, clicked=False
        )

    def _drawn_voxels(
        self, kind: str, drawn: np.ndarray, bbox: Sequence[Sequence[int]] | None
    ) -> np.ndarray:
        """Return the voxels (P, 3) of the image array that are above 0 in a part of it."""
        sides = [(0, size) for size in self.label_map.shape] if bbox is None else bbox
        size = tuple(high - low for low, high in sides)
        if drawn.shape != size:
            raise ValueError(f"{kind} must have shape {size}, got {drawn.shape}")
        voxels: np.ndarray = np.argwhere(drawn > 0)
        if not len(voxels):
            raise InputError("No voxel of the mark is above 0. Draw something.")
        voxels += np.asarray([low for low, _ in sides])
        return voxels

    def _add_voxels(
        self,
        voxels: np.ndarray,
        positive: bool,
        run: bool,
        *,
        label: str | int | None,
        clicked: bool,
    ) -> ChangedBox | None:
        (place,) = self.image.in_file(voxels[len(voxels) // 2])
        found = self._label(label, place, positive)
        marked = self.image.marked_voxels(voxels, found, positive=positive, clicked=clicked)
        return self._written(self.image.add((), self._meant(marked), run=run))

    def add_initial_seg_interaction(
        self,
        initial_seg: np.ndarray,
        run_prediction: bool = False,
        override_capability_checks: bool = False,
    ) -> ChangedBox | None:
        """Start from a label map; what was marked before is dropped.

        It is shown as it is until the next mark. Its slices where a label is largest count as drawn
        by the user.

        Parameters
        ----------
        initial_seg : ndarray, of integers or bool
            In the shape of the image, with labels of the model; in the rim where the image is 0
            they count for nothing.

        Raises
        ------
        InputError
            If it shows other labels, or none that counts. Nothing has changed.
        """
        self._check_supported("initial_label", override_capability_checks)
        drawn = self._checked_segmentation(initial_seg)
        shown = initial_seg.copy()  # it may be the buffer, which the next line writes into
        self.reset_interactions()
        prompts: list[SlicePrompt] = []
        for label in self.labels.values():
            voxels = np.argwhere(np.isin(drawn, label))
            if label == 0 or not len(voxels):
                continue
            marked = self.image.marked_voxels(voxels, label, positive=True)
            prompts += sorted(marked, key=lambda prompt: -len(prompt.rows))[:INITIAL_SLICES]
        changed = self.image.add((), tuple(prompts), run=run_prediction, meanwhile=shown)
        return self._written(changed)

    def _checked_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return what of a label map the network sees, if the model knows all its labels."""
        if segmentation.shape != self.label_map.shape:
            raise ValueError(
                f"initial_seg must have shape {self.label_map.shape}, got {segmentation.shape}"
            )
        values = np.unique(segmentation)
        unknown = values[~np.isin(values, self.predictor.label_manager.all_labels)]
        if len(unknown):
            some = ", ".join(map(str, unknown[:UNKNOWN_SHOWN].tolist()))
            raise InputError(
                f"The segmentation shows {some}, which the model does not know. Its labels are "
                f"{self._labels_in_words()}. Write 0 where there is none of them."
            )
        if not segmentation.any():
            raise InputError("The segmentation shows no label. Give one that does, or none.")
        kept = self.image.kept(segmentation)
        if not kept.any():
            raise InputError(
                "The segmentation shows labels only where the image is empty, at its rim. Check "
                "that it belongs to this image."
            )
        return kept

    def undo(self) -> bool:
        """Take the last mark back exactly; return whether there was one."""
        done = self.image.undo()
        self._write_buffer()
        return done

    @property
    def prompts(self) -> Prompts:
        """Points, lines and boxes so far, for `write_prompts`; marks given as voxels are not in it.

        In voxels of the image file, z, y, x.
        """
        return Prompts("voxel", order="zyx", interactions=self.image.interactions)

    # ---------------------------------------------------------------- how

    def _label(self, label: str | int | None, place: Any, positive: bool) -> Label:
        """Return the integer of a label, or of the one that is likeliest at a place."""
        name = self.active_label
        if name is None:
            self._found_label = None
        if label is not None:
            return self.labels[self._name(label)]
        if name is None:
            if not positive:
                raise InputError("The first mark must show a label, or name it.")
            (marked,) = self.image.marked(Point(0, place))
            shown = self.shown_labels
            likeliest = self.image.logits_at(marked)[-len(shown) :].argmax()
            name = [*shown][int(likeliest)]
            self._found_label = name, self.image.progress
        return self.labels[name]

    def _add(self, interaction: Interaction, run: bool) -> ChangedBox | None:
        marked = self.image.marked(interaction)
        meant = marked if isinstance(interaction, Box) else self._meant(marked)
        if meant is not marked:
            interaction = replace(interaction, label=meant[0].label, positive=True)
        return self._written(self.image.add((interaction,), meant, run=run))

    def _meant(self, marks: tuple[SlicePrompt, ...]) -> tuple[SlicePrompt, ...]:
        """Return marks of one label; if it is not there, marks of what `negative_to` says."""
        if self.negative_to not in ("background", "auto"):
            raise ValueError(
                f'negative_to must be "background" or "auto", got {self.negative_to!r}'
            )
        of_regions = self.predictor.label_manager.has_regions
        if marks[0].positive or of_regions or self.negative_to == "background":
            return marks
        other = self.image.likeliest_other(marks)
        return tuple(replace(mark, label=other, positive=True) for mark in marks)
