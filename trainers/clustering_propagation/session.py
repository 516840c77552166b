"""Correcting an image with clicks, with the surface of nnInteractive's sessions.

Names and meaning follow nnInteractive 2 (clustering_propagation.md, 5.6), extended by labels: the
model knows all its classes at once. Positions are indices of the image array that was set.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.interactions import (
    Box,
    Interaction,
    Label,
    Point,
    Prompts,
    Scribble,
    named_labels,
)
from nnmosaic.trainers.clustering_propagation.corrected_image import ChangedBox, CorrectedImage
from nnmosaic.trainers.clustering_propagation.predictor import PropagationPredictor
from nnmosaic.trainers.clustering_propagation.slice_prompts import SlicePrompt
from nnmosaic.trainers.predictor import available_folds, load_predictor

INITIAL_SLICES = 5
"""Of an initial segmentation that count as drawn by the user: those where a label is largest."""
UNKNOWN_SHOWN = 10
"""So many of the values that a segmentation should not have are named."""


class ClusteringPropagationSession:
    """One image at a time, automatic at first, then corrected.

    Parameters
    ----------
    device : torch.device
    """

    supported_interactions: Mapping[str, bool] = {
        "points": True, "scribble": True, "lasso": True, "bbox2d": True, "bbox3d": False
    }  # fmt: skip
    supports_initial_label = True
    supports_zero_shot_label_refinement = False
    supports_undo = True
    preferred_scribble_thickness: Sequence[int] = (1, 1, 1)
    interaction_decay: float | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.multilabel = True
        """Whether the target buffer gets all labels; if not, a mask of the active one."""
        self.active_label: str | None = None
        """The class that marks without a label are for; None: that of the first positive one."""

    # ---------------------------------------------------------------- model and image

    def initialize_from_trained_model_folder(
        self,
        folder: Path,
        use_fold: int | str | None = None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """Load a model; default: its first trained fold.

        Raises
        ------
        InputError
            If the folder holds no model of this method.
        """
        trained = available_folds(folder, checkpoint_name)
        predictor = load_predictor(
            folder, folds=trained[:1] if use_fold is None else [use_fold],
            checkpoint=checkpoint_name, device=self.device, step_size=0.5, mirroring=False,
        )  # fmt: skip
        if not isinstance(predictor, PropagationPredictor):
            raise InputError(
                f"{folder} was trained by {predictor.trainer_name}, which clicks cannot correct. "
                "Name a model of nnUNetTrainerClusteringPropagation."
            )
        self.predictor = predictor
        self.labels: dict[str, Label] = {
            name: label for name, label in named_labels(predictor.dataset_json["labels"]).items()
            if name != "ignore"
        }  # fmt: skip
        """Names of what can be marked, with the background, and their integers."""

    @property
    def shown_labels(self) -> dict[str, int]:
        """Names of all but the background -> value in the label map, in the order of the logits."""
        manager = self.predictor.label_manager
        names = [name for name, label in self.labels.items() if label != 0]
        if manager.has_regions:
            return dict(zip(names, map(int, manager.regions_class_order), strict=True))
        integers = [(v, name) for name, v in self.labels.items() if isinstance(v, int) and v]
        return {name: value for value, name in sorted(integers)}

    def set_image(self, image: np.ndarray, image_properties: Mapping[str, Any]) -> None:
        """Preprocess an image, and predict it without marks.

        Parameters
        ----------
        image : ndarray, shape (channels, x, y, z)
            The axes may have any order.
        image_properties : mapping
            "spacing": millimetres along the axes of the array. What nnU-Net's readers return with
            an image can be given as it is.
        """
        self.image = CorrectedImage(self.predictor, image, image_properties)
        self.original_image_shape = image.shape
        self.target_buffer: np.ndarray | Tensor | None = None
        self.active_label = None

    @property
    def label_map(self) -> np.ndarray:
        """The present result: labels of the image array. It is changed in place."""
        return self.image.label_map

    def reset_interactions(self) -> None:
        """Go back to the automatic result; features are kept."""
        self.image.reset()
        self._write_buffer()

    def set_target_buffer(self, buffer: np.ndarray | Tensor) -> None:
        """Set what results are written into, in place: uint8, in the shape of the image."""
        if tuple(buffer.shape) != self.label_map.shape:
            raise ValueError(
                f"buffer must have shape {self.label_map.shape}, got {tuple(buffer.shape)}"
            )
        self.target_buffer = buffer
        self._write_buffer()

    def set_active_label(self, label: str | int) -> None:
        """Choose the class that marks without a label are for.

        Raises
        ------
        InputError
            If there is none of this name or integer.
        """
        self.active_label = self._name(label)
        self._write_buffer()

    # ---------------------------------------------------------------- marks

    def add_point_interaction(
        self,
        coordinates: Sequence[float],
        include_interaction: bool,
        run_prediction: bool = True,
        *,
        label: str | int | None = None,
    ) -> ChangedBox | None:
        """Take a click into account, at an index of the image array.

        Parameters
        ----------
        include_interaction : bool
            Whether the label is there; if not, it is background.
        run_prediction : bool
            If not, the mark waits for the next one.
        label : str or int, optional
            Default: `active_label`.

        Returns
        -------
        list of list of int, or None
            The box that holds all changes; None: nothing ran, or nothing changed.

        Raises
        ------
        InputError
            If the position is outside of the image, or the label is unknown. Nothing has changed.
        """
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
        box: Sequence[Sequence[int]],
        include_interaction: bool,
        run_prediction: bool = True,
        *,
        label: str | int | None = None,
    ) -> ChangedBox | None:
        """Take a box around an object into account, [[first, behind the last], ...]; see above.

        Raises
        ------
        ValueError
            If the box is empty.
        """
        if any(low >= high for low, high in box):
            raise ValueError(f"box must not be empty, got {[list(side) for side in box]}")
        corners = self.image.in_file([[low for low, _ in box], [high - 1 for _, high in box]])
        low, high = (tuple(map(function, *corners)) for function in (min, max))
        middle: Any = tuple((a + b) / 2 for a, b in zip(low, high, strict=True))
        found = self._label(label, middle, include_interaction)
        marked = Box(found, low, high, include_interaction, self.image.round)
        return self._add(marked, run_prediction)

    def add_scribble_interaction(
        self,
        scribble: np.ndarray,
        include_interaction: bool,
        run_prediction: bool = True,
        *,
        interaction_bbox: Sequence[Sequence[int]] | None = None,
        label: str | int | None = None,
    ) -> ChangedBox | None:
        """Take voxels above 0 into account; see `add_point_interaction`.

        Parameters
        ----------
        scribble : ndarray
            In the shape of the image; with ``interaction_bbox`` of this box alone.
        """
        offset = [low for low, _ in interaction_bbox] if interaction_bbox is not None else [0] * 3
        size: tuple[int, ...] = self.label_map.shape
        if interaction_bbox is not None:
            size = tuple(high - low for low, high in interaction_bbox)
        if scribble.shape != size:
            raise ValueError(f"scribble must have shape {size}, got {scribble.shape}")
        voxels = np.argwhere(scribble > 0)
        if not len(voxels):
            raise InputError("No voxel of the mark is above 0. Draw something.")
        voxels = voxels + np.asarray(offset)
        (place,) = self.image.in_file(voxels[len(voxels) // 2])
        found = self._label(label, place, include_interaction)
        marked = self.image.marked_voxels(voxels, found, positive=include_interaction)
        return self._written(self.image.add((), marked, run=run_prediction))

    add_lasso_interaction = add_scribble_interaction
    """The inside of the lasso, as voxels."""

    def add_initial_seg_interaction(
        self, initial_seg: np.ndarray, run_prediction: bool = False
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
        drawn = self._checked_segmentation(initial_seg)
        self.reset_interactions()
        prompts: list[SlicePrompt] = []
        for label in self.labels.values():
            voxels = np.argwhere(np.isin(drawn, label))
            if label == 0 or not len(voxels):
                continue
            marked = self.image.marked_voxels(voxels, label, positive=True)
            prompts += sorted(marked, key=lambda prompt: -len(prompt.rows))[:INITIAL_SLICES]
        changed = self.image.add((), tuple(prompts), run=run_prediction, meanwhile=initial_seg)
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

    def _labels_in_words(self) -> str:
        members = {n: (v,) if isinstance(v, int) else v for n, v in self.labels.items()}
        return ", ".join(f"{name} ({', '.join(map(str, of))})" for name, of in members.items())

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

    def suggest_slice(self) -> int | None:
        """Return the slice, along `slice_axis`, that is most in doubt; None: all are marked."""
        return self.image.suggest_slice()

    @property
    def slice_axis(self) -> int:
        """The axis of the image array along which the model sees slices."""
        return int(self.predictor.plans_manager.transpose_forward[0])

    # ---------------------------------------------------------------- how

    def _name(self, label: str | int) -> str:
        for name, value in self.labels.items():
            if label in (name, value):
                return name
        raise InputError(f"Unknown label {label!r}. The labels are {', '.join(self.labels)}.")

    def _label(self, label: str | int | None, place: Any, positive: bool) -> Label:
        """Return the integer of a label, or of the one that is likeliest at a place."""
        if label is not None:
            return self.labels[self._name(label)]
        if self.active_label is None:
            if not positive:
                raise InputError("The first mark must show a label, or name it.")
            (marked,) = self.image.marked(Point(0, place))
            shown = self.shown_labels
            likeliest = self.image.logits_at(marked)[-len(shown) :].argmax()
            self.active_label = [*shown][int(likeliest)]
        return self.labels[self.active_label]

    def _add(self, interaction: Interaction, run: bool) -> ChangedBox | None:
        marked = self.image.marked(interaction)
        return self._written(self.image.add((interaction,), marked, run=run))

    def _written(self, changed: ChangedBox | None) -> ChangedBox | None:
        """Bring the target buffer up to date after a change."""
        self._write_buffer()
        return changed

    def _write_buffer(self) -> None:
        if self.target_buffer is None:
            return
        shown = self.label_map
        if not self.multilabel:
            wanted = self.labels[self.active_label] if self.active_label is not None else ()
            shown = np.isin(self.label_map, wanted).astype(np.uint8)
        if isinstance(self.target_buffer, Tensor):
            self.target_buffer.copy_(torch.from_numpy(shown))
        else:
            self.target_buffer[:] = shown
