"""The final validation, with propagation: nnU-Net's own would predict slice by slice."""

from pathlib import Path
from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.inference.export_prediction import export_prediction_from_logits

from nnmosaic.trainers.clustering_propagation.predictor import PropagationPredictor


def predict_validation_cases(trainer: Any, folder: Path, *, save_probabilities: bool) -> None:
    """Write the label maps of this process's share of the validation cases.

    Parameters
    ----------
    trainer : nnUNetTrainerClusteringPropagation
        Initialised.
    """
    predictor = PropagationPredictor(
        perform_everything_on_device=False, device=trainer.device, allow_tqdm=False
    )
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None,
        trainer.dataset_json, type(trainer).__name__, trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    cases = trainer.do_split()[1]
    if trainer.is_ddp:
        cases = cases[trainer.local_rank :: torch.distributed.get_world_size()]
    folder.mkdir(parents=True, exist_ok=True)
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    for case in dataset.identifiers:
        trainer.print_to_log_file(f"predicting {case}")
        data, _, _, properties = dataset.load_case(case)
        predictor.set_case(properties)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(data[:]))
        export_prediction_from_logits(
            logits, properties, trainer.configuration_manager, trainer.plans_manager,
            trainer.dataset_json, str(folder / case), save_probabilities,
            num_threads_torch=torch.get_num_threads(),
        )  # fmt: skip


def write_summary(trainer: Any, folder: Path) -> dict[str, Any]:
    """Write nnU-Net's ``summary.json`` for the label maps of a folder, and return it."""
    labels = trainer.label_manager
    summary: dict[str, Any] = compute_metrics_on_folder(
        str(Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations"),
        str(folder),
        str(folder / "summary.json"),
        trainer.plans_manager.image_reader_writer_class(),
        trainer.dataset_json["file_ending"],
        labels.foreground_regions if labels.has_regions else labels.foreground_labels,
        labels.ignore_label,
        num_processes=default_num_processes,
        chill=True,
    )
    return summary
