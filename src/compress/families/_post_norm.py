"""Families that normalize a branch's output before it is added to the stream."""

from typing import Any


def not_exact(config: Any) -> str:
    return "it normalizes what a branch writes (post-norm), which a rotation of the stream does not pass."
