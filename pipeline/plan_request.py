"""What the plan commands are asked for; requests that cannot be meant are refused."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.defaults import DEFAULT_TRAINER
from nnmosaic.planners import NUM_FOLDS
from nnmosaic.trainers import FIRST_STAGE


@dataclass(frozen=True)
class PlanRequest:
    """What plans are asked to fit.

    Attributes
    ----------
    planner : str, optional
        Class name of a planner of nnMosaic or nnU-Net. Default: MosaicPlanner, or the small-machine
        planner for a CPU or for less memory than nnU-Net's smallest preset.
    plans_name : str, optional
        Default: the planner's.
    memory_gb : float, optional
        GPU memory to plan for.
    trainer : str, optional
        Class name; patch and batch leave room for what its method needs.
    device : {"cpu"}, optional
        Plan for a machine without a GPU.
    minutes : float, optional
        For the CPU: time for all folds together; network and steps are chosen to fit it.
    folds : int
        Folds that will be trained in these minutes.
    cores : int, optional
        Threads of the training in these minutes. Default: all cores.
    keep_plans : bool
        Do not plan: take the plans file as it is, for example edited by hand.
    configuration : str, optional
        What the minutes are for.
    measure : bool
        Train some steps of each configuration and note time and memory in the plans.
    """

    planner: str | None = None
    plans_name: str | None = None
    memory_gb: float | None = None
    trainer: str | None = None
    device: str | None = None
    minutes: float | None = None
    folds: int = NUM_FOLDS
    cores: int | None = None
    keep_plans: bool = False
    configuration: str | None = None
    measure: bool = False

    def __post_init__(self) -> None:
        if self.device is not None and (self.planner or self.memory_gb):
            raise InputError(
                "--device cpu has a planner of its own: leave -pl and --memory_gb out."
            )
        if self.keep_plans and (self.planner or self.memory_gb or self.device):
            raise InputError(
                "--keep_plans takes the plans file as it is: leave -pl, --memory_gb and --device "
                "out."
            )
        if self.minutes is not None and self.device is None:
            raise InputError("--minutes plans for a CPU: add --device cpu.")
        if self.minutes is not None and self.trainer in FIRST_STAGE:
            raise InputError(
                f"--minutes cannot plan for {self.trainer}, which trains after "
                f"{FIRST_STAGE[self.trainer]}. Leave it out, and give --epochs to train."
            )
        if self.cores is not None and self.minutes is None:
            raise InputError("--cores are those that train for some --minutes: give both.")
        present = os.cpu_count() or 1
        if self.cores is not None and self.cores > present:
            raise InputError(
                f"--cores {self.cores}: this machine has {present}, and the time of a step is "
                "measured here. Plan on the machine that trains."
            )

    @property
    def measured_trainer(self) -> str:
        """The class name of the trainer whose steps are measured; of two stages, the first."""
        trainer = self.trainer or DEFAULT_TRAINER
        return FIRST_STAGE.get(trainer, trainer)

    def of(self, configurations: Sequence[str]) -> "PlanRequest":
        """Return the request with the configuration that its minutes are for, if it has minutes.

        Raises
        ------
        InputError
            If there are minutes and several configurations.
        """
        if self.minutes is None:
            return self
        if len(configurations) != 1:
            raise InputError(
                "--minutes is the time of one configuration: give exactly one with -c."
            )
        return replace(self, configuration=configurations[0])

    def budget(self) -> dict[str, Any]:
        """Return what a measured CPU plan is made for, as its plans hold it."""
        cores = {"cores": self.cores} if self.cores else {}
        return {
            "device": "cpu",
            "minutes": self.minutes,
            "folds": self.folds,
            "configuration": self.configuration,
            "trainer": self.measured_trainer,
            **cores,
        }
