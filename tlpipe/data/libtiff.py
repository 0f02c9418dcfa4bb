"""What libtiff says of an image while Pillow decodes it, which Pillow itself does not listen to.

libtiff prints its errors, without the name of a file, to the error stream of the process; of fax
data that make no sense it says so and goes on, and Pillow returns what came out.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from PIL import _imaging

_LENGTH = 300
_here = threading.local()


@contextmanager
def errors() -> Iterator[list[str]]:
    """Yield the list of what libtiff calls errors in this thread, in place of printing them."""
    _here.said = said = list[str]()
    try:
        yield said
    finally:
        _here.said = None


def _take_down(module: bytes | None, text: bytes, values: int) -> None:
    line = ctypes.create_string_buffer(_LENGTH)
    ctypes.CDLL(None).vsnprintf(line, _LENGTH, text, ctypes.c_void_p(values))
    said = getattr(_here, "said", None)
    if said is not None:
        said.append(f"{(module or b'').decode(errors='replace')}: {line.value.decode('latin-1')}")


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)(_take_down)


def _listen() -> None:
    """Have libtiff, the one that Pillow was linked with, call this module."""
    # Not where Pillow has no libtiff, or one inside that nobody else can call.
    with suppress(AttributeError, OSError):
        # The symbols of a library are looked for in those that it needs, too.
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(_HANDLER)


_listen()
