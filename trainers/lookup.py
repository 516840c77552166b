"""From a trainer's name to its class, without nnU-Net's walk through all of its modules.

That walk imports torchvision; a torchvision built for another torch breaks it for every trainer.
"""

from importlib import import_module

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers import TRAINERS


def trainer_class(name: str) -> type[nnUNetTrainer]:
    """Return a trainer class: nnMosaic's by name, else nnU-Net's or one of ``nnUNet_extTrainer``.

    Raises
    ------
    InputError
        If there is none of that name, or nnU-Net's own lookup fails.
    """
    if name in TRAINERS:
        return getattr(import_module(TRAINERS[name]), name)  # type: ignore[no-any-return]
    if name == nnUNetTrainer.__name__:
        return nnUNetTrainer  # type: ignore[no-any-return]
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        return recursive_find_trainer_class_by_name(name)  # type: ignore[no-any-return]
    except RuntimeError as error:
        known = ", ".join([*TRAINERS, nnUNetTrainer.__name__])
        raise InputError(
            f"The trainer {name!r} was not found by nnU-Net ({str(error).splitlines()[0]}). "
            f"nnMosaic has {known}. If the message is about torchvision, install the build that "
            "fits torch."
        ) from None
