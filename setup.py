"""Packaging of nnmosaic: each top-level folder is one sub-package."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = ("data_conversion", "planners", "trainers", "pipeline")
PAGE = ["serve/static/*", "serve/static/vendor/*"]


def subpackages(folder: str) -> list[str]:
    """Return ``folder`` and every package below it, as ``nnmosaic.*`` names."""
    nested = find_packages(str(ROOT / folder))
    return [f"nnmosaic.{folder}", *(f"nnmosaic.{folder}.{name}" for name in nested)]


setup(
    name="nnmosaic",
    version="0.1.0",
    description="nnU-Net v2 plug-in: one model from annotations that do not fit together",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[name for folder in FOLDERS for name in subpackages(folder)],
    package_dir={f"nnmosaic.{folder}": folder for folder in FOLDERS},
    package_data={
        f"nnmosaic.{folder}": ["py.typed", *(PAGE if folder == "pipeline" else ())]
        for folder in FOLDERS
    },
    install_requires=["nnunetv2>=2.8.1,<2.9", "filelock>=3.12", "rich>=13"],
    extras_require={
        "serve": ["fastapi>=0.115,<1", "uvicorn>=0.30,<1"],
        "dev": ["httpx2>=2", "mypy>=1.11", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12"],
    },
    entry_points={"console_scripts": ["nnmosaic = nnmosaic.pipeline.cli:main"]},
)
