"""The life of a run: its settings, its time budget, and that it can be stopped and go on."""

import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._dynamo import OptimizedModule

from nnmosaic.data_conversion.atomic_write import replacing
from nnmosaic.data_conversion.dataset_json import DatasetJson, parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.plans_section import RunSettings, read_section
from nnmosaic.trainers.checkpoint import EXTRA, read_checkpoint
from nnmosaic.trainers.heap import keep_freed_memory
from nnmosaic.trainers.options import options_of, parse_options


class TrainingStoppedError(RuntimeError):
    """The training was asked to stop (SIGTERM); a checkpoint has been written."""


class BudgetedPolyLRScheduler(PolyLRScheduler):
    """nnU-Net's polynomial schedule, which also ends when a time budget does.

    Parameters
    ----------
    progress : callable
        Returns the spent fraction of the time budget, in [0, 1].
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        initial_lr: float,
        max_steps: int,
        progress: Callable[[], float],
    ) -> None:
        self.progress = progress
        super().__init__(optimizer, initial_lr, max_steps)

    def step(self, current_step: float | None = None) -> None:
        """Set the learning rate of an epoch, or of the moment if time runs faster."""
        if current_step is not None and current_step >= 0:
            current_step = max(current_step, min(1.0, self.progress()) * self.max_steps)
        super().step(current_step)


def plain_network(network: Any) -> Any:
    """Return the network inside DDP and ``torch.compile``."""
    network = getattr(network, "module", network)
    return network._orig_mod if isinstance(network, OptimizedModule) else network


class ResumableTrainer(nnUNetTrainer):
    """nnU-Net's trainer with run settings, safe checkpoints and a loop that can be stopped.

    Parameters
    ----------
    plans, configuration, fold, dataset_json, device
        As in nnU-Net, whose base class looks the parameters up by these names. ``plans`` must hold
        "continue_training" and is not changed.
    """

    network: Any
    num_epochs: int
    num_iterations_per_epoch: int
    num_val_iterations_per_epoch: int
    save_every: int
    dataset_class: Any

    pretrained: Mapping[str, Any] | None = None
    """The checkpoint whose weights follow the initialisation (``-pretrained_weights``)."""
    default_epochs: int | None = None
    """Of a method that needs others than nnU-Net's 1000."""
    seconds_between_checkpoints: float = 600.0
    adamw_initial_lr: float = 1e-3
    """AdamW's rate where neither plans nor command give one (that of nnU-Net's Adam variants)."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - the signature is nnU-Net's
    ) -> None:
        super().__init__(dict(plans), configuration, fold, dataset_json, device)
        self.dataset: DatasetJson = parse_dataset_json(dataset_json)
        section = read_section(plans)
        self.run_settings: RunSettings = section.run_settings
        self.planned_for_cpu = section.budget.get("device") == "cpu"
        if self.device.type == "cpu":
            keep_freed_memory()
            if "cores" in section.budget:
                torch.set_num_threads(section.budget["cores"])
        self._seconds_before = 0.0
        self._started: float | None = None
        self._first_epoch = 0
        self._last_checkpoint = time.monotonic()
        self._stop_requested = False

    # ---------------------------------------------------------------- run settings

    def initialize(self) -> None:
        """Apply the run settings, then initialise as nnU-Net does."""
        settings = self.run_settings
        for name, value in parse_options(type(self), settings.options or {}).items():
            setattr(self, name, value)
        self.num_epochs = settings.epochs or self.default_epochs or self.num_epochs
        self.num_iterations_per_epoch = (
            settings.iterations_per_epoch or self.num_iterations_per_epoch
        )
        self.num_val_iterations_per_epoch = (
            settings.val_iterations_per_epoch or self.num_val_iterations_per_epoch
        )
        if settings.optimizer == "adamw":
            self.initial_lr = self.adamw_initial_lr
        self.initial_lr = settings.initial_lr or self.initial_lr
        if settings.batch_size is not None:
            self.configuration_manager.configuration["batch_size"] = settings.batch_size
        if settings.seed is not None:
            random.seed(settings.seed)
            np.random.seed(settings.seed)
            torch.manual_seed(settings.seed)
        self.prepare()
        super().initialize()
        if self.planned_for_cpu and self.device.type == "cpu":
            # Same weights, other order in memory: a step takes a fifth less time on 2 cores.
            dimensions = len(self.configuration_manager.patch_size)
            layout = torch.channels_last if dimensions == 2 else torch.channels_last_3d
            self.network = self.network.to(memory_format=layout)
        if settings.given():
            self.print_to_log_file(f"Run settings: {settings.given()}")

    def prepare(self) -> None:
        """Do what comes between options and network: the hook for what shapes the network."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Return optimizer and schedule; without settings nnU-Net's."""
        optimizer, scheduler = super().configure_optimizers()
        if self.run_settings.optimizer == "adamw":
            optimizer = torch.optim.AdamW(
                self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay
            )
            scheduler = PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)
        if self.run_settings.time_budget is not None:
            scheduler = BudgetedPolyLRScheduler(
                optimizer, self.initial_lr, self.num_epochs, self._spent_budget
            )
        return optimizer, scheduler

    def _seconds_trained(self) -> float:
        now = 0.0 if self._started is None else time.monotonic() - self._started
        return self._seconds_before + now

    def _seconds_left(self) -> float:
        """Estimate from the epochs of this run."""
        seconds = self._seconds_trained() - self._seconds_before
        per_epoch = seconds / max(1, self.current_epoch - self._first_epoch)
        left: float = per_epoch * (self.num_epochs - self.current_epoch)
        budget = self.run_settings.time_budget
        if budget is not None:
            left = min(left, max(0.0, 60 * budget - self._seconds_trained()))
        return left

    def _spent_budget(self) -> float:
        """Return the spent fraction of the time budget; 0 without one."""
        budget = self.run_settings.time_budget
        return 0.0 if budget is None else self._seconds_trained() / (60 * budget)

    # ---------------------------------------------------------------- training loop

    def run_training(self) -> None:
        """Train to the last epoch, or to the one in which the time budget runs out.

        Raises
        ------
        InputError
            If there is a time budget, perhaps a checkpoint's, and several processes.
        TrainingStoppedError
            On SIGTERM, after a checkpoint was written.
        """
        budget = self.run_settings.time_budget
        if self.is_ddp and budget is not None:
            raise InputError(
                f"--time_budget {budget:g} is kept on one GPU only, since processes would stop at "
                "different steps. Continue without --num_gpus."
            )
        self.on_train_start()
        self._started = self._last_checkpoint = time.monotonic()
        self._first_epoch = self.current_epoch
        with self._noticing_sigterm():
            while self.current_epoch < self.num_epochs and self._spent_budget() < 1:
                self.on_epoch_start()
                self.on_train_epoch_start()
                batches = self._batches(self.dataloader_train, self.num_iterations_per_epoch)
                self.on_train_epoch_end([self.train_step(batch) for batch in batches])
                with torch.no_grad():
                    self.on_validation_epoch_start()
                    batches = self._batches(self.dataloader_val, self.num_val_iterations_per_epoch)
                    self.on_validation_epoch_end([self.validation_step(batch) for batch in batches])
                self.on_epoch_end()
        self.on_train_end()

    def on_epoch_end(self) -> None:
        """Write checkpoint_latest also whenever the last one is ten minutes old."""
        every = self.save_every
        if time.monotonic() - self._last_checkpoint > self.seconds_between_checkpoints:
            self.save_every = 1
        super().on_epoch_end()
        self.save_every = every
        self.print_to_log_file(f"About {self._seconds_left() / 60:.1f} min of training left")

    # ---------------------------------------------------------------- stopping and resuming

    @contextmanager
    def _noticing_sigterm(self) -> Iterator[None]:
        """Turn SIGTERM into a request that is met between two iterations.

        Installed only now: data loader workers, forked before, must still die of SIGTERM.
        """

        def request(*_: object) -> None:
            self._stop_requested = True

        before = signal.signal(signal.SIGTERM, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _batches(self, loader: Iterator[dict[str, Any]], number: int) -> Iterator[dict[str, Any]]:
        for _ in range(number):
            if self._stop_requested:
                self._stop()
            try:
                batch = next(loader)
            except RuntimeError:  # a signal to the whole process group ends the loader's workers
                if self._stop_requested:
                    self._stop()
                raise
            yield batch

    def _stop(self) -> None:
        """Save what was trained so far; the interrupted epoch is repeated when training goes on."""
        for series in self.logger.get_checkpoint().values():
            del series[self.current_epoch :]
        path = Path(self.output_folder) / "checkpoint_latest.pth"
        self.current_epoch -= 1  # a checkpoint holds the number of the epoch that comes next
        self.save_checkpoint(str(path))
        self.current_epoch += 1
        raise TrainingStoppedError(
            f"stopped by SIGTERM in epoch {self.current_epoch}; saved to {path}. Continue with --c."
        )

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with the run settings in it, in one step."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        checkpoint = {
            "network_weights": plain_network(self.network).state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None
            if self.grad_scaler is None
            else self.grad_scaler.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            EXTRA: {
                # With all options: their defaults may be others when the training goes on.
                "run_settings": replace(self.run_settings, options=options_of(self)).given(),
                "seconds_trained": self._seconds_trained(),
                **self.method_state(),
            },
        }
        with replacing(Path(filename)) as temporary:
            torch.save(checkpoint, temporary)
        self._last_checkpoint = time.monotonic()

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Load a checkpoint, with the run settings that it was trained with.

        Raises
        ------
        InputError
            If the file is unusable, or this run was given a setting that differs from it.
        """
        checkpoint = read_checkpoint(Path(filename_or_checkpoint))
        extra = checkpoint.get(EXTRA, {})
        stored = RunSettings(**extra.get("run_settings", {}))
        if EXTRA in checkpoint and not self.was_initialized:
            self._adopt(stored, filename_or_checkpoint)
        self._seconds_before = float(extra.get("seconds_trained", 0.0))
        # Safe: read_checkpoint has just accepted the same file without running any of it.
        super().load_checkpoint(filename_or_checkpoint)
        self.load_method_state(extra)

    def _adopt(self, stored: RunSettings, filename: str) -> None:
        requested = getattr(self, "_requested_settings", RunSettings())
        requested.refuse_other(stored, filename)
        self.run_settings = stored

    def request_settings(self, settings: RunSettings) -> None:
        """Take the settings of a command, which go before those of the plans; before training."""
        self._requested_settings = settings
        self.run_settings = settings.over(self.run_settings)

    def method_state(self) -> dict[str, Any]:
        """Return what a method adds to a checkpoint; stock nnU-Net ignores it."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore what `method_state` returned."""
