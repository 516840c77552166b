"""A trained model as the page asks for it: a case is files, positions are those of its array."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from nnmosaic.data_conversion.case_check import read_image, reader_of
from nnmosaic.data_conversion.dataset_json import parse_dataset_json
from nnmosaic.data_conversion.prompts import prompts_content
from nnmosaic.data_conversion.raw_dataset import Case
from nnmosaic.trainers.clustering_propagation.session import ClusteringPropagationSession

Zyx = tuple[float, float, float]


class CaseSession:
    """A `ClusteringPropagationSession` on image files.

    Parameters
    ----------
    model : Path
        Results folder ``TRAINER__PLANS__CONFIGURATION``.

    Raises
    ------
    InputError
        If there is no such model.
    """

    def __init__(self, model: Path, *, checkpoint: str, device: torch.device) -> None:
        self._session = ClusteringPropagationSession(device)
        self._session.initialize_from_trained_model_folder(model, checkpoint_name=checkpoint)
        content = self._session.predictor.dataset_json
        self._dataset = parse_dataset_json(content, where=str(model))
        self.labels = self._session.shown_labels
        """Class or region -> its value in the label map."""

    @property
    def slice_axis(self) -> int:
        """The axis of the array along which the model sees slices."""
        return self._session.slice_axis

    def open(self, image_files: list[Path]) -> None:
        """Read a case, one file per channel, and predict it without marks.

        Raises
        ------
        InputError
            If a file cannot be read.
        """
        case = Case(image_files[0].name, tuple(image_files), None)
        channels = len(self._dataset.channel_names)
        image, self._geometry = read_image(case, reader_of(self._dataset), num_channels=channels)
        self._session.set_image(image, self._geometry)

    def label_map(self) -> np.ndarray:
        """Return the present result, shape (Z, Y, X)."""
        return self._session.label_map

    def save(self, path: Path) -> None:
        """Write the result with the geometry of the image, in one step.

        Raises
        ------
        OSError
            If it cannot be written; then a file of this name is left as it was.
        """
        with TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder) / path.name
            try:
                reader_of(self._dataset).write_seg(self.label_map(), str(file), self._geometry)
            except RuntimeError as error:  # SimpleITK's, when the disk is full, for one
                raise OSError(str(error)) from error
            file.replace(path)

    def add_point(self, coordinates_zyx: Zyx, label: str, positive: bool) -> object:
        """Take one click into account."""
        return self._session.add_point_interaction(coordinates_zyx, positive, label=label)

    def add_scribble(
        self, coordinates_zyx: Sequence[Zyx], label: str, positive: bool, radius: float
    ) -> object:
        """Take one stroke into account; ``radius`` is in voxels."""
        return self._session.add_scribble(coordinates_zyx, positive, label=label, radius=radius)

    def undo(self) -> bool:
        """Take the last click or stroke back; False: there is none."""
        return self._session.undo()

    def reset(self) -> None:
        """Go back to the automatic result."""
        self._session.reset_interactions()

    def prompts(self) -> dict[str, Any]:
        """Return all clicks and strokes, as a prompts file holds them."""
        return prompts_content(self._session.prompts, self._dataset.content["labels"], Path())

    def suggest_slice(self) -> int | None:
        """Return the slice that is most in doubt; None: all are marked."""
        return self._session.suggest_slice()
