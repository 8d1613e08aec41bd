"""Architectures that a result is written in: a class of transformers, or our own."""
