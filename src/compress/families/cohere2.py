"""Cohere 2 (Command R7B): Cohere with sliding windows; its config sets the heads' size to hidden_size / heads."""

from compress.families._blocks import COHERE

FAMILY = COHERE
