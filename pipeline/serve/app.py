"""The HTTP interface: each route reads a request, calls the workbench, and answers in JSON."""

import mimetypes
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from nnmosaic.pipeline.serve.cases import Workspace
from nnmosaic.pipeline.serve.errors import RefusedError
from nnmosaic.pipeline.serve.security import MAX_BODY, Guard
from nnmosaic.pipeline.serve.session_protocol import Session
from nnmosaic.pipeline.serve.workbench import Workbench

STATIC = Path(__file__).parent / "static"
MAX_RADIUS = 50.0
"""Of a scribble, in voxels."""

Number = Annotated[float, Field(allow_inf_nan=False)]
World = Annotated[list[Number], Field(min_length=3, max_length=3)]


class _Message(BaseModel):
    """A body; unknown keys and numbers written as text are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    case: str


class OpenMessage(_Message):
    """Open a case."""

    discard: bool = False


class PointMessage(_Message):
    """A click, in RAS millimetres."""

    label: str
    positive: bool
    world: World


class ScribbleMessage(_Message):
    """A stroke, in RAS millimetres; its radius is in voxels."""

    label: str
    positive: bool
    world: Annotated[list[World], Field(min_length=1, max_length=10_000)]
    radius: Annotated[float, Field(gt=0, le=MAX_RADIUS)]


class SaveMessage(_Message):
    """Save; ``overwrite`` a result from an earlier time."""

    overwrite: bool = False


def create_app(
    session: Session, workspace: Workspace, token: str, *, max_body: int = MAX_BODY
) -> FastAPI:
    """Return the web application of one session.

    Parameters
    ----------
    token : str
        Every request but those for the page itself must carry it (``Authorization: Bearer``).
    max_body : int
        Bytes of a request.
    """
    # Newer versions of FastAPI send traces to where OTEL_* variables point; nothing leaves here.
    app = FastAPI(
        docs_url=None, redoc_url=None, openapi_url=None, telemetry={"auto_configure": False}
    )
    app.add_middleware(Guard, token=token, max_body=max_body)
    mimetypes.add_type("text/javascript", ".js")  # some Windows machines say text/plain
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    _add_error_answers(app)
    bench = Workbench(session, workspace)
    _add_reading(app, bench)
    _add_editing(app, bench)
    return app


def _add_reading(app: FastAPI, bench: Workbench) -> None:
    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/api/state")
    def state() -> dict[str, Any]:
        return bench.state()

    @app.get("/api/cases")
    def cases() -> dict[str, Any]:
        return bench.cases()

    @app.get("/api/image")
    def image(channel: int = 0) -> Response:
        return Response(bench.image(channel), media_type="application/octet-stream")

    @app.get("/api/label_map")
    def label_map() -> dict[str, Any]:
        return bench.label_map()


def _add_editing(app: FastAPI, bench: Workbench) -> None:
    @app.post("/api/open", status_code=202)
    def open_case(message: OpenMessage) -> dict[str, Any]:
        bench.open(message.case, discard=message.discard)
        return bench.state()

    @app.post("/api/point")
    def point(message: PointMessage) -> dict[str, Any]:
        return bench.add_point(
            message.case, message.world, message.label, positive=message.positive
        )

    @app.post("/api/scribble")
    def scribble(message: ScribbleMessage) -> dict[str, Any]:
        return bench.add_scribble(
            message.case,
            message.world,
            message.label,
            positive=message.positive,
            radius=message.radius,
        )

    @app.post("/api/undo")
    def undo(message: _Message) -> dict[str, Any]:
        return bench.undo(message.case)

    @app.post("/api/reset")
    def reset(message: _Message) -> dict[str, Any]:
        return bench.reset(message.case)

    @app.post("/api/suggest_slice")
    def suggest_slice(message: _Message) -> dict[str, Any]:
        return bench.suggest_slice(message.case)

    @app.post("/api/save")
    def save(message: SaveMessage) -> dict[str, str]:
        return bench.save(message.case, overwrite=message.overwrite)


def _add_error_answers(app: FastAPI) -> None:
    """Make every error one sentence: ``{"error": ..., "reason": ...}``."""

    @app.exception_handler(RefusedError)
    def refused(_: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse(error.content(), error.status)

    @app.exception_handler(RequestValidationError)
    def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            text = f"The request is not valid JSON ({first['ctx']['error']})."
        else:
            where = ".".join(str(part) for part in first["loc"][1:]) or "body"
            text = f"{where}: {first['msg']}."
        return JSONResponse(RefusedError(text).content(), 422)

    @app.exception_handler(HTTPException)
    def unknown(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse({"error": text, "reason": "http"}, error.status_code)

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> JSONResponse:
        text = f"The server made a mistake ({type(error).__name__}: {error}). Try again, or save."
        return JSONResponse({"error": text, "reason": "failed"}, 500)
