"""Command ``serve``: answer over HTTP until the process is told to stop."""

import logging
import socket

import uvicorn

from tlpipe.errors import ServingError
from tlpipe.export.bundle import Bundle
from tlpipe.inference.predictor import Predictor
from tlpipe.serving import app

_log = logging.getLogger(__name__)


def run(
    *, bundle: Bundle, host: str, port: int, degraded: str = "", precision: str = "fp32"
) -> None:
    """Serve a bundle; returns after SIGTERM or Ctrl-C, when accepted requests are answered.

    ``degraded``: why it is not the bundle that should serve, to be shown; empty where it is.

    Raises:
        ParamsError: the bundle has no graph of that precision.
        ServingError: the address is not free.
    """
    predictor = Predictor(bundle, precision=precision)
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ServingError(
            f"cannot listen on {host}:{port}: {error.strerror}. Name another with --port."
        ) from None
    _log.info(
        "serving %s in %s on http://%s:%s with %s",
        bundle.digest[:16],
        precision,
        host,
        port,
        predictor.provider,
    )
    config = uvicorn.Config(app.create(predictor, degraded), log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])
