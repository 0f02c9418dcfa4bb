"""How this process computes: ONNX Runtime sessions, random numbers, memory that is freed.

Sessions are opened in one way, for the frozen part, for parity and for serving. Random numbers come
from a seed and a purpose.
"""

import ctypes
import hashlib
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from onnxruntime import InferenceSession, SessionOptions


_log = logging.getLogger(__name__)
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

THREADS = "TLPIPE_THREADS"  # what embed.threads: auto is, where this variable is set
Provider = tuple[str, dict[str, str]]
# Of mallopt in glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def trim() -> None:
    """Give freed memory back to the system, where the C library can: glibc does."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def keep_freed() -> None:
    """Keep freed memory: training asks for the same again and again, and each new page costs."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_MAX, 0)
        set_option(_TRIM_THRESHOLD, 2**31 - 1)
        set_option(_TOP_PAD, 2**26)


def open_session(
    model: Path | bytes,
    *,
    threads: int | None = None,
    device: Literal["auto", "cpu"] = "auto",
) -> "InferenceSession":
    """Open a session on the GPU where onnxruntime-gpu finds one, on the CPU elsewhere.

    ``threads``: threads for one operator; None lets ONNX Runtime take every core. ``device``:
    ``cpu`` for results that must not depend on whether this machine has a GPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads that wait for the next call in a loop cost a sixth to a third of a call's CPU seconds.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    wanted = providers(onnxruntime.get_available_providers(), device)
    if wanted[0][0] == _CUDA:
        # The CUDA libraries come with torch's packages, not with the system's loader path.
        onnxruntime.preload_dlls()
    return start_session(model, options, wanted)


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity and its container's limit count."""
    import joblib

    return int(joblib.cpu_count())


def providers(available: Collection[str], device: Literal["auto", "cpu"]) -> list[Provider]:
    """Return the execution providers to ask for, the preferred first, each with its options.

    ``use_tf32`` is on by default, which rounds the factors of every fp32 product to 10 bits of
    mantissa; logits then differ from the CPU's by some 1e-3. The default search for the fastest
    convolution may choose another algorithm, with other rounding, in every process.

    Source: ONNX Runtime, CUDA Execution Provider, Configuration Options.
    """
    cuda = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    on_cpu: list[Provider] = [(_CPU, {})]
    return [(_CUDA, cuda), *on_cpu] if device == "auto" and _CUDA in available else on_cpu


def start_session(
    model: Path | bytes, options: "SessionOptions", wanted: Sequence[Provider]
) -> "InferenceSession":
    """Open a session with the given providers, and say so where the preferred one cannot start."""
    import onnxruntime

    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=list(wanted))
    # ONNX Runtime falls back in silence where a provider cannot start.
    if session.get_providers()[0] != wanted[0][0]:
        _log.warning("%s did not start; running on the CPU", wanted[0][0])
    return session


def generator(seed: int, purpose: str) -> "np.random.Generator":
    """Return a generator that depends on ``seed`` and ``purpose`` only."""
    import numpy as np

    return np.random.default_rng(_digest(seed, purpose))


def uniform(seed: int, key: str) -> float:
    """Return a number in [0, 1) that depends on ``seed`` and ``key`` only, not on any order."""
    return (_digest(seed, key) >> 11) * 2.0**-53


def _digest(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8])
