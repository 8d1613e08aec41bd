"""Gemma 3's language model: Gemma 2's blocks, with norms of queries and keys."""

from compress.families._blocks import GEMMA2

FAMILY = GEMMA2
