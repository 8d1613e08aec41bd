"""Families that normalise what a branch writes before the stream takes it in."""

from typing import Any


def not_exact(config: Any) -> str:
    return "it normalises what a branch writes (post-norm), which a rotation of the stream does not pass."
