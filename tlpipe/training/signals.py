"""Interruptions of a training: SIGINT and SIGTERM, and out-of-memory (OOM) errors."""

import logging
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tlpipe.errors import TrainingError
from tlpipe.training.recipe import Recipe

_log = logging.getLogger(__name__)
_MEMORY = re.compile("out of memory|can't allocate|enough memory", re.IGNORECASE)


class Stop:
    """Whether somebody asked to stop."""

    requested = False


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second one ends at once."""
    stop = Stop()

    def request(number: int, _: object) -> None:
        stop.requested = True
        _log.info("stopping after this step")
        signal.signal(number, before[number])

    before: Mapping[int, Any] = {
        number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def out_of_memory_explained(recipe: Recipe) -> Iterator[None]:
    """Turn an out-of-memory (OOM) error of torch or Python into a TrainingError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        line = " ".join(str(error).split())[:160]
        if isinstance(error, RuntimeError) and not _MEMORY.search(line):
            raise
        size = recipe.batch_size_for(10**9)
        smaller = f"Lower train.batch_size, now {size}, or freeze" if size > 1 else "Freeze"
        raise TrainingError(
            f"there is not enough memory to train ({line}); the last checkpoint is kept. {smaller} "
            f"more in embed.freeze."
        ) from None
