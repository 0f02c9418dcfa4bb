"""Repeat what a disk, a network or a store fails at; only then is it an error."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tlpipe.errors import StoreError, TlpipeError

_log = logging.getLogger(__name__)
T = TypeVar("T")
PAUSES_S = (1.0, 2.0, 4.0)  # between the tries


def attempt(
    action: Callable[[], T],
    what: str,
    *,
    failures: tuple[type[Exception], ...] = (OSError, MemoryError),
    but: Callable[[Exception], bool] = lambda _: False,
) -> T:
    """Do what a disk, a network or a store may fail at; repeat it with growing pauses.

    ``what``: the subject of the message; ``failures``: the errors that are repeated; ``but``:
    whether one of them is an answer rather than a failure, and is passed on at once.

    Raises:
        StoreError: it fails every time.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            return action()
        except TlpipeError:
            raise
        except failures as raised:
            error = _unmasked(raised)
            if but(error):
                raise error from None
            found = f"{type(error).__name__}: {error}"
            if pause_s is None:
                raise StoreError(
                    f"{what} cannot be reached: {found}. It was tried {len(PAUSES_S) + 1} times "
                    f"in {sum(PAUSES_S):g} s. Nothing was rejected or changed: check the "
                    f"connection, the credentials and the disk, then run again."
                ) from None
            _log.warning("%s: %s; trying again in %g s", what, found, pause_s)
        time.sleep(pause_s)
    raise AssertionError


def _unmasked(error: Exception) -> Exception:
    """Return what failed where fsspec says that a file is not there.

    It says so of a web server's file whatever fails while it asks for the size. What s3fs says so
    of has an answer of the server.
    """
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    is_answer = hasattr(cause, "response") or getattr(cause, "status", None) in (404, 410)
    return error if is_answer else cause
