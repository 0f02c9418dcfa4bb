"""Open ONNX Runtime sessions: the one way, for the frozen part, for parity and for serving."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_log = logging.getLogger(__name__)


def open_session(model: Path | bytes, *, threads: int | None = None) -> "InferenceSession":
    """Open a session on the GPU where onnxruntime-gpu finds one, on the CPU elsewhere.

    ``threads``: threads for one operator; None lets ONNX Runtime take every core.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    wanted = [
        provider
        for provider in ("CUDAExecutionProvider", "CPUExecutionProvider")
        if provider in onnxruntime.get_available_providers()
    ]
    if "CUDAExecutionProvider" in wanted:
        # The CUDA libraries come with torch's packages, not with the system's loader path.
        onnxruntime.preload_dlls()
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=wanted)
    # ONNX Runtime falls back in silence where a provider cannot start.
    if session.get_providers()[0] != wanted[0]:
        _log.warning("%s did not start; running on the CPU", wanted[0])
    return session
