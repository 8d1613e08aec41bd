"""Which linears a stage works on, as a user says it: `all`, a part of the block, or patterns of names below a block."""

import fnmatch
from collections.abc import Sequence

from compress.calibration.linears import LinearShape


def is_target(patterns: Sequence[str], name: str, part: str) -> bool:
    """
    name: of the linear below its block. part: of the block, `attention`, `mlp` or `router`, which `all` leaves out.
    """
    name = name.removesuffix(".first").removesuffix(".second")  # of what is factorized
    return any(
        pattern == part
        or (pattern == "all" and part != "router")
        or fnmatch.fnmatchcase(name, pattern)
        or fnmatch.fnmatchcase(name, f"*.{pattern}")
        for pattern in patterns
    )


def unmatched(patterns: Sequence[str], linears: Sequence[LinearShape]) -> list[str]:
    """A sentence for each pattern that no linear matches."""
    names = ", ".join(sorted({linear.name for linear in linears}))
    return [
        f"No linear matches the target {pattern!r}. There are {names}."
        for pattern in patterns
        if not any(is_target((pattern,), linear.name, linear.part) for linear in linears)
    ]
