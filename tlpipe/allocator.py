"""What the C library does with freed memory: give it back, or keep it for the next step."""

import ctypes

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
