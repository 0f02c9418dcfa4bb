"""Command ``serve``: answer over HTTP until the process is told to stop."""

import logging

import uvicorn

from tlpipe.inference.predictor import Predictor
from tlpipe.onnx_export.bundle import Bundle
from tlpipe.serving import app

_log = logging.getLogger(__name__)


def run(*, bundle: Bundle, host: str, port: int) -> None:
    """Serve a bundle; returns after SIGTERM or Ctrl-C, when accepted requests are answered."""
    predictor = Predictor(bundle)
    _log.info(
        "serving %s on http://%s:%s with %s", bundle.digest[:16], host, port, predictor.provider
    )
    uvicorn.run(app.create(predictor), host=host, port=port, log_level="warning")
