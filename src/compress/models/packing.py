"""Pack codes and sparsity patterns into bits."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Int32, Integer, Shaped, UInt8
from torch import Tensor

from compress.numerics.sparsity import Pattern
from compress.own_model.modeling_compress import combinations, place_bits


def pack_bits(numbers: Integer[Tensor, "rows count"], bits: int) -> UInt8[Tensor, "rows _"]:
    """Pack numbers from 0 to 2^bits - 1, in the order of `unpack_bits`."""
    eighth = math.ceil(numbers.shape[1] / 8)
    stretches = torch.nn.functional.pad(numbers, (0, 8 * eighth - numbers.shape[1])).view(-1, 8, eighth)
    planes = torch.zeros(len(numbers), bits, eighth, dtype=torch.uint8, device=numbers.device)
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        number = stretches[:, place].to(torch.int32) << shift
        for later in range(math.ceil((shift + bits) / 8)):
            planes[:, first + later] |= (number >> (8 * later) & 255).to(torch.uint8)
    return planes.flatten(1)


def pack_words(codes: Int[Tensor, "rows count"], bits: int) -> Int32[Tensor, "rows _"]:
    """Pack signed codes as compressed-tensors does: without gaps, low bits first."""
    rows, count = codes.shape
    # Of 32 numbers, which fill `bits` words, each eight are one of every stretch.
    padded = torch.nn.functional.pad(unsigned(codes, bits), (0, -count % 32)).view(rows, -1, 8)
    planes = pack_bits(padded.transpose(1, 2).flatten(1), bits)
    stream = planes.view(rows, bits, -1).transpose(1, 2).flatten()
    return stream.view(torch.int32).view(rows, -1)[:, : math.ceil(count * bits / 32)].contiguous()


def unsigned(codes: Int[Tensor, "rows count"], bits: int) -> UInt8[Tensor, "rows count"]:
    return codes.to(torch.int8).view(torch.uint8) + (1 << (bits - 1))  # wraps as negative numbers' bytes do


@dataclass(frozen=True)
class Kept:
    """The weights that a sparsity pattern keeps.

    mask: (m, n).
    """

    mask: Bool[Tensor, "m n"]
    pattern: Pattern

    def of(self, weights: Shaped[Tensor, "m n"]) -> Shaped[Tensor, "m _"]:
        """The kept weights: the first of all groups, then the second, and so on."""
        return weights[self.mask].view(len(weights), -1, int(self.pattern.keep)).transpose(1, 2).flatten(1)

    def places(self) -> UInt8[Tensor, "m _"]:
        """The index of each group's combination.

        Raises ValueError where a group does not keep as many as the pattern.
        """
        keep, group, device = int(self.pattern.keep), self.pattern.group, self.mask.device
        digits = 2 ** torch.arange(group, dtype=torch.int32, device=device)
        table = combinations(keep, group, device)
        numbers = torch.full((2**group,), -1, device=device)
        numbers[digits[table].sum(1)] = torch.arange(len(table), device=device)
        found = numbers[(self.mask.unflatten(1, (-1, group)) * digits).sum(-1)]
        if (found < 0).any():
            raise ValueError(f"a group of the mask does not keep {keep} of {group}")
        return pack_bits(found, place_bits(keep, group))
