"""Imports go one way, and a file says what house_style.md asks of it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ("data_conversion", "planners", "trainers", "pipeline")
FILES = [path for folder in ORDER for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_backwards(path: Path) -> None:
    own = ORDER.index(path.relative_to(ROOT).parts[0])
    later = {f"nnmosaic.{folder}" for folder in ORDER[own + 1 :]}
    wrong = [n for n in imported(path) if ".".join(n.split(".")[:2]) in later]
    assert wrong == []


def test_raw_data_code_needs_no_torch() -> None:
    for path in (ROOT / "data_conversion").rglob("*.py"):
        assert not [n for n in imported(path) if n.split(".")[0] == "torch"], path
