"""What nnU-Net expects of a trainer, for every trainer of the package."""

import pickle
import random
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnmosaic.trainers.ext_trainer
from nnmosaic.trainers import FIRST_STAGE, RATER_TRAINERS, TRAINERS
from nnmosaic.trainers.checkpoint import read_checkpoint
from nnmosaic.trainers.lookup import trainer_class

SHIM = Path(nnmosaic.trainers.ext_trainer.__file__).parent / "nnmosaic_trainers.py"
DATASETS = ("Dataset004_Balls", "Dataset007_Merged")
OF_RATERS = "Dataset008_Raters"
OF_SLICES = ("nnUNetTrainerClusteringPropagation",)
each_trainer = pytest.mark.parametrize("name", list(TRAINERS))
TRAINER_AND_DATASET = [
    (name, dataset)
    for name in TRAINERS
    for dataset in ((OF_RATERS,) if name in RATER_TRAINERS else DATASETS)
]
each_trainer_and_dataset = pytest.mark.parametrize(("name", "dataset"), TRAINER_AND_DATASET)


def configuration(name: str) -> str:
    return "2d" if name in OF_SLICES else "3d_fullres"


@each_trainer
def test_the_shim_gives_nnunet_the_same_class(name: str) -> None:
    spec = spec_from_file_location("nnmosaic_trainers", SHIM)  # as nnU-Net's own lookup imports it
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert getattr(module, name) is trainer_class(name)
    assert pickle.loads(pickle.dumps(trainer_class(name))) is trainer_class(name)


@each_trainer_and_dataset
def test_the_network_is_as_nnunet_reads_it(
    name: str, dataset: str, make_trainer: Callable[..., Any]
) -> None:
    trainer = make_trainer(trainer_class(name), dataset, configuration(name))
    trainer.initialize()
    data = torch.randn(1, 1, *trainer.configuration_manager.patch_size)
    for mode in (trainer.network.train(), trainer.network.eval()):
        logits = mode(data)
        assert isinstance(logits, list) == trainer.enable_deep_supervision
        assert (logits[0] if isinstance(logits, list) else logits).shape == (1, 3, *data.shape[2:])
    trainer.set_deep_supervision_enabled(False)
    assert trainer.network(data).shape == (1, 3, *data.shape[2:])
    manager = trainer.configuration_manager
    at_inference = trainer_class(name).build_network_architecture(
        trainer.plans_manager, manager, 1, 3, enable_deep_supervision=False
    )
    at_inference.load_state_dict(trainer.network.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("name", "dataset"),
    # A second stage needs a trained first one: see multi_rater/test_trainer.py.
    [pair for pair in TRAINER_AND_DATASET if pair[0] not in FIRST_STAGE],
)
@pytest.mark.slow
def test_steps_on_a_fixed_batch_lower_the_loss(
    name: str, dataset: str, make_trainer: Callable[..., Any]
) -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    trainer = make_trainer(trainer_class(name), dataset, configuration(name))
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(15)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        outputs = trainer.validation_step(batch)
    assert outputs["tp_hard"].shape == (2,)


@each_trainer
def test_mirroring_can_be_switched_off(name: str, make_trainer: Callable[..., Any]) -> None:
    dataset = OF_RATERS if name in RATER_TRAINERS else DATASETS[0]
    for switch in ("true", "false"):
        options = {"mirroring": switch}
        trainer = make_trainer(trainer_class(name), dataset, configuration(name), options=options)
        trainer.initialize()
        training, _ = trainer.get_dataloaders()
        steps = repr(training.data_loader.transforms)
        assert "SpatialTransform" in steps
        assert ("MirrorTransform" in steps) == (switch == "true")
        path = Path(trainer.output_folder) / "checkpoint_latest.pth"
        trainer.save_checkpoint(str(path))
        axes = read_checkpoint(path)["inference_allowed_mirroring_axes"]
        assert (axes is None) == (switch == "false")


@each_trainer
def test_arguments_are_not_changed(name: str, make_trainer: Callable[..., Any]) -> None:
    dataset = OF_RATERS if name in RATER_TRAINERS else DATASETS[0]
    template = make_trainer(trainer_class(name), dataset, configuration(name))
    plans = {**template.my_init_kwargs["plans"], "continue_training": False}
    before = repr(plans)
    trainer = trainer_class(name)(
        plans, configuration(name), 0, template.dataset_json, torch.device("cpu")
    )
    trainer.initialize()
    assert repr(plans) == before
