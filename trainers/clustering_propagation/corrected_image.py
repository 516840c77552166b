"""One image, predicted and then corrected by marks: from the image's array to the network's."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.interactions import Coordinates, Interaction, Label, Prompts
from nnmosaic.trainers.clustering_propagation.coordinates import CaseCoordinates, filled
from nnmosaic.trainers.clustering_propagation.label_map import write_labels
from nnmosaic.trainers.clustering_propagation.marks import apply_prompts
from nnmosaic.trainers.clustering_propagation.predictor import PropagationPredictor
from nnmosaic.trainers.clustering_propagation.slice_prompts import (
    SlicePrompt,
    by_slice,
    slice_prompts,
)

ChangedBox = list[list[int]]
"""[[first, behind the last], ...] along the axes of the image array."""
Progress = tuple[int, int]
"""Steps, and marks that wait for the next one: grows with every mark."""
MOST_BYTES = 4 * 2**30
"""Of features that are kept for corrections."""


class _Waiting(NamedTuple):
    """What waits for the next step.

    Attributes
    ----------
    interactions : tuple of Interaction
        That can be written to a file.
    marks : tuple of SlicePrompt
        All that is marked.
    shown_before : ndarray, optional
        The label map that was replaced meanwhile.
    """

    interactions: tuple[Interaction, ...]
    marks: tuple[SlicePrompt, ...]
    shown_before: np.ndarray | None


class CorrectedImage:
    """An image with its automatic result, which marks change step by step.

    Parameters
    ----------
    predictor : PropagationPredictor
    image : ndarray, shape (channels, x, y, z)
        The axes may have any order.
    image_properties : mapping
        As nnU-Net's readers return them; "spacing" is enough.
    """

    def __init__(
        self,
        predictor: PropagationPredictor,
        image: np.ndarray,
        image_properties: Mapping[str, Any],
    ) -> None:
        self.predictor = predictor
        configuration = predictor.configuration_manager
        data, _, self.properties = configuration.preprocessor_class(verbose=False).run_case_npy(
            image, None, dict(image_properties), predictor.plans_manager, configuration,
            predictor.dataset_json,
        )  # fmt: skip
        self._coordinates = CaseCoordinates.of_case(
            self.properties,
            transpose_forward=predictor.plans_manager.transpose_forward,
            network_shape=data.shape[1:],
        )
        predictor.set_case(self.properties)
        self._features = predictor.volume_features(torch.from_numpy(data), most_bytes=MOST_BYTES)
        highest = max(predictor.label_manager.all_labels)
        self.label_map = np.zeros(image.shape[1:], np.uint8 if highest < 255 else np.uint16)
        """Labels of the image array, always up to date."""
        self.reset()

    def reset(self) -> None:
        """Go back to the automatic result; features are kept."""
        self.volume = self.predictor.interactive_volume(self._features)
        self._steps: list[tuple[Interaction, ...]] = []
        self._waiting: list[_Waiting] = []
        self._update(range(len(self._features)))

    # ---------------------------------------------------------------- positions

    def in_file(self, places: Any) -> list[Coordinates]:
        """Return indices of the image array as voxels of the file, z, y, x.

        Raises
        ------
        InputError
            If one is not finite.
        """
        points = np.asarray(places, float).reshape(-1, 3)
        if not np.isfinite(points).all():
            raise InputError("A position is not a finite number. Give three indices.")
        to_file = np.linalg.inv(self._coordinates.geometry.file_to_array)
        found = points @ to_file[:3, :3].T + to_file[:3, 3]
        return [(float(z), float(y), float(x)) for x, y, z in found]

    def marked(self, interaction: Interaction) -> tuple[SlicePrompt, ...]:
        """Return what an interaction, in voxels of the file, marks on each slice.

        Raises
        ------
        InputError
            If it is outside of the image.
        """
        prompts = Prompts("voxel", order="zyx", interactions=(interaction,))
        reader = self.predictor.plans_manager.image_reader_writer_class()
        return slice_prompts(
            prompts, self._coordinates, read_mask=lambda path: reader.read_seg(str(path)),
            where="mark",
        )  # fmt: skip

    def marked_voxels(
        self, voxels: np.ndarray, label: Label, *, positive: bool, clicked: bool = False
    ) -> tuple[SlicePrompt, ...]:
        """Return what voxels (P, 3) of the image array mark on each slice.

        Parameters
        ----------
        clicked : bool
            Whether they speak for what is around them, too.
        """
        dense = filled(voxels, self._coordinates.array_to_network)
        points = self._coordinates.array_points_to_network(dense, where="mark")
        prompts = by_slice(
            points, self._coordinates, label, positive=positive, round=self.round, clicked=clicked
        )
        return tuple(prompts)

    def kept(self, labels: np.ndarray) -> np.ndarray:
        """Return a copy of a label map with 0 in the empty rim, which the network does not see."""
        forward = self.predictor.plans_manager.transpose_forward
        where = tuple(slice(*side) for side in self.properties["bbox_used_for_cropping"])
        found = np.zeros_like(labels)
        found.transpose(forward)[where] = labels.transpose(forward)[where]
        return found

    def logits_at(self, prompt: SlicePrompt) -> torch.Tensor:
        """Return the logits (K,) at the first position of a mark."""
        logits = self.volume.logits([prompt.slice_index])[:, 0]
        return logits[:, round(float(prompt.rows[0])), round(float(prompt.columns[0]))]

    def likeliest_other(self, marks: Sequence[SlicePrompt]) -> Label:
        """Return what most positions of marks show now, if not the label of the marks.

        Of exclusive labels. The background is one of them, and wins a tie.
        """
        labels = self.predictor.label_manager.all_labels
        votes = torch.zeros(len(labels))
        for mark in marks:
            rows, columns = (
                torch.from_numpy(np.floor(position + 0.5).astype(int))
                for position in (mark.rows, mark.columns)
            )
            found = self.volume.logits([mark.slice_index])[:, 0, rows, columns].float()
            found[labels.index(mark.label)] = -torch.inf
            votes += found.argmax(0).bincount(minlength=len(labels))
        return int(labels[int(votes.argmax())])

    def suggest_slice(self) -> int | None:
        """Return the slice of the image array that is most in doubt; None: all are marked."""
        index = self.volume.doubtful_slice()
        if index is None:
            return None
        return int(self.properties["bbox_used_for_cropping"][0][0]) + index

    # ---------------------------------------------------------------- steps

    @property
    def round(self) -> int:
        """Of the next mark: what is taken into account together is one round."""
        return len(self._steps)

    @property
    def progress(self) -> Progress:
        """How far the image has come: less after `undo`."""
        return len(self._steps), len(self._waiting)

    @property
    def interactions(self) -> tuple[Interaction, ...]:
        """All so far, those that wait, too."""
        steps = [*self._steps, *(waiting.interactions for waiting in self._waiting)]
        return tuple(one for step in steps for one in step)

    def add(
        self,
        interactions: tuple[Interaction, ...],
        marks: tuple[SlicePrompt, ...],
        *,
        run: bool,
        meanwhile: np.ndarray | None = None,
    ) -> ChangedBox | None:
        """Take marks into account, with those that wait; or let them wait.

        Nothing changes if it fails.

        Parameters
        ----------
        meanwhile : ndarray, optional
            The label map while they wait.

        Returns
        -------
        list of list of int, or None
            The box that holds all changes; None: nothing ran, or nothing changed.
        """
        before = None if meanwhile is None else self.label_map.copy()
        steps = [*self._waiting, _Waiting(interactions, marks, before)]
        if not run:
            self._waiting = steps
            if meanwhile is not None:
                self.label_map[:] = meanwhile
            return None
        together = [mark for step in steps for mark in step.marks]
        (changed,) = apply_prompts(self.volume, together, self.predictor.label_manager)
        try:
            box = self._update(changed)
        except BaseException:
            self.volume.undo()
            raise
        self._steps.append(tuple(one for step in steps for one in step.interactions))
        self._waiting = []
        return box

    def undo(self) -> bool:
        """Take the last step back exactly; return whether there was one."""
        if self._waiting:
            shown = self._waiting.pop().shown_before
            if shown is not None:
                self.label_map[:] = shown
            return True
        changed = self.volume.undo()
        if changed is None:
            return False
        self._steps.pop()
        self._update(changed)
        return True

    def _update(self, changed: range) -> ChangedBox | None:
        """Bring the label map up to date, and return the box of what changed."""
        everything = changed == range(len(self._features))
        # What a segmentation showed beside the part that was kept goes, too.
        labels = np.zeros_like(self.label_map) if everything else self.label_map.copy()
        if len(changed):
            write_labels(
                labels, self.volume.logits(changed), changed.start,
                properties=self.properties, predictor=self.predictor,
            )  # fmt: skip
        places = np.argwhere(labels != self.label_map)
        self.label_map[:] = labels
        if not len(places):
            return None
        low, high = places.min(0), places.max(0) + 1
        return [[int(a), int(b)] for a, b in zip(low, high, strict=True)]
