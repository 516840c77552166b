"""The one open case: what the page can do with it, one thing after another."""

import base64
import logging
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from nnmosaic.data_conversion.atomic_write import write_json
from nnmosaic.data_conversion.case_check import read_image, reader_of
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case
from nnmosaic.pipeline.serve.cases import Workspace
from nnmosaic.pipeline.serve.errors import RefusedError
from nnmosaic.pipeline.serve.geometry import Grid, changed_box, display_nifti
from nnmosaic.pipeline.serve.marks import marks
from nnmosaic.pipeline.serve.session_protocol import Session, Zyx

logger = logging.getLogger(__name__)

Point = Sequence[float]
"""RAS millimetres."""

Answer = TypeVar("Answer")


@dataclass
class _Shown:
    """The case on the page; ``sent`` is the label map that the page has, None while computing."""

    name: str
    image: np.ndarray  # (C, Z, Y, X)
    grid: Grid
    sent: np.ndarray | None = None
    revision: int = 0
    unsaved: bool = False
    saved: bool = False


class Workbench:
    """A session with its files. Every method either does what it says or raises `RefusedError`."""

    def __init__(self, session: Session, workspace: Workspace) -> None:
        self.session, self.workspace = session, workspace
        self._lock = threading.Lock()  # held by whoever uses the session
        self._shown: _Shown | None = None
        self._opening: tuple[str, float] | None = None  # name, start
        self._failure: str | None = None

    def state(self) -> dict[str, Any]:
        """Return what is open, and how far the opening of a case has come."""
        shown, opening = self._shown, self._opening
        now = time.monotonic()
        return {
            "labels": self.session.labels,
            "output": str(self.workspace.output),
            "opening": opening and {"case": opening[0], "seconds": round(now - opening[1], 1)},
            "failure": self._failure,
            "case": shown and self._described(shown),
        }

    def _described(self, shown: _Shown) -> dict[str, Any]:
        return {
            "name": shown.name,
            "channels": list(self.workspace.dataset.channel_names.values()),
            "shape": shown.grid.display_shape,
            "to_world": shown.grid.display_affine.tolist(),
            "ready": shown.sent is not None,
            "slice_axis": (
                None if shown.sent is None else shown.grid.display_axis(self.session.slice_axis)
            ),
            "unsaved": shown.unsaved,
        }

    def cases(self) -> dict[str, Any]:
        """Return the cases, whether each has a saved result, and what is wrong with the others."""
        try:
            cases, faults = self.workspace.cases()
        except InputError as error:
            raise RefusedError(str(error), status=404, reason="case") from None
        listed = [{"name": name, "saved": self.workspace.is_saved(name)} for name in cases]
        return {"cases": listed, "faults": faults}

    def open(self, name: str, *, discard: bool) -> None:
        """Begin to open a case; `state` tells how far it has come.

        Parameters
        ----------
        discard : bool
            Give up clicks that are not saved.
        """
        case = self.workspace.case(name)
        self._refuse_while_opening()
        if not self._lock.acquire(blocking=False):
            raise RefusedError(
                "The last click is still being worked on.", status=409, reason="busy"
            )
        shown = self._shown
        if shown is not None and shown.unsaved and not discard:
            self._lock.release()
            raise RefusedError(
                f"The corrections of {shown.name} are not saved.", status=409, reason="unsaved"
            )
        self._opening, self._failure = (name, time.monotonic()), None
        threading.Thread(target=self._open, args=(case,), daemon=True).start()

    def _open(self, case: Case) -> None:
        """Read and compute, in a thread of its own; takes over the lock."""
        try:
            shown = self._read(case)  # if this fails, the case before stays open
            self._shown = shown
            try:
                self.session.open([path.resolve() for path in case.images])
                shown.sent = self.session.label_map().copy()
            except BaseException:
                self._shown = None
                raise
        except InputError as error:
            self._failure = str(error)
        except Exception as error:
            logger.exception("%s could not be opened", case.identifier)
            self._failure = (
                f"{case.identifier} could not be opened ({type(error).__name__}: {error}). More is "
                "in the terminal window of nnmosaic serve."
            )
        finally:
            self._opening = None
            self._lock.release()

    def _read(self, case: Case) -> _Shown:
        dataset = self.workspace.dataset
        channels = len(dataset.channel_names)
        image, properties = read_image(case, reader_of(dataset), num_channels=channels)
        return _Shown(case.identifier, image, Grid.from_properties(properties, image.shape[1:]))

    def image(self, channel: int) -> bytes:
        """Return one channel of the shown case as NIfTI on the display grid."""
        shown = self._shown
        if shown is None:
            raise RefusedError("No case is open.", status=409, reason="no_case")
        if not 0 <= channel < len(shown.image):
            raise RefusedError(f"{shown.name} has no channel {channel}.", status=404)
        return display_nifti(shown.image[channel], shown.grid)

    def label_map(self) -> dict[str, Any]:
        """Return the whole label map, as an update that changes everything."""
        self._refuse_while_opening()
        with self._lock:
            shown = self._ready()
            whole = ((0, shown.grid.shape[0]), (0, shown.grid.shape[1]), (0, shown.grid.shape[2]))
            return self._update(shown, self.session.label_map(), whole)

    def add_point(self, case: str, point: Point, label: str, *, positive: bool) -> dict[str, Any]:
        """Take a click, and return what changed."""
        with self._edited(case) as shown:
            (index,) = self._indices(shown, [point], label)
            self._ask(lambda: self.session.add_point(index, label, positive))
            shown.unsaved = True
            return self._changes(shown)

    def add_scribble(
        self, case: str, points: Sequence[Point], label: str, *, positive: bool, radius: float
    ) -> dict[str, Any]:
        """Take a stroke, and return what changed."""
        with self._edited(case) as shown:
            indices = self._indices(shown, points, label)
            self._ask(lambda: self.session.add_scribble(indices, label, positive, radius))
            shown.unsaved = True
            return self._changes(shown)

    def undo(self, case: str) -> dict[str, Any]:
        """Take the last step back, and return what changed."""
        with self._edited(case) as shown:
            if not self._ask(self.session.undo):
                raise RefusedError("There is nothing to undo.", status=409, reason="nothing")
            shown.unsaved = True
            return self._changes(shown)

    def reset(self, case: str) -> dict[str, Any]:
        """Go back to the automatic result, and return what changed."""
        with self._edited(case) as shown:
            self._ask(self.session.reset)
            shown.unsaved = shown.saved  # the saved result differs from now on
            return self._changes(shown)

    def suggest_slice(self, case: str) -> dict[str, Any]:
        """Return display axis and index of the slice where a click may help most."""
        with self._edited(case) as shown:
            index = self._ask(self.session.suggest_slice)
            axis = self.session.slice_axis
            if index is None:
                raise RefusedError(
                    "The model has no slice to suggest.", status=409, reason="nothing"
                )
            grid = shown.grid
            return {"axis": grid.display_axis(axis), "index": grid.display_index(axis, index)}

    def save(self, case: str, *, overwrite: bool) -> dict[str, str]:
        """Write label map and prompts, each in one step, and return the two paths."""
        with self._edited(case) as shown:
            label_map = self.workspace.label_map_file(case)
            prompts = self.workspace.prompts_file(case)
            if label_map.exists() and not (shown.saved or overwrite):
                raise RefusedError(
                    f"{label_map} exists from an earlier time.", status=409, reason="exists"
                )
            try:
                prompts.parent.mkdir(exist_ok=True)
                self.session.save(label_map)
                write_json(self.session.prompts(), prompts)
            except OSError as error:
                raise RefusedError(
                    f"The result could not be written ({error}). Free disk space or change the "
                    "rights of the folder, then save again; nothing is lost.",
                    status=500,
                    reason="failed",
                ) from None
            shown.unsaved, shown.saved = False, True
            return {"label_map": str(label_map), "prompts": str(prompts)}

    @contextmanager
    def _edited(self, case: str) -> Iterator[_Shown]:
        """Hold the session for one step on the case that the page believes is open."""
        self._refuse_while_opening()
        with self._lock:
            shown = self._ready()
            if shown.name != case:
                raise RefusedError(
                    f"{shown.name} is open by now, not {case}, perhaps from another tab. Load the "
                    "page again.",
                    status=409,
                    reason="other_case",
                )
            yield shown

    def _refuse_while_opening(self) -> None:
        opening = self._opening
        if opening is not None:
            raise RefusedError(f"{opening[0]} is being opened. Wait.", status=409, reason="busy")

    def _ready(self) -> _Shown:
        if self._shown is None or self._shown.sent is None:
            raise RefusedError("No case is open. Choose one first.", status=409, reason="no_case")
        return self._shown

    def _indices(self, shown: _Shown, points: Sequence[Point], label: str) -> list[Zyx]:
        """Return array indices of world coordinates, and refuse what the session must not see."""
        if label not in self.session.labels:
            known = ", ".join(self.session.labels)
            raise RefusedError(
                f"The model has no class {label!r}. It has: {known}.", reason="label"
            )
        indices = shown.grid.world_to_array(np.array(points, float))
        outside = ~shown.grid.contains(indices)
        if outside.any():
            numbers = ", ".join(f"{v:.1f}" for v in points[int(np.argmax(outside))])
            raise RefusedError(
                f"The point ({numbers}) mm lies outside the image. Click on the image.",
                reason="outside",
            )
        return [(z, y, x) for z, y, x in indices.tolist()]

    def _ask(self, step: Callable[[], Answer]) -> Answer:
        """Let the session do something; what it raises becomes words."""
        try:
            return step()
        except ValueError as error:  # InputError is one
            raise RefusedError(str(error)) from None
        except Exception as error:
            logger.exception("The session failed")
            raise RefusedError(
                f"The model could not do this ({type(error).__name__}: {error}). The result before "
                "it is kept; you can go on or save. More is in the terminal window.",
                status=500,
                reason="failed",
            ) from None

    def _changes(self, shown: _Shown) -> dict[str, Any]:
        """Return what differs from what the page has, whatever the session says has changed."""
        after = self.session.label_map()
        before = shown.sent if shown.sent is not None else np.zeros_like(after)
        shown.revision += 1
        return self._update(shown, after, changed_box(before, after))

    def _update(self, shown: _Shown, after: np.ndarray, box: Any) -> dict[str, Any]:
        voxels = None
        if box is not None:
            part = after[tuple(slice(*limits) for limits in box)]
            voxels = pack(shown.grid.to_display(part))
            shown.sent = after.copy()
        return {
            "revision": shown.revision,
            "box": box and shown.grid.display_box(box),
            "voxels": voxels,
            "marks": marks(self.session.prompts(), self.session.labels, shown.grid),
            "unsaved": shown.unsaved,
        }


def pack(voxels: np.ndarray) -> str:
    """Return voxels (x, y, z) as base64 of zlib; x runs fastest, as in NIfTI and on the page."""
    return base64.b64encode(zlib.compress(voxels.tobytes(order="F"), 1)).decode()
