"""Gemma 2: Gemma's blocks with a norm after each branch too, and soft caps on attention scores and logits."""

from compress.families._blocks import GEMMA2

FAMILY = GEMMA2
