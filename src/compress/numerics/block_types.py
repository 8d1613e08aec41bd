"""llama.cpp's quantized types: blocks of a row's neighboring weights, stored as bytes.

    w = d q                      Q4_0, Q5_0, Q8_0, and IQ4_NL, whose q comes from a table
    w = d q + m                  Q4_1, Q5_1
    w = d sc q                   Q3_K, Q6_K, and IQ4_XS by the same table
    w = d sc q - dmin mn         Q2_K, Q4_K, Q5_K

d, m and dmin are of a block, in float16; sc and mn of a group in the block, integers of few bits. The layout of the
bytes is that of ggml (ggml-common.h; gguf's `quants.py` is the reference decoder).

Dimensions: m outputs, n inputs, a multiple of the type's `block`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Block:
    """The numbers of all blocks of a matrix.

    q: as they are stored, from 0 on; int8 of Q8_0. d, m: (blocks,), m is dmin where groups have mn. sc, mn: (blocks,
    groups). None where the type has none.
    """

    q: Int[Tensor, "blocks weights"]
    d: Float[Tensor, "blocks"]
    m: Any = None
    sc: Any = None
    mn: Any = None


def halves(x: Float[Tensor, "blocks"]) -> UInt8[Tensor, "blocks 2"]:
    return x.to(torch.float16)[:, None].view(torch.uint8)


def nibbles(q: Tensor, size: int) -> UInt8[Tensor, "blocks _"]:
    """Low nibbles of each stretch of `size`, its first half in the low ones."""
    parts = (q & 15).view(len(q), -1, 2, size // 2)
    return (parts[:, :, 0] | parts[:, :, 1] << 4).flatten(1).to(torch.uint8)


def fifth_bits(q: Tensor) -> UInt8[Tensor, "blocks 4"]:
    return (((q >> 4) & 1).view(len(q), 4, 8) << torch.arange(8, device=q.device)).sum(2).to(torch.uint8)


def planes(q: Tensor, bits: int) -> UInt8[Tensor, "blocks _"]:
    """Each byte has numbers of `bits` bits that are 32 apart, from 128 / (8 / bits) ... of each half of the block."""
    per = 8 // bits
    parts = q.view(len(q), -1, per, 32)
    shifts = bits * torch.arange(per, device=q.device)[:, None]
    return (parts << shifts).sum(2).flatten(1).to(torch.uint8)


def six_bits(sc: Tensor, mn: Tensor) -> UInt8[Tensor, "blocks 12"]:
    """Q4_K's and Q5_K's scales and minima."""
    first = sc[:, :4] | (sc[:, 4:] >> 4) << 6
    second = mn[:, :4] | (mn[:, 4:] >> 4) << 6
    third = (sc[:, 4:] & 15) | (mn[:, 4:] & 15) << 4
    return torch.cat([first, second, third], dim=1).to(torch.uint8)


def q8_0(b: Block) -> Tensor:
    return torch.cat([halves(b.d), b.q.to(torch.int8).view(torch.uint8)], dim=1)


def four_bits(b: Block) -> Tensor:
    extra = [] if b.m is None else [halves(b.m)]
    return torch.cat([halves(b.d), *extra, nibbles(b.q, 32)], dim=1)


def five_bits(b: Block) -> Tensor:
    extra = [] if b.m is None else [halves(b.m)]
    return torch.cat([halves(b.d), *extra, fifth_bits(b.q), nibbles(b.q, 32)], dim=1)


def iq4_xs(b: Block) -> Tensor:
    scales = b.sc + 32
    low = (scales[:, 0::2] & 15) | (scales[:, 1::2] & 15) << 4
    high = ((scales >> 4) << 2 * torch.arange(8, device=scales.device)).sum(1)
    high = torch.stack([high & 255, high >> 8], dim=1)
    return torch.cat([halves(b.d), high.to(torch.uint8), low.to(torch.uint8), nibbles(b.q, 32)], dim=1)


def q2_k(b: Block) -> Tensor:
    return torch.cat([(b.sc | b.mn << 4).to(torch.uint8), planes(b.q, 2), halves(b.d), halves(b.m)], dim=1)


def q3_k(b: Block) -> Tensor:
    scales = b.sc + 32
    low = (scales[:, :8] & 15) | (scales[:, 8:] & 15) << 4
    shifts = 2 * torch.arange(4, device=scales.device)[:, None]
    high = ((scales >> 4).view(-1, 4, 4) << shifts).sum(1)
    mask = ((b.q >> 2).view(len(b.q), 8, 32) << torch.arange(8, device=b.q.device)[:, None]).sum(1)
    parts = [mask.to(torch.uint8), planes(b.q & 3, 2), low.to(torch.uint8), high.to(torch.uint8), halves(b.d)]
    return torch.cat(parts, dim=1)


def q4_k(b: Block) -> Tensor:
    return torch.cat([halves(b.d), halves(b.m), six_bits(b.sc, b.mn), nibbles(b.q, 64)], dim=1)


def q5_k(b: Block) -> Tensor:
    high = ((b.q >> 4).view(len(b.q), 8, 32) << torch.arange(8, device=b.q.device)[:, None]).sum(1).to(torch.uint8)
    return torch.cat([halves(b.d), halves(b.m), six_bits(b.sc, b.mn), high, nibbles(b.q, 64)], dim=1)


def q6_k(b: Block) -> Tensor:
    parts = b.q.view(len(b.q), 2, 2, 64)  # half, pair, two stretches of 32
    low = ((parts[:, :, 0] & 15) | (parts[:, :, 1] & 15) << 4).flatten(1)
    scales = b.sc.to(torch.int8).view(torch.uint8)
    return torch.cat([low.to(torch.uint8), planes(b.q >> 4, 2), scales, halves(b.d)], dim=1)


@dataclass(frozen=True)
class BlockType:
    """One of llama.cpp's block types.

    bytes: of a block. encode: makes them. block: weights that share d. group: weights that share sc and mn; the block
        where there are none.
    lowest, highest: of the integers q. scales: the range of sc, mins: the largest mn; None where there are none.
    has_min: whether a group's weights are shifted. table: the values of q by its number.
    """

    name: str
    bytes: int
    encode: Callable[[Block], Tensor]
    block: int
    group: int
    lowest: int
    highest: int
    scales: tuple[int, int] | None = None
    mins: int | None = None
    has_min: bool = False
    table: tuple[int, ...] | None = None

    @property
    def stored(self) -> torch.dtype:
        return torch.int8

    @property
    def per_block(self) -> int:
        return self.block // self.group

    def nearest_(self, x: Tensor) -> Tensor:
        """Round to the nearest q, in place."""
        if self.table is None:
            return x.clamp_(self.lowest, self.highest).round_()
        nearest = nearest_values(self.table, x.dtype, x.device)
        places = x.mul_(2).add_(len(nearest) // 2).clamp_(0, len(nearest) - 1).to(torch.int32)
        return x.copy_(nearest.index_select(0, places.flatten()).view(x.shape))


@cache
def nearest_values(table: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "_"]:
    """The value of a table nearest to the numbers in each interval of 0.5 from -128 on; none of them changes within."""
    values = torch.tensor(table, dtype=dtype, device=device)
    middles = torch.arange(-256, 256, dtype=dtype, device=device) / 2 + 0.25
    return values[(middles[:, None] - values).abs().argmin(1)]


TYPES = {
    each.name: each
    for each in (
        BlockType("Q4_0", 18, four_bits, 32, 32, -8, 7),
        BlockType("Q4_1", 20, four_bits, 32, 32, 0, 15, has_min=True),
        BlockType("Q5_0", 22, five_bits, 32, 32, -16, 15),
        BlockType("Q5_1", 24, five_bits, 32, 32, 0, 31, has_min=True),
        BlockType("Q8_0", 34, q8_0, 32, 32, -127, 127),
        BlockType("IQ4_NL", 18, four_bits, 32, 32, 0, 15, table=IQ4_TABLE),
        BlockType("IQ4_XS", 136, iq4_xs, 256, 32, 0, 15, scales=(-32, 31), table=IQ4_TABLE),
        BlockType("Q2_K", 84, q2_k, 256, 16, 0, 3, scales=(0, 15), mins=15, has_min=True),
        BlockType("Q3_K", 110, q3_k, 256, 16, -4, 3, scales=(-32, 31)),
        BlockType("Q4_K", 144, q4_k, 256, 32, 0, 15, scales=(0, 63), mins=63, has_min=True),
        BlockType("Q5_K", 176, q5_k, 256, 32, 0, 31, scales=(0, 63), mins=63, has_min=True),
        BlockType("Q6_K", 210, q6_k, 256, 16, -32, 31, scales=(-128, 127)),
    )
}
