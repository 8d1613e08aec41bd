"""Memory given back to the system as soon as it is free."""

import ctypes


def release_freed_memory() -> None:
    """Give freed heap pages back, where the C library can (glibc's malloc_trim; elsewhere this does nothing).

    glibc keeps what it frees below its mmap threshold, which grows to 32 MB: with a block's matrices of just such
    sizes the heap fragments, and the resident set would grow with every block although nothing is held.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
