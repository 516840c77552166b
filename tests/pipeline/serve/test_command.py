"""Starting the page: the command, its refusals, and a real server on a real port."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from nnmosaic.pipeline import cli_serve
from nnmosaic.pipeline.cli import main
from nnmosaic.pipeline.serve import command

ROOT = Path(__file__).parents[3]
DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    return folder


@pytest.fixture
def images(workspace_of_two: Any) -> Path:
    return Path(workspace_of_two.images)


def test_help_needs_neither_torch_nor_fastapi() -> None:
    code = (
        "import sys; from nnmosaic.pipeline.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'fastapi', 'uvicorn', 'numpy'} & set(sys.modules)\n"
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_without_the_extra_the_message_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, images: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        cli_serve, "find_spec", lambda name: None if name == "uvicorn" else found(name)
    )
    assert main(["serve", "-m", str(model), "-i", str(images)]) == 2
    line = "nnmosaic serve: The page needs uvicorn. Install with: pip install 'nnmosaic[serve]'"
    assert capsys.readouterr().err.strip() == line


def test_what_cannot_be_served_is_refused_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], model: Path, images: Path, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, words in (
            (["-m", "nowhere", "-i", str(images)], "nowhere is no trained model"),
            (["-m", str(model), "-i", "nowhere"], "does not exist"),
            (["-m", str(model), "-i", str(images), "-o", str(images)], "another folder"),
            (["-m", str(model), "-i", str(images), "--port", port], f"--port {port} cannot be"),
            (["-m", str(model), "-i", str(images), "--port", "99999"], "--port 99999 cannot be"),
        ):
            assert main(["serve", *arguments]) == 2
            assert words in capsys.readouterr().err


def test_only_this_machine_is_listened_to() -> None:
    with command.listen(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


SERVER = """
import sys
from nnmosaic.pipeline.serve import command

class Session:
    labels = {"liver": 1}

command.load_session = lambda *_: Session()
from nnmosaic.pipeline.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_printed_address_works_until_ctrl_c(model: Path, images: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", SERVER, "serve", "-m", str(model), "-i", str(images)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
    )  # fmt: skip
    try:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("Open this address")
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+/)#token=(\S{43})\n", run.stdout.readline())
        assert found is not None
        page, token = found.groups()
        headers = {"Authorization": f"Bearer {token}"}
        state = urllib.request.Request(f"{page}api/state", headers=headers)
        with urllib.request.urlopen(state, timeout=20) as answer:
            content = json.load(answer)
        assert content["labels"] == {"liver": 1}
        assert content["output"] == f"{images}_corrected"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{page}api/state", timeout=20)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=20)
    finally:
        run.kill()
    assert run.returncode == 0, errors
    assert token not in errors


def test_the_wheel_has_the_page(tmp_path: Path) -> None:
    code = "import setuptools, runpy, json; setuptools.setup = lambda **s: print(json.dumps(s));"
    code += "runpy.run_path('setup.py')"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    setup = json.loads(output)
    assert "nnmosaic.pipeline.serve" in setup["packages"]
    folder = ROOT / "pipeline"
    packed = {
        path
        for pattern in setup["package_data"]["nnmosaic.pipeline"]
        for path in folder.glob(pattern)
    }
    static = folder / "serve" / "static"
    assert {path for path in static.rglob("*") if path.is_file()} <= packed
    assert {"fastapi", "uvicorn"} <= {
        re.split("[<>=]", line)[0] for line in setup["extras_require"]["serve"]
    }


def test_the_licence_of_all_that_is_bundled_is_there() -> None:
    vendor = ROOT / "pipeline" / "serve" / "static" / "vendor"
    licences = (vendor / "LICENSES.txt").read_text(encoding="utf-8")
    lock = json.loads((ROOT / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    inside = ["@niivue/niivue", *lock["node_modules/@niivue/niivue"]["dependencies"]]
    for name in inside:
        if name != "zarrita":  # left out, see bundle.mjs
            assert f"{name} {lock[f'node_modules/{name}']['version']}\n" in licences
    assert "http" not in re.sub(r"www\.w3\.org", "", page_sources())


def page_sources() -> str:
    """Return our own files of the page: they load nothing from elsewhere."""
    static = ROOT / "pipeline" / "serve" / "static"
    files = [*static.glob("*.js"), *static.glob("*.html"), *static.glob("*.css")]
    assert len(files) > 10
    return "\n".join(path.read_text(encoding="utf-8") for path in files)
