"""nnUNetTrainerMosaic: one training step with hooks for methods, and masked validation.

Methods override the hooks of `train_step`: what a label means (`segmentation_loss`), which terms
come on top (`auxiliary_losses`), and which passes follow (`further_passes`). With none of them,
weights and losses equal nnU-Net's bit for bit.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nnmosaic.data_conversion.atomic_write import write_json
from nnmosaic.planners.fingerprint import learnability_warnings
from nnmosaic.planners.preprocessing import FULL_REFERENCES_FOLDER
from nnmosaic.planners.splits import ensure_splits
from nnmosaic.trainers.masked_evaluation import evaluate_folder
from nnmosaic.trainers.resumable import ResumableTrainer
from nnmosaic.trainers.validation_figure import write_figure

GRADIENT_NORM_LIMIT = 12
"""nnU-Net's."""

Logits: TypeAlias = Tensor | list[Tensor]
Pass: TypeAlias = Callable[[], dict[str, Tensor]]
"""A forward pass that returns its weighted loss terms by name."""


def sum_of(terms: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of loss terms, added in their order."""
    return reduce(add, terms.values())


class nnUNetTrainerMosaic(ResumableTrainer):
    """Base of all trainers; by itself plain nnU-Net."""

    OPTIONS: ClassVar[tuple[str, ...]] = ("mirroring",)

    mirroring: bool = True
    """Mirror images in training and prediction. Without, left and right organs differ by side."""
    iteration: int = 0
    """Steps since the start of the training; an epoch that is repeated counts once."""

    # ---------------------------------------------------------------- data

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(  # noqa: N802 - nnU-Net's name
        self,
    ) -> tuple[Any, bool, Any, tuple[int, ...] | None]:
        """Return what nnU-Net returns, without axes to mirror if `mirroring` is off."""
        rotation, dummy_2d, patch_size, axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if not self.mirroring:
            axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, patch_size, axes

    # ---------------------------------------------------------------- one step

    def on_train_epoch_start(self) -> None:
        """Count iterations from the epoch, so that an interrupted one is repeated as it was."""
        super().on_train_epoch_start()
        self.iteration = self.current_epoch * self.num_iterations_per_epoch

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make one optimisation step, as nnU-Net does, on the sum of all terms of all passes.

        Each pass is backpropagated before the next one starts: the gradient is that of the sum, and
        memory holds the activations of one pass.
        """
        batch = self.augmented(self.on_device(batch))
        self.optimizer.zero_grad(set_to_none=True)
        passes: list[Pass] = [partial(self._first_pass, batch), *self.further_passes(batch)]
        terms: dict[str, Tensor] = {}
        for one_pass in passes:
            # DDP averages the gradients that have come together, once.
            last = one_pass is passes[-1]
            with nullcontext() if last or not self.is_ddp else self.network.no_sync():
                with self.autocast():
                    found = one_pass()
                    loss = sum_of(found)
                self._backpropagate(loss)
            terms |= {name: term.detach() for name, term in found.items()}
        self._step()
        self.after_step()
        self.iteration += 1
        values = {name: term.cpu().numpy() for name, term in terms.items()}
        return {"loss": sum_of(terms).cpu().numpy(), **values}

    def _first_pass(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        logits = self.network(batch["data"])
        loss = self.segmentation_loss(logits, batch["target"], batch)
        return {"segmentation": loss, **self.auxiliary_losses(batch, logits)}

    def segmentation_loss(
        self, logits: Logits, target: Tensor | list[Tensor], batch: dict[str, Any]
    ) -> Tensor:
        """Return what the labels say about the logits: the hook for another meaning of labels.

        Parameters
        ----------
        logits, target : Tensor or list of Tensor
            Shapes (B, C, *spatial) and (B, 1, *spatial); with deep supervision lists, full
            resolution first.
        batch : dict
            As the data loader made it: "keys" are the case identifiers of the samples.
        """
        return self.loss(logits, target)

    def auxiliary_losses(self, batch: dict[str, Any], logits: Logits) -> dict[str, Tensor]:
        """Return further, weighted terms on the same logits by name: the hook for regularisers.

        Parameters
        ----------
        batch : dict
            "data" and "target" are on the device.
        """
        return {}

    def further_passes(self, batch: dict[str, Any]) -> list[Pass]:
        """Return what runs the network again on this batch: the hook for other views of the images.

        All processes of a distributed training must return equally many.

        Parameters
        ----------
        batch : dict
            "data" and "target" are on the device.
        """
        return []

    def progress(self) -> float:
        """Return the fraction of the training that is done after this iteration, in (0, 1]."""
        steps = self.num_epochs * self.num_iterations_per_epoch
        return min(1.0, max((self.iteration + 1) / steps, self._spent_budget()))

    def after_step(self) -> None:
        """Do what follows the optimiser's step: the hook for moving averages."""

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log each term, mean over the steps that had it, beside nnU-Net's loss."""
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        names = dict.fromkeys(name for output in train_outputs for name in output)
        for name in list(names)[1:] if len(names) > 2 else ():  # of the loss there is a line
            value = np.mean([output[name] for output in train_outputs if name in output])
            self.print_to_log_file(f"{name} {np.round(value, decimals=4)}")

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Count an epoch that saw no labelled and no predicted voxel as Dice 0.

        NaN would stay in nnU-Net's moving average for good, and no best checkpoint would be kept.
        """
        counts = ("tp_hard", "fp_hard", "fn_hard")
        if not any(np.any(output[name]) for output in val_outputs for name in counts):
            val_outputs = [{**output, "fn_hard": output["fn_hard"] + 1} for output in val_outputs]
        with np.errstate(invalid="ignore"):
            super().on_validation_epoch_end(val_outputs)

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with "data" and "target" on the device."""
        return {
            **batch,
            "data": batch["data"].to(self.device, non_blocking=True),
            "target": self._to_device(batch["target"]),
        }

    def augmented(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a training batch as the network sees it: the hook for augmentation on the device.

        Parameters
        ----------
        batch : dict
            "data" and "target" are on the device.
        """
        return batch

    def autocast(self) -> AbstractContextManager[Any]:
        """Return nnU-Net's autocast: on CUDA only, it is slow or missing elsewhere."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def _to_device(self, target: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(target, list):
            return [level.to(self.device, non_blocking=True) for level in target]
        return target.to(self.device, non_blocking=True)

    def _backpropagate(self, loss: Tensor) -> None:
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()

    def _step(self) -> None:
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
            self.clip_gradients()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.clip_gradients()
            self.optimizer.step()

    def clip_gradients(self) -> None:
        """Bound the norm of the network's gradients as nnU-Net does."""
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_NORM_LIMIT)

    def take_pretrained(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over what nnU-Net's transfer leaves out: the hook after ``-pretrained_weights``."""

    def has_same_labels(self, checkpoint: Mapping[str, Any]) -> bool:
        """Return whether the model of a checkpoint was trained for the labels of this one."""
        made_with = checkpoint.get("init_args", {}).get("dataset_json", {})
        return bool(made_with.get("labels") == self.dataset_json["labels"])

    # ---------------------------------------------------------------- folds and final validation

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return training and validation cases; new folds keep subjects together."""
        if self.fold != "all":
            path = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
            if not path.exists():
                folder = self.preprocessed_dataset_folder
                if self.dataset_class is None:
                    self.dataset_class = self._dataset_class()
                ensure_splits(path, self.dataset_class.get_identifiers(folder), self.dataset)
        return super().do_split()  # type: ignore[no-any-return]

    def _dataset_class(self) -> Any:
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        return infer_dataset_class(self.preprocessed_dataset_folder)

    def predict_and_score_validation(self, save_probabilities: bool) -> None:
        """Write label maps and ``summary.json``: the hook for another way to predict."""
        super().perform_actual_validation(save_probabilities)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does; then score each class only where it was annotated.

        nnU-Net's own summary, in which a class that a source does not annotate counts as absent,
        is kept as ``summary_raw.json``.
        """
        folder = Path(self.output_folder) / "validation"
        if self.local_rank == 0:
            (folder / "summary_raw.json").unlink(missing_ok=True)
        self.predict_and_score_validation(save_probabilities)
        if self.local_rank != 0 or self.dataset.partial_labels is None:
            return
        base = Path(self.preprocessed_dataset_folder_base)
        full = base / FULL_REFERENCES_FOLDER
        summary = evaluate_folder(
            base / "gt_segmentations",
            folder,
            self.dataset,
            full_references=full if full.is_dir() else None,
            allow_missing=True,
        )
        of_dataset = learnability_warnings(base / "dataset_fingerprint.json")
        summary["warnings"] = [*of_dataset, *summary["warnings"]]
        (folder / "summary.json").replace(folder / "summary_raw.json")
        write_json(summary, folder / "summary.json")
        write_figure(summary, folder, file_ending=self.dataset.file_ending)
        self.print_to_log_file("Where annotated:", also_print_to_console=True)
        for label, name in summary["labels"].items():
            self.print_to_log_file(
                f"  {name}: Dice {summary['mean'][label]['Dice']:.4f} in "
                f"{summary['n_cases'][label]} cases"
            )
        for warning in summary["warnings"]:
            self.print_to_log_file(f"Warning: {warning}", also_print_to_console=True)
