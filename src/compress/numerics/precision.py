"""Set torch's numerical precision for the length of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from compress.errors import UsageError


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
