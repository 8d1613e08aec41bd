"""Sums that come out the same whatever the order of their terms (reproducible summation).

A sum is held as two float64 tensors, the second for what rounding takes from the first (the error-free sum of Knuth,
The Art of Computer Programming 2, 4.2.2, theorem B): about 106 bits. Which float64 that is rounded to at the end
depends on the order of the terms only where the 106 bits lie at a tie to their last. A product that BLAS adds in place
is rounded once a term, and the order shows in the last bits of float64: little, but enough to decide near ties.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

AT_ONCE = 2**21  # numbers that are added at a time, for the temporaries: four of so many


class ReproducibleSum:
    """`high` + `low`, of one shape. Terms are added in place."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        self.high = torch.zeros(shape, dtype=torch.float64, device=device)
        self.low = torch.zeros_like(self.high)

    def add(self, term: Tensor) -> None:
        take(self.high.view(-1), self.low.view(-1), term.double().reshape(-1))

    def add_product(self, A: Float64[Tensor, "tokens k"], B: Float64[Tensor, "tokens m"]) -> None:
        """A^T B, some rows at a time."""
        if not self.high.numel():
            return
        rows = max(1, AT_ONCE // self.high.shape[1])
        for high, low, columns in zip(*(x.split(rows) for x in (self.high, self.low)), A.split(rows, 1), strict=True):
            take(high, low, columns.T @ B)

    def close(self) -> Tensor:
        """The sum in float64. Nothing can be added to it any more."""
        self.high += self.low
        self.low = self.low.new_zeros(0)
        return self.high


def take(high: Tensor, low: Tensor, term: Tensor) -> None:
    """high + low becomes high + low + term."""
    total = high + term
    taken = total - high
    term = term - taken
    low += (high - (total - taken)).add_(term)
    high.copy_(total)
