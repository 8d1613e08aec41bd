"""Which products of matrices are taken in 16 bits."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HALF = (torch.float16, torch.bfloat16)
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "matmul", "_grouped_mm"}


class Products(TorchDispatchMode):
    """Counts the products while it is entered. half: those with a 16-bit operand, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.half = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS or "scaled_dot_product" in name:
            operands = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            self.count += 1
            self.half[name] += any(each.dtype in HALF for each in operands)
        return func(*args, **(kwargs or {}))
