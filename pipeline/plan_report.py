"""Plans as a person reads them: a table of configurations, and a line per decision."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from nnmosaic.planners.cpu_budget import speed_of
from nnmosaic.planners.ledger import resolved_configuration
from nnmosaic.planners.plans_section import NNUNET_RUN, Decision, read_section

NOT_MEASURED = "-"
COLUMNS = (
    "configuration", "spacing (mm)", "patch", "batch", "network", "parameters", "memory",
    "time per epoch",
)  # fmt: skip


def plan_report(
    plans: Mapping[str, Any],
    sizes: Mapping[str, Mapping[str, float]],
    decisions: Sequence[Decision],
    *,
    explain: bool = False,
) -> RenderableType:
    """Return table and decisions.

    Parameters
    ----------
    sizes : mapping
        Configuration -> "parameters", and "memory_gb" where it is known.
    explain : bool
        Below each decision also the numbers that it rests on.
    """
    table = Table(box=box.SIMPLE_HEAD, title=f"{plans['dataset_name']}: {plans['plans_name']}")
    for column in COLUMNS:
        table.add_column(column)
    for name, size in sizes.items():
        table.add_row(*_row(name, plans, size))
    lines = [_line(decision, explain=explain) for decision in decisions]
    return Group(table, *lines)


def print_report(report: RenderableType) -> None:
    """Print to standard output; to a file as wide as it needs to be."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(report)


def _row(name: str, plans: Mapping[str, Any], size: Mapping[str, float]) -> list[str]:
    configuration = resolved_configuration(plans, name)
    architecture = configuration.get("architecture", {})
    network = str(architecture.get("network_class_name", NOT_MEASURED)).rpartition(".")[2]
    features = architecture.get("arch_kwargs", {}).get("features_per_stage")
    if isinstance(features, list):
        network += f", {len(features)} stages, {features[0]} to {features[-1]} features"
    section = read_section(plans)
    memory, epoch = size.get("memory_gb"), NOT_MEASURED
    if name in section.expected:
        speed = speed_of(section.expected[name])
        memory = speed.memory_gb
        epoch = f"{speed.per_epoch_of(section.run_settings.over(NNUNET_RUN)):.0f} s"
    return [
        name,
        _by(configuration["spacing"]),
        _by(configuration["patch_size"]),
        str(configuration["batch_size"]),
        network,
        f"{size['parameters'] / 1e6:.2f} M",
        NOT_MEASURED if memory is None else f"{memory:.1f} GB",
        epoch,
    ]


def _line(decision: Decision, *, explain: bool) -> Text:
    line = Text.assemble((f"{decision.what}: ", "bold"), f"{decision.choice} ({decision.reason})")
    if decision.warns:
        line = Text.assemble(("WARNING ", "bold red"), line)
    if explain and decision.numbers:
        line.append("\n    " + json.dumps(decision.numbers, default=str), style="dim")
    return line


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
