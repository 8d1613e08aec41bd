"""Memory that goes back to the system as soon as it is free."""

import ctypes
import sys

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
LARGE = 2**20  # bytes


def return_large_blocks() -> None:
    """From now on, let freed blocks of a megabyte and more go back to the system at once (glibc; elsewhere no effect).

    glibc keeps freed blocks below a threshold that grows to 32 MB. With a decoder block's matrices of just such sizes
    its heap fragments, and the resident set grows with every block although nothing is kept. To be called before
    anything large is allocated: gaps that the heap has already are filled and left again, and it grows all the same.
    It costs some time, because pages that are taken again have to be zeroed again.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
