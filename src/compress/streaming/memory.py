"""Memory that is free in the process, given back to the system."""

import ctypes
import sys


def return_free_memory() -> None:
    """Give the heap's free pages back (glibc; elsewhere no effect). It takes milliseconds.

    glibc keeps freed blocks of up to 32 MB for later ones. With a decoder block's matrices of just such sizes its heap
    fragments, and the resident set grows with every block although nothing is kept.
    """
    if sys.platform != "linux":
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
