"""Starting the page: the model, a socket on this machine only, and the address to open."""

import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.predict import dataset_of
from nnmosaic.pipeline.serve.app import create_app
from nnmosaic.pipeline.serve.cases import Workspace
from nnmosaic.pipeline.serve.security import new_token
from nnmosaic.pipeline.serve.session_protocol import Session

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"


def serve(
    model: Path,
    images: Path,
    output: Path | None = None,
    *,
    port: int = 0,
    checkpoint: str = "checkpoint_final.pth",
    device: str | None = None,
    announce: Callable[[str], None] = logger.info,
) -> None:
    """Serve the page until it is interrupted.

    Parameters
    ----------
    model : Path
        Results folder ``TRAINER__PLANS__CONFIGURATION`` of a clustering propagation model.
    images : Path
        Images named ``CASE_XXXX``.
    output : Path, optional
        Where results go. Default: the images folder's name with ``_corrected``, beside it.
    port : int
        0: any free one.
    announce : callable
        Is called once with the address, token included, when it can be opened.

    Raises
    ------
    InputError
        If model, images, output folder or port cannot be used.
    """
    workspace = Workspace.of(
        images,
        output or images.resolve().with_name(f"{images.resolve().name}_corrected"),
        dataset_of(model),
    )
    listening = listen(port)
    with listening:
        session = load_session(model, checkpoint, device)
        token = new_token()
        announce(f"http://{ADDRESS}:{listening.getsockname()[1]}/#token={token}")
        run(create_app(session, workspace, token), listening)


def load_session(model: Path, checkpoint: str, device: str | None) -> Session:
    """Return a session of a trained model; this is where torch is imported."""
    from nnmosaic.pipeline.device import choose_device
    from nnmosaic.pipeline.serve.case_session import CaseSession

    return CaseSession(model, checkpoint=checkpoint, device=choose_device(device))


def listen(port: int) -> socket.socket:
    """Return a socket that only this machine can reach, already listening.

    Raises
    ------
    InputError
        If the port is taken or not allowed.
    """
    listening = socket.socket()
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((ADDRESS, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        raise InputError(
            f"--port {port} cannot be used ({error}). Choose another, or leave --port away."
        ) from None
    return listening


def run(app: FastAPI, listening: socket.socket) -> None:
    """Answer requests until the process is interrupted."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none"
    )
    with suppress(KeyboardInterrupt):  # Ctrl+C is how it ends
        uvicorn.Server(config).run(sockets=[listening])
