"""What every result names: machine, commit, versions; and its table as Markdown and JSON."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import replacing, write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def provenance() -> dict[str, Any]:
    """Return machine, commit (with "+" where files are changed) and versions."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory_gb():.0f} GB, no GPU used",
        "commit": commit + ("+" if changed else ""),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "nnunetv2", "numpy")},
    }


def peak_gigabytes() -> float:
    """Return the peak memory of this process; Linux only."""
    # Not getrusage: what that returns includes the parent's memory at the time of the fork.
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(peak) / 2**20


def write(name: str, content: Mapping[str, Any], markdown: str) -> None:
    """Write ``results/NAME.json`` and ``results/NAME.md``."""
    RESULTS.mkdir(exist_ok=True)
    write_json(content, RESULTS / f"{name}.json")
    with replacing(RESULTS / f"{name}.md") as path:
        path.write_text(markdown, encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def footer(source: Mapping[str, Any]) -> str:
    """Return one line with what `provenance` found."""
    return "; ".join(f"{key}: {value}" for key, value in source.items())


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
