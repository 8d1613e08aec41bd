"""Run 4-bit linears by torch's own kernel, on devices and in dtypes where it pays.

That is bfloat16, on CUDA and on CPUs with AVX2 or AVX-512: in other dtypes the CPU's is a plain loop, slower than
unpacking the weight. The kernel has a layout of its own, which takes the stored one's place.

Dimensions: m outputs, n inputs.
"""

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compress.models.storage import LoraLinear, PackedLinear, QuantizedLinear, Storage
from compress.numerics.grids import QuantizationArgs

logger = logging.getLogger("compress")

GROUPS = (256, 128, 64, 32)  # of inputs that share a scale, which the kernel knows
OUTPUTS = {"cpu": 16, "cuda": 8}  # m is a multiple of
INPUTS = {"cpu": 32, "cuda": 128}  # n is a multiple of
TILES = 8  # of 16 inputs, which CUDA's layout keeps together
ROWS = 256  # brought into the layout at a time; it keeps 64 together at most
COLUMNS = 256  # of the weight that are made at a time for a gradient


class KernelProduct(torch.autograd.Function):
    """x W^T by the kernel, which has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: "Int4Linear") -> Tensor:
        ctx.linear = linear
        return linear.multiplied(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        n = ctx.linear.in_features
        blocks = [(start, min(start + COLUMNS, n)) for start in range(0, n, COLUMNS)]
        return torch.cat([gradient @ ctx.linear.columns(*block) for block in blocks], dim=1), None


class Int4Linear(LoraLinear):
    """A linear for torch's int4 kernel. layout: codes as it reads them. scales_and_zeros: (groups, m, 2), zeros 0."""

    kind = "kernel"
    num_bits = 4

    def __init__(self, linear: PackedLinear) -> None:
        group, storage = (
            kernel_group(linear),
            Storage("packed", QuantizationArgs(num_bits=4), input_activations=linear.inputs),
        )
        assert group is not None
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, storage, bias=False)
        self.bias, self.lora_A, self.lora_B = linear.bias, linear.lora_A, linear.lora_B
        self.group = group
        m, groups = linear.out_features, linear.in_features // group
        blocks = [linear.codes(start, min(start + ROWS, m)) for start in range(0, m, ROWS)]
        self.layout = nn.Buffer(torch.cat([as_layout(codes) for codes in blocks]))
        scale = linear.weight_scale.view(-1, 1) if linear.args.strategy == "tensor" else linear.weight_scale
        scale = scale.repeat_interleave(groups // scale.shape[1], 1).expand(m, groups).T
        self.scales_and_zeros = nn.Buffer(torch.stack([scale, torch.zeros_like(scale)], -1).contiguous())

    def without_adapter(self, x: Tensor) -> Tensor:
        y: Tensor = KernelProduct.apply(self.rounded(x), self)
        return y if self.bias is None else y + self.bias

    def multiplied(self, x: Tensor) -> Tensor:
        multiply = KERNELS[x.device.type]
        return multiply(x.contiguous(), self.layout, self.group, self.scales_and_zeros)

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns of W, (m, stop - start), as the kernel computes them from unit vectors."""
        inputs = torch.arange(start, stop, device=self.layout.device)
        units = self.scales_and_zeros.new_zeros(stop - start, self.in_features)
        return self.multiplied(units.scatter_(1, inputs[:, None], 1)).T


KERNELS = {"cpu": torch.ops.aten._weight_int4pack_mm_for_cpu, "cuda": torch.ops.aten._weight_int4pack_mm}


def as_layout(codes: Tensor) -> Tensor:
    """Order codes as the kernel reads them. codes: int8 (rows, n), from -8 to 7."""
    unsigned = codes.to(torch.int32) + 8
    if codes.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, TILES)
    pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, TILES)


def kernel_group(linear: QuantizedLinear) -> int | None:
    """The largest of the kernel's group sizes in which the linear's inputs share a scale."""
    shared = linear.in_features // linear.groups
    return next((group for group in GROUPS if shared % group == 0), None)


def problem(linear: QuantizedLinear) -> str | None:
    """Why the kernel cannot run a linear; None where it can."""
    device, dtype = linear.weight_scale.device, linear.weight_scale.dtype
    if not isinstance(linear, PackedLinear) or linear.num_bits != 4:
        return "the kernel is for packed integers of 4 bits"
    if linear.weight_zero_point is not None:
        return "the grid has zero points"
    if dtype != torch.bfloat16:
        return f"the dtype is {str(dtype).removeprefix('torch.')}, not bfloat16"
    if device.type == "cuda":
        is_fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        is_fast = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if not is_fast:
        return f"torch has no fast kernel for this {device.type}"
    outputs, inputs = OUTPUTS[device.type], INPUTS[device.type]
    if kernel_group(linear) is None or linear.out_features % outputs or linear.in_features % inputs:
        return (
            f"the kernel is for groups of {GROUPS[-1]} to {GROUPS[0]} and for multiples of {outputs} x {inputs} weights"
        )
    return None


def use_kernels(model: nn.Module) -> None:
    """Replace the linears that the kernel takes, in place; one warning says why the others stay."""
    slow: Counter[str] = Counter()
    # By name, so that each is let go of as the next one is begun.
    for path in [path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)]:
        linear = model.get_submodule(path)
        assert isinstance(linear, QuantizedLinear)
        why = problem(linear)
        if why is None and isinstance(linear, PackedLinear):
            model.set_submodule(path, Int4Linear(linear))
        else:
            slow[str(why)] += 1
    if slow:
        reasons = "; ".join(f"{count} because {why}" for why, count in slow.items())
        logger.warning("Linears without a kernel, unpacked at every call: %s.", reasons)
