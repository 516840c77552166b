"""A session but for its marks: the model, the image, what is shown, and what viewers ask.

Names as in nnInteractive 2 (clustering_propagation.md, 5.6). What takes marks is in `session`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.interactions import Label, named_labels
from nnmosaic.trainers.clustering_propagation.corrected_image import (
    ChangedBox,
    CorrectedImage,
    Progress,
)
from nnmosaic.trainers.clustering_propagation.predictor import PropagationPredictor
from nnmosaic.trainers.predictor import available_folds, load_predictor

logger = logging.getLogger(__name__)


class SessionSurface:
    """A session that takes no marks yet, with all that programs for nnInteractive ask of one.

    Parameters
    ----------
    device : torch.device
    torch_n_threads : int, optional
        Threads of torch on the CPU, in all of this process; default: as they are.
    use_torch_compile, verbose, do_autozoom, interactions_storage
        Taken because viewers give them; results do not depend on them. Nothing is compiled
        (a warning says so), printed, or stored in channels; on ``do_autozoom`` see
        `set_do_autozoom`.

    Attributes
    ----------
    multilabel : bool
        Whether the target buffer gets all labels; if not, a mask of the active one.
    supported_interactions : mapping
        Kind -> whether marks of it are taken. A program may replace it to switch some off: unless
        they come with ``override_capability_checks``, they are refused.
    supports_initial_label : bool
        The same of `add_initial_seg_interaction`.
    channel_mapping, num_interaction_channels
        Channels of the network's input that hold marks. There are none: marks make centres.
    interaction_decay : None
        Marks do not fade.
    original_image_shape : tuple of int, optional
        (channels, x, y, z) of the present image.
    target_buffer : ndarray or Tensor, optional
        What results are written into.
    """

    supported_interactions: Mapping[str, bool] = {
        "points": True, "scribble": True, "lasso": True, "bbox2d": True, "bbox3d": True
    }  # fmt: skip
    supports_initial_label = True
    supports_zero_shot_label_refinement = False
    supports_undo = True
    num_interaction_channels = 0
    preferred_scribble_thickness: Sequence[int] = (1, 1, 1)
    interaction_decay: float | None = None
    predictor: PropagationPredictor

    def __init__(
        self,
        device: torch.device,
        *,
        use_torch_compile: bool = False,
        torch_n_threads: int | None = None,
        verbose: bool = False,
        do_autozoom: bool = True,
        interactions_storage: str = "auto",
    ) -> None:
        if torch_n_threads is not None:
            if torch_n_threads < 1:
                raise ValueError(f"torch_n_threads must be at least 1, got {torch_n_threads}")
            torch.set_num_threads(torch_n_threads)
        if use_torch_compile:
            logger.warning("use_torch_compile: this network is used as it is, not compiled.")
        self.device = device
        self.multilabel = True
        self.do_autozoom = do_autozoom
        self.channel_mapping: Mapping[str, tuple[int, int]] = {}
        self.original_image_shape: tuple[int, ...] | None = None
        self.target_buffer: np.ndarray | Tensor | None = None
        self._chosen_label: str | None = None
        self._found_label: tuple[str, Progress] | None = None

    def set_do_autozoom(self, do_autozoom: bool) -> None:
        """Keep what a viewer wishes, as `do_autozoom`.

        It changes nothing: slices are always seen whole, so that there is nothing to zoom out of.
        """
        self.do_autozoom = do_autozoom

    def warmup(self) -> None:
        """Run the network once on an empty slice, so that the first image does not wait for it.

        Raises
        ------
        RuntimeError
            If there is no model yet.
        """
        if not hasattr(self, "predictor"):
            raise RuntimeError("call initialize_from_trained_model_folder first: there is no model")
        plans, configuration = self.predictor.plans_manager, self.predictor.configuration_manager
        channels = determine_num_input_channels(plans, configuration, self.predictor.dataset_json)
        empty = torch.zeros(channels, 1, *configuration.patch_size)
        self.predictor.interactive_volume(self.predictor.volume_features(empty))

    # ---------------------------------------------------------------- model and image

    def initialize_from_trained_model_folder(
        self,
        folder: Path | str,
        use_fold: int | str | None = None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """Load a model; default: its first trained fold.

        Raises
        ------
        InputError
            If the folder holds no model of this method.
        """
        folder = Path(folder)
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
        self.target_buffer = None
        self._chosen_label = self._found_label = None

    @property
    def label_map(self) -> np.ndarray:
        """The present result: labels of the image array. It is changed in place."""
        return self.image.label_map

    def reset_interactions(self) -> None:
        """Go back to the automatic result; features, and a label that was chosen, are kept."""
        self.image.reset()
        self._found_label = None
        self._write_buffer()

    def set_target_buffer(self, buffer: np.ndarray | Tensor) -> None:
        """Set what results are written into, in place: uint8, in the shape of the image."""
        if tuple(buffer.shape) != self.label_map.shape:
            raise ValueError(
                f"buffer must have shape {self.label_map.shape}, got {tuple(buffer.shape)}"
            )
        self.target_buffer = buffer
        self._write_buffer()

    @property
    def active_label(self) -> str | None:
        """The class that marks without a label are for.

        The one that was set; else that of the first positive mark without one, as long as this mark
        counts; None: there is none yet.
        """
        if self._chosen_label is None and self._found_label is not None:
            name, before = self._found_label
            return name if self.image.progress > before else None
        return self._chosen_label

    def set_active_label(self, label: str | int) -> None:
        """Choose the class that marks without a label are for.

        Raises
        ------
        InputError
            If there is none of this name or integer.
        """
        self._chosen_label = self._name(label)
        self._write_buffer()

    def suggest_slice(self) -> int | None:
        """Return the slice, along `slice_axis`, that is most in doubt; None: all are marked."""
        return self.image.suggest_slice()

    @property
    def slice_axis(self) -> int:
        """The axis of the image array along which the model sees slices."""
        return int(self.predictor.plans_manager.transpose_forward[0])

    # ---------------------------------------------------------------- how

    def _check_supported(self, kind: str, override: bool) -> None:
        supported = (
            self.supports_initial_label
            if kind == "initial_label"
            else self.supported_interactions[kind]
        )
        if not (supported or override):
            raise InputError(
                f"This session takes no {kind}: it was switched off. Use another kind of mark, or "
                "override_capability_checks."
            )

    def _name(self, label: str | int) -> str:
        for name, value in self.labels.items():
            if label in (name, value):
                return name
        raise InputError(f"Unknown label {label!r}. The labels are {', '.join(self.labels)}.")

    def _labels_in_words(self) -> str:
        members = {n: (v,) if isinstance(v, int) else v for n, v in self.labels.items()}
        return ", ".join(f"{name} ({', '.join(map(str, of))})" for name, of in members.items())

    def _written(self, changed: ChangedBox | None) -> ChangedBox | None:
        """Bring the target buffer up to date after a change."""
        self._write_buffer()
        return changed

    def _write_buffer(self) -> None:
        if self.target_buffer is None:
            return
        shown = self.label_map
        if not self.multilabel:
            active = self.active_label
            wanted = self.labels[active] if active is not None else ()
            shown = np.isin(self.label_map, wanted).astype(np.uint8)
        if isinstance(self.target_buffer, Tensor):
            self.target_buffer.copy_(torch.from_numpy(shown))
        else:
            self.target_buffer[:] = shown
