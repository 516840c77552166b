"""The base trainer: nnU-Net bit for bit, run settings, and nothing lost when a run is stopped."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import (
    nnUNetTrainerNoMirroring,
)

from nnmosaic.data_conversion.dataset_json import parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.checkpoint import EXTRA, read_checkpoint
from nnmosaic.trainers.context_reconstruction.trainer import nnUNetTrainerContextReconstruction
from nnmosaic.trainers.resumable import TrainingStoppedError
from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation
from nnmosaic.trainers.self_disambiguation_context import nnUNetTrainerSelfDisambiguationContext

PARTIAL = "Dataset007_Merged"
Make = Callable[..., Any]


def train(trainer: Any, seed: int = 0) -> dict[str, Any]:
    """Train from a seed and return all that a run leaves behind."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    trainer.run_training()
    return {
        "weights": trainer.network.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "logs": trainer.logger.get_checkpoint(),
    }


def without_times(logs: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in logs.items() if "timestamps" not in name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stock", "ours", "options"),
    [
        (nnUNetTrainer, nnUNetTrainerMosaic, None),
        (nnUNetTrainerNoMirroring, nnUNetTrainerMosaic, {"mirroring": "false"}),
        (nnUNetTrainer, nnUNetTrainerSelfDisambiguation, None),
        (
            nnUNetTrainer,
            nnUNetTrainerSelfDisambiguationContext,
            {"masked_weight": "0", "reconstruction_weight": "0"},
        ),
        (
            nnUNetTrainer,
            nnUNetTrainerContextReconstruction,
            {"masked_weight": "0", "reconstruction_weight": "0"},
        ),
        (nnUNetTrainer, nnUNetTrainerContextReconstruction, {"few_cases": "3"}),
    ],
)
def test_three_epochs_equal_nnunets_bit_for_bit(
    make_trainer: Make, stock: type, ours: type, options: dict[str, str] | None
) -> None:
    expected = train(make_trainer(stock))
    got = train(make_trainer(ours, options=options))
    assert len(expected["logs"]["train_losses"]) == 3
    assert len(set(expected["logs"]["train_losses"])) == 3
    for name, weight in expected["weights"].items():
        assert torch.equal(weight, got["weights"][name]), name
    for index, state in expected["optimizer"]["state"].items():
        momentum = got["optimizer"]["state"][index]["momentum_buffer"]
        assert torch.equal(state["momentum_buffer"], momentum)
    assert str(without_times(got["logs"])) == str(without_times(expected["logs"]))


@pytest.mark.slow
def test_a_source_that_annotates_all_changes_nothing(make_trainer: Make) -> None:
    options = {"entropy": "conditional", "ema_teacher": "true", "ramp": "0", "sampling": "nnunet"}
    runs = []
    for cls, wanted in ((nnUNetTrainerMosaic, None), (nnUNetTrainerSelfDisambiguation, options)):
        trainer = make_trainer(cls, epochs=1, options=wanted)
        if wanted:
            sources = {"everywhere": {"pattern": ".", "annotated": "all"}}
            content = {**trainer.dataset_json, "partial_labels": {"sources": sources}}
            trainer.dataset_json, trainer.dataset = content, parse_dataset_json(content)
        runs.append(train(trainer))
        assert (trainer.dataset.partial_labels is not None) == bool(wanted)
    for name, weight in runs[0]["weights"].items():
        assert torch.equal(weight, runs[1]["weights"][name]), name


@pytest.mark.slow
def test_the_seed_decides_the_run(make_trainer: Make) -> None:
    runs = [
        train(make_trainer(nnUNetTrainerMosaic, seed=seed, epochs=1), seed=other)
        for seed, other in ((5, 1), (5, 2), (6, 1))
    ]
    losses = [run["logs"]["train_losses"] for run in runs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.slow
def test_settings_shape_the_run_and_are_in_the_checkpoint(make_trainer: Make) -> None:
    settings = {"optimizer": "adamw", "initial_lr": 4e-3, "batch_size": 3, "epochs": 2}
    trainer = make_trainer(nnUNetTrainerMosaic, **settings)
    run = train(trainer)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert run["logs"]["lrs"] == pytest.approx([4e-3, 4e-3 * 0.5**0.9])
    assert next(trainer.dataloader_train)["data"].shape[0] == 3
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    stored = read_checkpoint(path)[EXTRA]
    expected = {"iterations_per_epoch": 3, "val_iterations_per_epoch": 2, **settings}
    assert stored["run_settings"] == {**expected, "options": {"mirroring": "true"}}
    assert stored["seconds_trained"] > 0


def test_plans_give_settings_that_the_command_overrides(make_trainer: Make, plans_of: Make) -> None:
    plans = plans_of("Dataset004_Balls")
    trainer = make_trainer(nnUNetTrainerMosaic)
    trainer = nnUNetTrainerMosaic(plans, "3d_fullres", 0, trainer.dataset_json, torch.device("cpu"))
    trainer.request_settings(type(trainer.run_settings)(epochs=7))
    trainer.initialize()
    assert trainer.num_epochs == 7
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trainer.initial_lr == plans["nnmosaic"]["run_settings"]["initial_lr"]
    weight = trainer.network.encoder.stages[1][0].convs[0].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_settings_and_refuses_others(make_trainer: Make) -> None:
    first = make_trainer(nnUNetTrainerMosaic, initial_lr=3e-3, epochs=4)
    first.save_every = 1
    first.on_epoch_end_before = first.on_epoch_end

    def stop_after_two() -> None:
        first.on_epoch_end_before()
        if first.current_epoch == 2:
            raise KeyboardInterrupt

    first.on_epoch_end = stop_after_two
    with pytest.raises(KeyboardInterrupt):
        first.run_training()
    path = Path(first.output_folder) / "checkpoint_latest.pth"

    conflicting = make_trainer(nnUNetTrainerMosaic, initial_lr=1e-2)
    with pytest.raises(InputError, match=r"trained with --epochs 4, not 3\. Leave the flag out"):
        conflicting.load_checkpoint(str(path))

    second = make_trainer(nnUNetTrainerMosaic, epochs=4)
    second.load_checkpoint(str(path))
    second.run_training()
    assert second.run_settings.initial_lr == 3e-3
    assert len(second.logger.get_checkpoint()["lrs"]) == 4
    assert second.logger.get_checkpoint()["lrs"][3] == pytest.approx(3e-3 * 0.25**0.9)


class StoppedInEpochOne(nnUNetTrainerMosaic):
    """Gets a SIGTERM in the middle of its second epoch."""

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().train_step(batch)


@pytest.mark.slow
def test_sigterm_saves_and_the_epoch_is_repeated(make_trainer: Make) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(StoppedInEpochOne)
    with pytest.raises(TrainingStoppedError, match="stopped by SIGTERM in epoch 1; saved to"):
        trainer.run_training()
    assert signal.getsignal(signal.SIGTERM) is handler
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    assert read_checkpoint(path)["current_epoch"] == 1
    resumed = make_trainer(nnUNetTrainerMosaic)
    resumed.load_checkpoint(str(path))
    resumed.run_training()
    logs = resumed.logger.get_checkpoint()
    assert {name: len(values) for name, values in logs.items() if values} == dict.fromkeys(
        (name for name, values in logs.items() if values), 3
    )


@pytest.mark.slow
def test_a_checkpoint_is_due_when_the_last_one_is_old(make_trainer: Make) -> None:
    trainer = make_trainer(nnUNetTrainerMosaic)
    trainer.seconds_between_checkpoints = 0.0
    every = trainer.save_every
    written = []
    save = trainer.save_checkpoint
    trainer.save_checkpoint = lambda name: (written.append(Path(name).name), save(name))
    trainer.run_training()
    assert written.count("checkpoint_latest.pth") == 2  # after the last epoch, the final one
    assert trainer.save_every == every
    names = sorted(path.name for path in Path(trainer.output_folder).glob("*.pth*"))
    assert "checkpoint_final.pth" in names
    assert "checkpoint_latest.pth" not in names


def test_a_failed_save_keeps_the_old_checkpoint(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(nnUNetTrainerMosaic)
    trainer.initialize()
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(str(path))
    before = path.read_bytes()

    def full_disk(_: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".tmp"] == []


@pytest.mark.slow
def test_the_time_budget_ends_training_and_schedule(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(nnUNetTrainerMosaic, time_budget=1.0, epochs=100)
    monkeypatch.setattr(trainer, "_seconds_trained", lambda: 20.0 * trainer.current_epoch)
    trainer.run_training()
    assert trainer.current_epoch == 3
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert "About 0.7 min of training left" in log  # 20 of 60 s are spent, 97 epochs would fit
    lrs = trainer.logger.get_checkpoint()["lrs"]
    assert lrs == pytest.approx([1e-2, 1e-2 * (2 / 3) ** 0.9, 1e-2 * (1 / 3) ** 0.9])


def test_a_stored_time_budget_is_refused_with_several_processes(make_trainer: Make) -> None:
    """Their clocks differ, and so would their numbers of steps."""
    first = make_trainer(nnUNetTrainerMosaic, time_budget=1.0)
    first.initialize()
    path = f"{first.output_folder}/checkpoint_latest.pth"
    first.save_checkpoint(path)
    trainer = make_trainer(nnUNetTrainerMosaic)
    trainer.load_checkpoint(path)
    trainer.is_ddp = True
    with pytest.raises(InputError, match=r"--time_budget 1 .* Continue without --num_gpus"):
        trainer.run_training()
    assert trainer.dataloader_train is None


def test_an_epoch_without_any_foreground_counts_as_dice_zero(make_trainer: Make) -> None:
    trainer = make_trainer(nnUNetTrainerMosaic)
    nothing = {name: np.zeros(2) for name in ("tp_hard", "fp_hard", "fn_hard")}
    trainer.logger.log("train_losses", 1.0, 0)
    trainer.on_validation_epoch_end([{"loss": np.float32(1), **nothing}] * 2)
    assert trainer.logger.get_checkpoint()["mean_fg_dice"] == [0.0]


class WithAuxiliaryLoss(nnUNetTrainerMosaic):
    """Pulls the logits towards 0."""

    def auxiliary_losses(self, batch: dict[str, Any], logits: Any) -> dict[str, torch.Tensor]:
        return {"size_of_logits": 10 * logits[0].square().mean()}


@pytest.mark.slow
def test_auxiliary_losses_are_optimised_and_logged(make_trainer: Make) -> None:
    plain, pulled = (
        make_trainer(nnUNetTrainerMosaic, epochs=1),
        make_trainer(WithAuxiliaryLoss, epochs=1),
    )
    train(plain)
    train(pulled)
    batch = next(plain.dataloader_train)
    sizes = [t.network(batch["data"])[0].square().mean().item() for t in (plain, pulled)]
    assert sizes[1] < 0.9 * sizes[0]
    log = next(Path(pulled.output_folder).glob("training_log_*.txt")).read_text()
    assert "size_of_logits" in log


@pytest.mark.slow
def test_final_validation_scores_only_what_was_annotated(make_trainer: Make) -> None:
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, epochs=1)
    base = Path(trainer.preprocessed_dataset_folder_base)
    (base / "gt_full_segmentations").mkdir()
    for path in (base / "gt_segmentations").iterdir():
        label = SimpleITK.ReadImage(str(path))
        if path.name.startswith("Dark"):  # as if the dark ball (2) were a bright one
            SimpleITK.WriteImage(label / 2, str(base / "gt_full_segmentations" / path.name))
        else:
            SimpleITK.WriteImage(label * 0, str(path))
    trainer.run_training()
    trainer.perform_actual_validation()
    folder = Path(trainer.output_folder) / "validation"
    ours = json.loads((folder / "summary.json").read_text())
    stock = json.loads((folder / "summary_raw.json").read_text())
    assert ours["n_cases"] == {"1": 1, "2": 1}
    assert sorted(ours["per_source"]) == ["Bright", "Dark"]
    assert ours["per_source"]["Bright"]["n_cases"] == {"1": 1}
    # nnU-Net's summary counts the bright ball of the other source as wrongly found.
    of_dark = next(c for c in stock["metric_per_case"] if "Dark" in c["prediction_file"])
    assert of_dark["metrics"]["1"]["n_ref"] == 0
    masked = next(c for c in ours["metric_per_case"] if "Dark" in c["prediction_file"])
    assert np.isnan(masked["metrics"]["1"]["Dice"])
    assert ours["not_annotated"]["Dark"]["1"]["full_cases"] == 1
    assert 0 <= ours["not_annotated"]["Dark"]["1"]["recall"] <= 1
    assert set(ours["not_annotated"]["Bright"]["2"]) == {"cases", "predicted_ml"}
    assert (folder / "validation.png").is_file()
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert "No source annotates every class" in ours["warnings"][0]
    assert "Class 'bright' occurs in no reference that annotates it" in ours["warnings"][1]
    assert all(f"Warning: {warning}" in log for warning in ours["warnings"])
