"""Parallel attention and gated MLP after one norm."""

from compress.families import BranchTable
from compress.families._sequential import ATTENTION, GATED_MLP

PARALLEL = BranchTable(
    name="parallel",
    norms=ATTENTION.norms,
    paths=ATTENTION.paths + GATED_MLP.paths,
    readers=ATTENTION.readers + GATED_MLP.readers,
    writers=ATTENTION.writers + GATED_MLP.writers,
    units=ATTENTION.units + GATED_MLP.units,
)
