"""Pure functions on tensors, named as in the papers. They need no model and import torch alone."""

# What weights may be written and computed in, by torch's names; here torch itself is not needed yet.
DTYPES = ("float16", "bfloat16", "float32", "float64")
