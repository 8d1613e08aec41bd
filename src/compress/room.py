"""How much of the calibration text a run holds at once, under a promise of what it may take."""

import math
from collections.abc import Callable
from pathlib import Path

import psutil

from compress.errors import UsageError
from compress.needs import Room

STATUS = Path("/proc/self/status")


def settle(asked: Room, limit: int, base: int, need: Callable[[Room], int], *, fixed_batch: bool) -> Room:
    """The largest batch up to what was asked for, halved until it fits; then as much activation cache as is left.

    limit: bytes that may be taken, `base` of them are. need: bytes that a run takes beside. fixed_batch: the user said
    how many windows at a time. Raises UsageError with the least that would do.
    """
    batch_size = asked.batch_size
    while True:
        left = limit - base - need(Room(batch_size, 0))
        if left >= 0:
            return Room(batch_size, min(asked.cache_memory, left))
        if batch_size == 1 or fixed_batch:
            smaller = "a smaller --batch-size or a shorter --seq-len" if batch_size > 1 else "a shorter --seq-len"
            raise UsageError(
                f"--max-memory {limit / 1e9:g} GB cannot be kept: with all activations on disk and {batch_size} "
                f"windows at a time the run takes {least(limit - left):.2f} GB. Allow that, or use {smaller}."
            )
        batch_size //= 2


def least(needed: int) -> float:
    """In GB, what is promised to do: upwards, and 10 MB more, because no two starts of Python hold the same."""
    return (math.ceil(needed / 1e7) + 1) / 100


def held() -> int:
    """Bytes that this process holds and the system cannot take back: pages of files do not count."""
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)
