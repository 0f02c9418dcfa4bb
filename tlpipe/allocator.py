"""Give memory back: the C library keeps what was freed, in case it is wanted again."""

import ctypes


def trim() -> None:
    """Give freed memory back to the system, where the C library can: glibc does."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)
