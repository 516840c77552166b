"""The ``nnmosaic`` section of a plans file: read and written here only.

It holds what a trainer must know beyond nnU-Net's own plans. nnU-Net ignores the key.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from nnmosaic.data_conversion.errors import InputError

SECTION = "nnmosaic"
OPTIMIZERS = ("sgd", "adamw")
_POSITIVE = (
    "epochs", "iterations_per_epoch", "val_iterations_per_epoch", "batch_size", "initial_lr",
    "time_budget",
)  # fmt: skip


@dataclass(frozen=True)
class RunSettings:
    """What a run decides without a trainer subclass; None leaves nnU-Net's value.

    Attributes
    ----------
    epochs, iterations_per_epoch, val_iterations_per_epoch : int, optional
        nnU-Net: 1000, 250, 50.
    batch_size : int, optional
        Over all GPUs together. nnU-Net: from the plans.
    optimizer : {"sgd", "adamw"}, optional
        nnU-Net: SGD with Nesterov momentum 0.99.
    initial_lr : float, optional
        nnU-Net: 1e-2.
    time_budget : float, optional
        Minutes of training after which the schedule has reached its end, summed over resumed runs.
    seed : int, optional
        Seeds weights and sampling. Repeats a run exactly only with ``nnUNet_n_proc_DA=0``.
    options : mapping, optional
        Name -> value, as text, of options of the trainer; see `nnmosaic.trainers.options`.
    """

    epochs: int | None = None
    iterations_per_epoch: int | None = None
    val_iterations_per_epoch: int | None = None
    batch_size: int | None = None
    optimizer: str | None = None
    initial_lr: float | None = None
    time_budget: float | None = None
    seed: int | None = None
    options: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name} must be greater than 0, got {value}.")
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            raise InputError(f"--optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}.")

    def given(self) -> dict[str, Any]:
        """Return the settings that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def refuse_other(self, stored: "RunSettings", where: str) -> None:
        """Raise `InputError` if one of these settings differs from those of a trained model."""
        known = stored._flags()
        for name, value in self._flags().items():
            before = known.get(name)
            if not _same(before, value):
                before = "(the default)" if before is None else before
                raise InputError(
                    f"{where} was trained with --{name}{before}, not {value}. Leave the flag out "
                    "to go on as before, or move the folder away to train anew."
                )

    def _flags(self) -> dict[str, Any]:
        settings = self.given()
        options = settings.pop("options", {})
        flags = {f"{name} ": value for name, value in settings.items()}
        return {**flags, **{f"set {name}=": value for name, value in options.items()}}

    def over(self, other: "RunSettings") -> "RunSettings":
        """Return these settings, filled up from ``other``; each option counts by itself."""
        merged = {**(other.options or {}), **(self.options or {})}
        return replace(other, **{**self.given(), "options": merged or None})


def _same(one: Any, other: Any) -> bool:
    """Return whether two settings are equal; an option that is a number is stored as text."""
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return bool(one == other)


NNUNET_RUN = RunSettings(epochs=1000, iterations_per_epoch=250, val_iterations_per_epoch=50)


@dataclass(frozen=True)
class Decision:
    """One decision of a planner, for people to read.

    Attributes
    ----------
    what, choice, reason : str
        "target spacing", "1 x 1 x 1 mm", "median over all cases".
    numbers : mapping
        What the reason rests on.
    warns : bool
        Whether a user should look at it.
    """

    what: str
    choice: str
    reason: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    warns: bool = False


@dataclass(frozen=True)
class RaterPlan:
    """What networks for several raters are built from (multi_rater spec, 2 and 3).

    Attributes
    ----------
    raters : tuple of str
        In the order of their heads.
    latent : int
        Size of the code of an opinion.
    prior_samples, prior_samples_3d : int
        Samples whose extremes are held against those of the raters, in a step of the first stage;
        fewer in 3D, for the memory.
    """

    raters: tuple[str, ...]
    latent: int = 6
    prior_samples: int = 10
    prior_samples_3d: int = 4


@dataclass(frozen=True)
class ClusteringPlan:
    """What a network with travelling class centres is built from (clustering_propagation.md).

    The trainer writes it into its copy of the plans, which becomes that of the trained model: any
    plans will do, also nnU-Net's own, in which nothing tells labels from regions.

    Attributes
    ----------
    memory : {"gru", "last", "window"}
    regions : bool
        Whether the output channels are regions, which may overlap.
    """

    memory: str = "gru"
    regions: bool = False


@dataclass(frozen=True)
class PlansSection:
    """nnMosaic's section of the plans.

    Attributes
    ----------
    budget : mapping
        What the planner was asked to fit into, where that is not nnU-Net's: "device", "minutes"
        (with "folds", "configuration", "trainer", "cores"), "memory_gb" below nnU-Net's smallest
        preset, "memory_factor".
    run_settings : RunSettings
        The training that fits this budget. Flags of the train command go before it.
    decisions : tuple of Decision
        For people; nothing depends on them.
    expected : mapping
        Configuration -> what was measured on this machine, a `nnmosaic.planners.cpu_budget.Speed`;
        for plans that fit some minutes also "seconds_per_fold".
    multirater : RaterPlan, optional
        Where the dataset declares raters.
    clustering : ClusteringPlan, optional
        In the plans of a trained model of that kind.
    """

    budget: Mapping[str, Any] = field(default_factory=dict)
    run_settings: RunSettings = field(default_factory=RunSettings)
    decisions: tuple[Decision, ...] = ()
    expected: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    multirater: RaterPlan | None = None
    clustering: ClusteringPlan | None = None


@dataclass(frozen=True)
class PlanningResult:
    """Plans, and what is said about them.

    Attributes
    ----------
    sizes : mapping
        Configuration -> "parameters", and "memory_gb" where nnU-Net has an estimate.
    output : str
        What nnU-Net printed.
    """

    plans: dict[str, Any]
    decisions: tuple[Decision, ...]
    sizes: dict[str, dict[str, float]]
    output: str


def read_section(plans: Mapping[str, Any]) -> PlansSection:
    """Return nnMosaic's section; an empty one where the plans are nnU-Net's own.

    Raises
    ------
    InputError
        If the section holds a setting that does not exist.
    """
    section = plans.get(SECTION, {})
    settings = section.get("run_settings", {})
    for name, known in (("run_settings", RunSettings), ("multirater", RaterPlan)):
        unknown = sorted(set(section.get(name, {})) - {field.name for field in fields(known)})
        if unknown:
            raise InputError(
                f'The plans hold the unknown setting "{SECTION}.{name}.{unknown[0]}". Correct it, '
                "or plan again with nnmosaic plan_and_preprocess."
            )
    return PlansSection(
        section.get("budget", {}),
        RunSettings(**settings),
        tuple(Decision(**decision) for decision in section.get("decisions", ())),
        section.get("expected", {}),
        _rater_plan(section.get("multirater")),
        ClusteringPlan(**section["clustering"]) if "clustering" in section else None,
    )


def rater_plan(plans: Mapping[str, Any]) -> RaterPlan:
    """Return what the plans say of raters.

    Raises
    ------
    InputError
        If they name none.
    """
    plan = read_section(plans).multirater
    if plan is None:
        raise InputError(
            f"The plans {plans.get('plans_name')!r} name no raters. Declare them in dataset.json "
            "(nnmosaic add_raters does) and plan with nnmosaic plan_and_preprocess, without a "
            "planner of nnU-Net's own."
        )
    return plan


def _rater_plan(content: Mapping[str, Any] | None) -> RaterPlan | None:
    if content is None:
        return None
    return RaterPlan(**{**content, "raters": tuple(content["raters"])})


def write_section(plans: dict[str, Any], section: PlansSection) -> None:
    """Put the section into ``plans``, in place."""
    content = {**asdict(section), "run_settings": section.run_settings.given()}
    for name in ("multirater", "clustering"):
        if content[name] is None:
            del content[name]
    plans[SECTION] = content
