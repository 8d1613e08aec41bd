"""Sums over tokens of products of activations: products in float32 (float64 where activations are), sums in float64.

Entry ij of a product of float32 activations over TOKENS_AT_ONCE tokens is off by a few 1e-7 of sqrt(G_ii G_jj), by 1e-6
where one token is a thousand times as large as the others; adding products up in float64 leaves it at that. Nothing
that grows with the number of tokens is in float64, which consumer GPUs compute 64 times slower than float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from compress.errors import UsageError

TOKENS_AT_ONCE = 2048
ROWS_AT_ONCE = 256  # of a sum; with TOKENS_AT_ONCE it bounds the temporaries, which are then in memory already


class GramSum:
    """The sum of A^T A over batches A. Blocks below the diagonal are zero until `close` mirrors those above it."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, A: Float[Tensor, "tokens k"]) -> None:
        for a in at_least_float32(A).split(TOKENS_AT_ONCE):
            for start in range(0, len(self.total), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                self.total[rows, start:] += a[:, rows].T @ a[:, start:]

    def close(self) -> Float64[Tensor, "k k"]:
        """Mirror the upper blocks and return the whole matrix; ends the sum."""
        for start in range(0, len(self.total), ROWS_AT_ONCE):
            rows, after = slice(start, start + ROWS_AT_ONCE), slice(start + ROWS_AT_ONCE, None)
            self.total[after, rows] = self.total[rows, after].T
        return self.total


class DiagonalSum:
    """The diagonal of a `GramSum` alone."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, A: Float[Tensor, "tokens k"]) -> None:
        for a in at_least_float32(A).split(TOKENS_AT_ONCE):
            self.total += a.square().sum(0)

    def close(self) -> Float64[Tensor, "k"]:
        return self.total


def add_product(total: Float64[Tensor, "k m"], A: Float[Tensor, "tokens k"], B: Float[Tensor, "tokens m"]) -> None:
    """Add A^T B to a sum. A and B have one dtype, float32 at least."""
    for a, b in zip(A.split(TOKENS_AT_ONCE), B.split(TOKENS_AT_ONCE), strict=True):
        for start in range(0, len(total), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            total[rows] += a[:, rows].T @ b


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_computing(dtype: torch.dtype, device: torch.device) -> None:
    """Raises UsageError for a dtype that the device multiplies many times more slowly than float32."""
    if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise UsageError(
            f"--dtype {name}: a CPU multiplies 16-bit floats many times more slowly than float32. Leave it out."
        )


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute matrix products in the dtype of their operands: no TF32, no reduced-precision reductions."""
    matmul = torch.backends.cuda.matmul
    before = (matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
