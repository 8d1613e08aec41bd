"""Rounding to a grid against trying every number that it has."""

import pytest
import torch
from torch import Tensor

from compress.numerics.grids import FLOAT4_STEPS, FLOAT8, Grid, QuantizationArgs
from matrices import args_of, random

M, N = 4, 22
FLOATING = args_of(8, type="float")
# How many neighboring inputs share a step, how many rows have one of their own. The last group of 8 is ragged.
SHARINGS = {"tensor": (N, 1), "channel": (N, M), "groups of 8": (8, M), "groups of 11": (11, M)}
EVERY_SHARING = pytest.mark.parametrize("granularity", SHARINGS)
EVERY_KIND = pytest.mark.parametrize("kind", ["symmetric", "zero points", "finer", "float8", "finer float8"])


def all_numbers(args: QuantizationArgs) -> list[float]:
    """As they are written down: two's complement; a sign, 4 bits of exponent, 3 of mantissa."""
    if args.type == "int":
        return [float(code) for code in range(-(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1))]
    positive = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    positive += [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    positive.pop()  # of exponent 15 and mantissa 7, which is NaN
    return sorted({-x for x in positive} | set(positive))


def grid(kind: str, granularity: str, bits: int = 4, *, seed: int = 0) -> Grid:
    """With steps such that some weights of a normal distribution are clipped."""
    group, rows = SHARINGS[granularity]
    args = FLOATING if "float8" in kind else args_of(bits)
    groups = -(-N // group)
    step = (1.5 + random(rows, groups, seed=seed).abs()) / args.highest
    finer = torch.where(random(N, seed=seed + 1) > 0, 2.0, 1.0).double() if "finer" in kind else None
    zero = None
    if kind == "zero points":
        low, high = int(args.lowest), int(args.highest)
        zero = torch.randint(low, high + 1, step.shape, generator=torch.Generator().manual_seed(seed)).double()
    return Grid(args, group, step, zero, finer)


def choices(made: Grid, row: int, column: int) -> Tensor:
    """Every value that this weight can take."""
    place = min(row, len(made.step) - 1), column // made.group_size
    zero = 0.0 if made.zero is None else float(made.zero[place])
    finer = 1.0 if made.finer is None else float(made.finer[column])
    return (torch.tensor(all_numbers(made.kind)).double() - zero) * made.step[place] / finer


def assert_nearest(found: Tensor, made: Grid, W: Tensor) -> None:
    for row in range(W.shape[0]):
        for column in range(W.shape[1]):
            values, w = choices(made, row, column), W[row, column]
            assert (values - found[row, column]).abs().min() <= 1e-14 * values.abs().max()
            best = (values - w).abs().min()
            # torch rounds to 8-bit floats by way of 32 bits: what lies within those of halfway may go either way.
            assert (found[row, column] - w).abs() <= best + (1e-6 * w.abs() if made.kind is FLOATING else 1e-14)


def weights(made: Grid, *, seed: int = 5) -> Tensor:
    """Normal, very small and far outside."""
    W = random(M, N, seed=seed)
    W[0, :4] *= 1e-3
    W[1, 3:6] *= 100
    W[2, 7] = 0
    return W


def test_the_numbers_are_those_of_torch():
    table = torch.arange(256).to(torch.uint8).view(FLOAT8).double()
    assert all_numbers(FLOATING) == sorted(set(table[table.isfinite()].tolist()))
    assert (FLOATING.lowest, FLOATING.highest) == (-448, 448)


@EVERY_SHARING
@EVERY_KIND
def test_nearest_is_the_nearest_of_all_values(kind, granularity):
    for bits in (4,) if "float8" in kind else (2, 3, 8):
        made = grid(kind, granularity, bits)
        W = weights(made)
        assert_nearest(made.nearest(W), made, W)


def test_float8_numbers_come_back_and_what_is_between_goes_to_the_nearer():
    table = torch.tensor(all_numbers(FLOATING)).double()
    made = Grid(FLOATING, 1, torch.ones(1, 1).double())
    assert torch.equal(made.nearest(table[:, None])[:, 0], table)
    gaps = table.diff()
    assert torch.equal(made.nearest((table[:-1] + 0.49 * gaps)[:, None])[:, 0], table[:-1])
    assert torch.equal(made.nearest((table[:-1] + 0.51 * gaps)[:, None])[:, 0], table[1:])


@EVERY_SHARING
@EVERY_KIND
def test_codes_and_values_go_round(kind, granularity):
    made = grid(kind, granularity)
    W = weights(made)
    codes = made.codes(W)
    assert codes.dtype == (FLOAT8 if "float8" in kind else torch.int8)
    assert codes.shape == W.shape
    assert set(codes.double().flatten().tolist()) <= set(all_numbers(made.kind))
    values = made.values(codes)
    assert torch.equal(values, made.nearest(W))
    assert torch.equal(made.codes(values).double(), codes.double())
    assert torch.equal(made.nearest(values), values)


@pytest.mark.parametrize(
    "ours",
    [args_of(4), args_of(2, "tensor"), args_of(3, 16, symmetric=False), args_of(8, type="float")]
    + [args_of(4, group, type="float") for group in FLOAT4_STEPS],
    ids=lambda ours: f"{ours.precision}, {ours.strategy}",
)
def test_settings_are_those_of_compressed_tensors(ours):
    theirs = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(**ours.model_dump())
    assert {name: getattr(theirs, name) for name in ours.model_dump()} == ours.model_dump()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "group"}, "strategy group and a group_size go together"),
        ({"strategy": "channel", "group_size": 8}, "strategy group and a group_size go together"),
        ({"type": "float"}, "floats have 8 bits"),
        ({"type": "float", "group_size": 64}, "floats have 8 bits"),
        ({"strategy": "tensor_group", "group_size": 16}, "tensor_group is that of nvfp4"),
        ({"strategy": "group", "type": "float", "group_size": 16}, "tensor_group is that of nvfp4"),
        ({"strategy": "block"}, "strategy block is of fp8 weights"),
        ({"num_bits": 8, "type": "float", "symmetric": False}, "fp8 is symmetric"),
        ({"num_bits": 9}, "less than or equal to 8"),
        ({"bits": 4}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_no_format_has_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        QuantizationArgs(**settings)
