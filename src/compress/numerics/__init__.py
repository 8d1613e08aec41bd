"""Pure functions on tensors, named as in the papers. They need no model and import torch alone."""
