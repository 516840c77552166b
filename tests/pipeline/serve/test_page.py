"""The page in a real browser: what is seen, clicked and saved."""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import SimpleITK
import uvicorn

from nnmosaic.pipeline.serve.app import create_app
from nnmosaic.pipeline.serve.cases import Workspace
from nnmosaic.pipeline.serve.command import listen

ROOT = Path(__file__).parents[3]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
MISSING = [
    name
    for name, there in {
        "chromium (apt-get install chromium)": CHROMIUM,
        "node (apt-get install nodejs npm)": shutil.which("node"),
        "playwright-core (make browser)": (ROOT / "node_modules" / "playwright-core").is_dir(),
    }.items()
    if not there
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING) and not os.environ.get("CI"), reason=f"needs {', '.join(MISSING)}"
    ),
]

TOKEN = "secret"
BEACON = (3, 50, 12)  # z, y, x
AXIAL, CORONAL, SAGITTAL = 2, 1, 0


class Page:
    """A page of Chromium; `call` runs a method of playwright's page."""

    def __init__(self) -> None:
        assert not MISSING, f"CI needs {', '.join(MISSING)}"
        command = ["node", str(Path(__file__).with_name("browser.mjs")), str(CHROMIUM)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        self._answer()

    def call(self, name: str, *given: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"call": name, "with": given}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(20) == 0

    def wait(self, script: str, seconds: float = 30) -> None:
        """Wait until an expression is true (playwright's own waiting is stopped by our policy)."""
        end = time.monotonic() + seconds
        while not self.call("evaluate", script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def open(self, name: str) -> None:
        self.call("click", f"[data-case={name}]")
        ready = f"document.querySelector('#case-name').textContent === '{name}'"
        self.wait(f"{ready} && !document.querySelector('#save').disabled")

    def settled(self) -> None:
        self.wait("document.querySelector('#working').hidden")

    def set_slice(self, axis: int, index: int) -> None:
        self.call("click", f"[data-axis='{axis}']")
        event = "slider.dispatchEvent(new Event('input'))"
        slider = "const slider = document.querySelector('#slice')"
        self.call("evaluate", f"{{ {slider}; slider.value = {index}; {event} }}")

    def picture(self, path: Path) -> np.ndarray:
        """Return the screen, (rows, columns, RGB), 0 to 1, after two pictures have been drawn."""
        frames = "new Promise(f => requestAnimationFrame(() => requestAnimationFrame(() => f(0))))"
        self.call("evaluate", frames)
        self.call("screenshot", {"path": str(path)})
        return np.asarray(matplotlib.image.imread(path))[..., :3]

    def text(self, selector: str) -> str:
        return str(self.call("textContent", selector))


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with closing(Page()) as page:
        yield page


@contextmanager
def served(session: Any, workspace: Workspace) -> Iterator[str]:
    """Serve in a thread, and yield the address with the token."""
    with listen(0) as listening:  # a new port, so a new origin: nothing is left of the last test
        app = create_app(session, workspace, TOKEN)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/#token={TOKEN}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)


def frame_of(page: Page) -> tuple[slice, slice]:
    """Return rows and columns of the picture that the image is in."""
    box = "const b = document.querySelector('#image').getBoundingClientRect()"
    left, top, right, bottom = page.call(
        "evaluate", f"(() => {{ {box}; return [b.left, b.top, b.right, b.bottom] }})()"
    )
    return slice(round(top), round(bottom)), slice(round(left), round(right))


def brightest(page: Page, picture: np.ndarray) -> tuple[float, float]:
    """Return x and y on the screen of the middle of what is white in the image."""
    rows, columns = frame_of(page)
    grey = picture[rows, columns].min(-1)
    grey[:40], grey[-40:], grey[:, :40], grey[:, -40:] = 0, 0, 0, 0  # letters at the edges
    y, x = np.nonzero(grey > 0.9 * grey.max())
    return float(x.mean() + columns.start + 0.5), float(y.mean() + rows.start + 0.5)


def beacon_image(path: Path) -> None:
    """Darken the image at a path but for one voxel."""
    image = SimpleITK.ReadImage(str(path))
    array = np.full(SimpleITK.GetArrayFromImage(image).shape, 10, np.int16)
    array[0, 0, 0], array[BEACON] = 0, 1000
    dark = SimpleITK.GetImageFromArray(array)
    dark.CopyInformation(image)
    SimpleITK.WriteImage(dark, str(path))


def test_a_click_reaches_the_voxel_that_is_seen(
    page: Page, session: Any, make_workspace: Callable[..., Workspace], tilted: Any, tmp_path: Path
) -> None:
    flips = {"left_up": (-1, 1, -1), "front": (1, -1, 1)}
    workspace = make_workspace(**{name: tilted(signs) for name, signs in flips.items()})
    for path in workspace.images.iterdir():
        beacon_image(path)
    with served(session, workspace) as address:
        page.call("goto", address)
        for name, signs in flips.items():
            page.open(name)
            # LPS axes that are not flipped point left and back: against the display's first two.
            signs = np.array(signs) * (-1, -1, 1)
            index, sizes = np.array(BEACON[::-1]), np.array(session.array.shape[::-1])
            seen = np.where(signs > 0, index, sizes - 1 - index).tolist()
            for axis in (CORONAL, SAGITTAL, AXIAL):
                page.set_slice(axis, seen[axis])
                place = brightest(page, page.picture(tmp_path / "view.png"))
                page.call("mouse.click", *place)
                page.settled()
                np.testing.assert_allclose(session.calls[-1][1], BEACON, atol=0.5)
                page.call("click", "#undo")
                page.settled()
            # A flipped axis flips the picture too: in axial slices R is left, and A is up.
            rows, columns = frame_of(page)
            assert (place[0] < (columns.start + columns.stop) / 2) == (seen[0] > sizes[0] / 2)
            assert (place[1] < (rows.start + rows.stop) / 2) == (seen[1] > sizes[1] / 2)
            page.call("click", "#save")
            page.wait("document.querySelector('#unsaved').hidden")
    assert page.call("complaints") == []


def test_open_click_undo_save(
    page: Page, session: Any, workspace_of_two: Workspace, tmp_path: Path
) -> None:
    with served(session, workspace_of_two) as address:
        page.call("goto", address)
        page.open("abdomen_02")
        assert "token" not in str(page.call("evaluate", "location.href"))
        page.set_slice(AXIAL, 11)
        spine, empty = picture_places(page, tmp_path)
        automatic = session.result.copy()
        grey = page.picture(tmp_path / "0.png")[spine[1], spine[0]]

        page.call("keyboard.press", "2")
        page.call("mouse.click", *spine)
        page.settled()
        assert session.calls[-1][2:] == ("spleen", True)
        assert session.array[tuple(np.round(session.calls[-1][1]).astype(int))] > 200
        beside = (spine[0] + 20, spine[1])  # the click itself is covered by its mark
        tinted = page.picture(tmp_path / "1.png")[beside[1], beside[0]]
        assert abs(grey.max() - grey.min()) < 0.02
        assert tinted[0] - tinted[2] > 0.2  # orange

        page.call("keyboard.press", "Control+z")
        page.settled()
        assert np.array_equal(session.result, automatic)
        again = page.picture(tmp_path / "2.png")[beside[1], beside[0]]
        assert abs(again.max() - again.min()) < 0.02

        page.call("keyboard.press", "b")
        page.call("mouse.move", *empty)
        page.call("mouse.down")
        page.call("mouse.move", empty[0] + 60, empty[1] + 20, {"steps": 8})
        page.call("mouse.up")
        page.settled()
        kind, points, label, positive, radius = session.calls[-1]
        assert (kind, label, positive, radius) == ("scribble", "spleen", True, 2.0)
        assert len(points) >= 4
        page.call("mouse.click", *empty, {"button": "right"})
        page.settled()
        assert session.calls[-1][3] is False

        page.call("keyboard.press", "Control+s")
        page.wait("document.querySelector('#messages').textContent.startsWith('Saved')")
    saved = SimpleITK.ReadImage(str(workspace_of_two.output / "abdomen_02.nii.gz"))
    assert np.array_equal(SimpleITK.GetArrayFromImage(saved), session.result)
    assert session.result.any()
    np.testing.assert_allclose(saved.GetDirection(), session.image.GetDirection(), atol=1e-6)
    prompts = json.loads((workspace_of_two.output / "prompts" / "abdomen_02.json").read_text())
    assert [entry["positive"] for entry in prompts["interactions"]] == [True, False]
    assert page.call("complaints") == []


def picture_places(page: Page, folder: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return screen positions of the spine, and of tissue in front of it."""
    x, y = brightest(page, page.picture(folder / "places.png"))
    return (round(x), round(y)), (round(x) + 20, round(y) - 150)


def test_errors_are_told_and_nothing_is_lost(
    page: Page, session: Any, workspace_of_two: Workspace, tmp_path: Path
) -> None:
    with served(session, workspace_of_two) as address:
        page.call("goto", address.replace(TOKEN, "wrong"))
        page.wait("document.querySelector('#messages').textContent.includes('access token')")
        page.call("goto", address)
        page.open("abdomen_01")
        page.set_slice(AXIAL, 11)
        spine, _ = picture_places(page, tmp_path)
        page.call("mouse.click", *spine)
        page.settled()
        kept = session.result.copy()
        session.error = MemoryError("no memory left")
        page.call("mouse.click", spine[0] + 8, spine[1])
        page.wait("document.querySelector('#messages').textContent.includes('no memory left')")
        assert np.array_equal(session.result, kept)
        assert page.text("#prompts") == "1 click"
        session.error = None
        # Leaving a case with unsaved clicks asks first.
        page.call("click", "[data-case=abdomen_02]")
        page.wait("document.querySelector('#question').open")
        page.call("click", "#question button[value=no]")
        assert page.text("#case-name") == "abdomen_01"
        # A page that is loaded again shows the session as it is.
        page.call("evaluate", "window.onbeforeunload = null")
        page.call("click", "#save")
        page.wait("document.querySelector('#unsaved').hidden")
        page.call("reload")
        page.wait("document.querySelector('#prompts').textContent === '1 click'")
    page.call("click", "#undo")
    page.wait("document.querySelector('#messages').textContent.includes('does not answer')")
    complaints = page.call("complaints")  # the browser's own lines about refused requests
    assert all("Failed to load resource" in text for text in complaints), complaints


def test_the_bundle_is_what_the_lock_file_says(tmp_path: Path) -> None:
    serve = ROOT / "pipeline" / "serve"
    subprocess.run(["node", str(serve / "bundle.mjs"), str(tmp_path)], check=True, cwd=ROOT)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (serve / "static" / "vendor" / path.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_screenshot_for_the_docs(
    page: Page, session: Any, workspace_of_two: Workspace, tmp_path: Path
) -> None:
    """Thrown away, unless NNMOSAIC_SCREENSHOT says where it goes (``make screenshot``)."""
    target = Path(os.environ.get("NNMOSAIC_SCREENSHOT") or tmp_path / "serve.png")
    page.call("setViewportSize", {"width": 1360, "height": 820})
    with served(session, workspace_of_two) as address:
        page.call("goto", address)
        page.open("abdomen_01")
        page.set_slice(AXIAL, 11)
        (x, y), _ = picture_places(page, tmp_path)
        for key, places in (("2", [(x + 262, y - 80)]), ("3", [(x + 160, y), (x - 160, y)])):
            page.call("keyboard.press", key)
            for place in places:
                page.call("mouse.click", *place)
                page.settled()
        page.call("mouse.move", x + 150, y - 10)
        picture = page.picture(target)
    assert len(session.calls) == 3
    assert 20_000 < target.stat().st_size < 300_000
    assert picture.shape == (820, 1360, 3)
