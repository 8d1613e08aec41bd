"""A compressed model as a folder that transformers loads: what is written, and the proof that it reloads."""
