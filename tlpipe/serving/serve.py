"""Command ``serve``: answer over HTTP until the process is told to stop.

=======================  ======================================================
``POST /predict``        the bytes of one image file -> label and probabilities
``GET /v2/health/live``  200 while the process answers
``GET /v2/health/ready`` 200 while a model is loaded, 503 before; ``degraded`` says
                         why it is not the one that should serve, where it is not
=======================  ======================================================

The health paths are those of the Open Inference Protocol.
"""

import logging
import socket
from dataclasses import asdict
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from tlpipe.bundle import Bundle
from tlpipe.errors import ImageError, ServingError
from tlpipe.predict import Predictor

_log = logging.getLogger(__name__)
MAX_BODY_BYTES = 32 * 2**20


def create_app(predictor: Predictor | None, degraded: str = "") -> FastAPI:
    """Return the application; without a predictor it lives but is not ready."""
    app = FastAPI(title="tlpipe", docs_url=None, redoc_url=None)

    @app.get("/v2/health/live")
    def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready")
    def ready() -> dict[str, bool | str]:
        state: dict[str, bool | str] = {"ready": True, "model": _loaded(predictor).bundle.digest}
        return state | {"degraded": degraded} if degraded else state

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        loaded = _loaded(predictor)
        image = await _body(request)
        try:
            prediction = await run_in_threadpool(loaded.predict, image)
        except ImageError as error:
            kind = request.headers.get("content-type", "")
            form = "a form was sent; " if kind.startswith("multipart/") else ""
            detail = (
                f"{error}; {form}expected the bytes of one image file as the body, such as "
                f"'curl --data-binary @x.jpg' sends them"
            )
            raise HTTPException(400, detail) from None
        return {"model": loaded.bundle.digest, **asdict(prediction)}

    return app


def _loaded(predictor: Predictor | None) -> Predictor:
    if predictor is None:
        raise HTTPException(503, "no model is loaded")
    return predictor


async def _body(request: Request) -> bytes:
    """Read the body, but never more than the cap, whatever its length is said to be."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return bytes(body)


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
            f"cannot listen on {host}:{port}: {error.strerror}. Name another address with --host, "
            f"or another port with --port."
        ) from None
    _log.info(
        "serving %s in %s on http://%s:%s with %s",
        bundle.digest[:16],
        precision,
        host,
        listener.getsockname()[1],  # of 0 the system chooses a free one
        predictor.provider,
    )
    config = uvicorn.Config(create_app(predictor, degraded), log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])
