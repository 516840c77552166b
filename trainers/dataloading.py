"""nnU-Net's data loaders, with loaders of the trainer's choice."""

from collections.abc import Callable, Iterator
from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

Batches = Iterator[dict[str, Any]]


def make_loaders(
    trainer: Any,
    training_loader: Callable[..., nnUNetDataLoader],
    validation_loader: Callable[..., nnUNetDataLoader] = nnUNetDataLoader,
) -> tuple[Batches, Batches]:
    """Return batches for training and validation as nnU-Net's ``get_dataloaders`` does.

    Parameters
    ----------
    trainer : nnUNetTrainer
        Initialised.
    training_loader, validation_loader : callable
        Called like `nnUNetDataLoader`, whose ``get_indices`` and ``get_bbox`` decide what is drawn.
    """
    patch_size = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales()
    rotation, dummy_2d, initial_patch_size, mirror_axes = (
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    )
    labels = trainer.label_manager
    meaning = {
        "is_cascaded": trainer.is_cascaded,
        "foreground_labels": labels.foreground_labels,
        "regions": labels.foreground_regions if labels.has_regions else None,
        "ignore_label": labels.ignore_label,
    }
    transforms = trainer.get_training_transforms(
        patch_size, rotation, scales, mirror_axes, dummy_2d,
        use_mask_for_norm=trainer.configuration_manager.use_mask_for_norm, **meaning,
    )  # fmt: skip
    training, validation = trainer.get_tr_and_val_datasets()
    common = {
        "oversample_foreground_percent": trainer.oversample_foreground_percent,
        "probabilistic_oversampling": trainer.probabilistic_oversampling,
    }
    loaders = (
        training_loader(
            training, trainer.batch_size, initial_patch_size, patch_size, labels,
            transforms=transforms, **common,
        ),
        validation_loader(
            validation, trainer.batch_size, patch_size, patch_size, labels,
            transforms=trainer.get_validation_transforms(scales, **meaning), **common,
        ),
    )  # fmt: skip
    workers = get_allowed_n_proc_DA()
    first, second = (
        _batches(loader, min(workers, max(1, count)), cached, pin=trainer.device.type == "cuda")
        for loader, count, cached in (
            (loaders[0], workers, max(6, workers // 2)),
            (loaders[1], workers // 2, max(3, workers // 4)),
        )
    )
    next(first), next(second)  # starts the workers, and shows at once what is wrong
    return first, second


def _batches(loader: nnUNetDataLoader, workers: int, cached: int, *, pin: bool) -> Any:
    if workers == 0:
        return SingleThreadedAugmenter(loader, None)
    return NonDetMultiThreadedAugmenter(
        data_loader=loader,
        transform=None,
        num_processes=workers,
        num_cached=cached,
        pin_memory=pin,
        wait_time=0.002,
    )
