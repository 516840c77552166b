"""A training that fits some minutes on this CPU: network, patch and steps from measured times."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.plans_section import Decision, RunSettings

MIN_STEPS = 500
"""With fewer steps per fold the patch is made smaller."""
ENOUGH_STEPS = 3000
"""A network of twice the features must still make so many steps per fold."""
NNUNET_FEATURES, NNUNET_STEPS = 32, 250_000
LARGEST_FEATURES = 320
"""nnU-Net's, for the deepest stages."""
MIN_ITERATIONS = 10
"""Steps per epoch, below which epochs become fewer: each ends with a validation and a plot."""
LARGE_SHARE = 0.25
"""Of a fold's time in its final validation, above which the plans warn."""
SMALLEST_SIZE = 1 / 16
SMALLER = 0.5

Plans = dict[str, Any]


@dataclass(frozen=True)
class Speed:
    """What was measured of a plan on this machine.

    Attributes
    ----------
    to_start, per_step, per_validation_step, per_epoch, per_validation_case : float
        Seconds. ``per_epoch`` is what an epoch takes beside its steps; a validation case counts all
        tiles and mirrorings.
    memory_gb : float
        Largest resident memory of the training process; augmentation workers, which nnU-Net starts
        on more than 4 cores, come on top.
    """

    to_start: float
    per_step: float
    per_validation_step: float
    per_epoch: float
    per_validation_case: float
    memory_gb: float

    def seconds(self, settings: RunSettings, validation_cases: int) -> float:
        """Return the wall time of one fold, with its final validation."""
        return self._around(validation_cases) + (settings.epochs or 0) * self.per_epoch_of(settings)

    def per_epoch_of(self, settings: RunSettings) -> float:
        """Return the seconds of an epoch with its validation."""
        steps = settings.iterations_per_epoch or 0
        return steps * self.per_step + self._beside_steps(settings)

    def settings(
        self, base: RunSettings, seconds: float, validation_cases: int
    ) -> RunSettings | None:
        """Return the longest training that takes at most so long; None if there is none."""
        left = seconds - self._around(validation_cases)
        beside = self._beside_steps(base)
        epochs = min(base.epochs or 1, int(left // (MIN_ITERATIONS * self.per_step + beside)))
        if epochs < 1:
            return None
        iterations = int((left / epochs - beside) // self.per_step)
        return replace(base, epochs=epochs, iterations_per_epoch=iterations)

    def _around(self, validation_cases: int) -> float:
        # The export of the final validation starts processes, which import what the training did.
        return 2 * self.to_start + validation_cases * self.per_validation_case

    def _beside_steps(self, settings: RunSettings) -> float:
        return self.per_epoch + (settings.val_iterations_per_epoch or 0) * self.per_validation_step


def speed_of(expected: Mapping[str, float]) -> Speed:
    """Return the speed that plans hold for a configuration."""
    return Speed(**{field.name: expected[field.name] for field in fields(Speed)})


@dataclass(frozen=True)
class Fit:
    """The chosen plans and training.

    Attributes
    ----------
    tried : mapping of str to float
        What was measured -> seconds per step.
    """

    plans: Plans
    settings: RunSettings
    speed: Speed
    seconds_per_fold: float
    validation_cases: int
    tried: Mapping[str, float]

    def numbers(self) -> dict[str, Any]:
        """Return what the plans say of it."""
        return {**asdict(self.speed), "seconds_per_fold": self.seconds_per_fold}


def fit_to_seconds(
    plan: Callable[[float], Plans],
    measure: Callable[[Plans], Speed],
    configuration: str,
    base: RunSettings,
    *,
    seconds: float,
    validation_cases: int,
) -> Fit:
    """Choose network, patch and steps so that a fold takes at most so long.

    The features are doubled as long as that leaves `ENOUGH_STEPS`; where the narrowest network does
    not make `MIN_STEPS`, the patch shrinks.

    Parameters
    ----------
    plan : callable
        Factor on the bound of the feature maps -> plans.
    measure : callable
        Plans -> speed.
    base : RunSettings
        Epochs, validation steps and optimizer; the steps per epoch are chosen.
    seconds : float
        For one fold.

    Raises
    ------
    InputError
        If not even the smallest plan can be trained in that time.
    """
    size, tried = 1.0, {}

    def attempt(plans: Plans) -> Fit | None:
        speed = measure(plans)
        tried[name_of(plans, configuration)] = speed.per_step
        settings = speed.settings(base, seconds, validation_cases)
        if settings is None:
            return None
        expected = speed.seconds(settings, validation_cases)
        return Fit(plans, settings, speed, expected, validation_cases, tried)

    best = attempt(plan(size))
    while (best is None or _steps(best) < MIN_STEPS) and size > SMALLEST_SIZE:
        size *= SMALLER
        best = attempt(plan(size)) or best
    if best is None:
        raise InputError(
            f"{seconds / 60:.1f} minutes per fold are too few for any training here. Give more "
            "--minutes, or fewer --folds."
        )
    # A step of twice the features takes at least twice as long.
    while _steps(best) >= 2 * ENOUGH_STEPS and (wider := widened(best.plans, configuration)):
        candidate = attempt(wider)
        if candidate is None or _steps(candidate) < ENOUGH_STEPS:
            break
        best = candidate
    return best


def fitted_decisions(fit: Fit, configuration: str, folds: int) -> tuple[Decision, ...]:
    """Return what was measured, what is expected and what is given up, in words."""
    run, chosen = fit.settings, fit.plans["configurations"][configuration]
    features = chosen["architecture"]["arch_kwargs"]["features_per_stage"][0]
    measured = ", ".join(f"{name}: {seconds:.3f} s" for name, seconds in fit.tried.items())
    minutes = folds * fit.seconds_per_fold / 60
    narrowest = next(iter(fit.tried)).startswith(f"{features} ")
    reason = f"the widest that makes at least {ENOUGH_STEPS} steps"
    validation = fit.validation_cases * fit.speed.per_validation_case
    share = validation / fit.seconds_per_fold
    return (
        Decision(
            "final validation",
            f"{validation / 60:.1f} minutes",
            f"{fit.validation_cases} images of {fit.speed.per_validation_case:.0f} s"
            + (
                ": the plan makes many tiles of an image, try 3d_lowres or 2d"
                if share > LARGE_SHARE
                else ""
            ),
            warns=share > LARGE_SHARE,
        ),
        Decision("features", f"from {features}", "the narrowest" if narrowest else reason),
        Decision(
            "training",
            f"{run.epochs} epochs of {run.iterations_per_epoch} steps, {run.optimizer}, learning "
            f"rate {run.initial_lr:g}",
            f"{minutes:.1f} minutes expected for {folds} fold(s), from measured steps ({measured}) "
            f"and {fit.speed.memory_gb:.1f} GB",
            fit.numbers(),
        ),
        Decision(
            "given up",
            f"{features} of {NNUNET_FEATURES} features, {_steps(fit)} of {NNUNET_STEPS} steps",
            "what nnU-Net trains on a GPU does not fit these minutes",
        ),
    )


def widened(plans: Plans, configuration: str) -> Plans | None:
    """Return the plans with twice the features; None if that is more than nnU-Net's."""
    wider = copy.deepcopy(plans)
    arguments = wider["configurations"][configuration]["architecture"]["arch_kwargs"]
    features = [2 * n for n in arguments["features_per_stage"]]
    if features[0] > NNUNET_FEATURES:
        return None
    arguments["features_per_stage"] = [min(n, LARGEST_FEATURES) for n in features]
    return wider


def _steps(fit: Fit) -> int:
    return (fit.settings.epochs or 0) * (fit.settings.iterations_per_epoch or 0)


def name_of(plans: Plans, configuration: str) -> str:
    """Return network and patch in a few words."""
    chosen = plans["configurations"][configuration]
    features = chosen["architecture"]["arch_kwargs"]["features_per_stage"][0]
    return f"{features} features, patch {' x '.join(map(str, chosen['patch_size']))}"
