"""Freed memory that goes back to the system.

glibc raises by itself, up to 32 MB, the size below which what is freed stays in the process's heap. There the matrices
of one block leave gaps that the next one's do not fit into: a walk over many blocks of a few hundred megabytes holds
more from block to block although nothing is kept.
"""

import ctypes
import sys

RETURNED = 2**20  # bytes from which on freed memory is returned
M_MMAP_THRESHOLD = -3  # of malloc.h


def return_freed_memory() -> None:
    """For the rest of this process. It costs some time, because what is taken again has to be zeroed again.

    Without effect where the C library is not glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, RETURNED)
