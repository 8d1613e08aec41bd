"""llama.cpp's types: bytes as gguf decodes them, scales better than its own, and what tensors get in a file."""

import pytest
import torch

from compress.architectures.gguf_types import FileType
from compress.numerics.block_grid import BlockGrid, ScaleDescent, fit_blocks, polished
from compress.numerics.block_types import IQ4_TABLE, TYPES
from compress.numerics.moments import Hessian
from compress.numerics.sweep import sweep
from matrices import random

gguf = pytest.importorskip("gguf")
M, N = 12, 512
EVERY_TYPE = pytest.mark.parametrize("name", TYPES)


def weights(kind: str) -> torch.Tensor:
    W = random(M, N, seed=1).float() * 0.02
    if kind == "zeros":
        return torch.zeros(M, N)
    if kind == "constant":
        return torch.full((M, N), -0.3)
    if kind == "outliers":
        W[:, ::37] *= 40
    if kind == "zero groups":
        W[:, 64:192] = 0
    if kind == "large":
        W *= 1e5
    return W


def decoded(grid: BlockGrid, W: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(grid.encoded(W).numpy(), gguf.GGMLQuantizationType[grid.kind.name]).copy())


def hessian() -> Hessian:
    mixing = random(N, N, seed=3) / N**0.5 + torch.eye(N)
    return Hessian(mixing @ torch.linspace(0.1, 3, N).double().diag() @ mixing.T, 0.01, "inputs")


def loss(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> float:
    missed = (W - Q).double()
    return float((missed @ H * missed).sum())


@EVERY_TYPE
def test_bytes_are_decoded_as_the_values_that_were_meant(name):
    for kind in ("usual", "zeros", "constant", "outliers", "zero groups", "large"):
        W = weights(kind)
        grid = fit_blocks(W, TYPES[name])
        values = grid.dequantized(W)
        assert grid.encoded(W).shape == (M, N // TYPES[name].block * TYPES[name].bytes)
        assert torch.equal(decoded(grid, W), values)
        assert torch.isfinite(values).all()
        assert torch.allclose(values, grid.nearest(W), rtol=1e-5, atol=1e-6 * float(W.abs().max()) + 1e-9)
        assert float((values - W).abs().max()) <= 0.35 * float(W.abs().max()) + 1e-7


@EVERY_TYPE
def test_scales_are_better_than_ggufs(name):
    W = weights("usual")
    error = float((fit_blocks(W, TYPES[name]).dequantized(W) - W).square().mean() / W.square().mean())
    try:
        theirs = gguf.quantize(W.numpy(), gguf.GGMLQuantizationType[name])
    except NotImplementedError:
        # What libgguf, a port of ggml's encoders, leaves of Gaussian weights.
        bounds = {"IQ4_NL": 0.0058, "IQ4_XS": 0.0058, "Q2_K": 0.072, "Q3_K": 0.0213, "Q4_K": 0.0051, "Q5_K": 0.0014}
        assert error < {**bounds, "Q6_K": 0.0004}[name]
    else:
        back = torch.from_numpy(gguf.dequantize(theirs, gguf.GGMLQuantizationType[name]).copy())
        assert error < float((back - W).square().mean() / W.square().mean())


@EVERY_TYPE
def test_weights_of_inputs_count_in_the_fit(name):
    W, importance = weights("usual"), torch.ones(N)
    importance[::3] = 30.0
    plain, weighed = fit_blocks(W, TYPES[name]), fit_blocks(W, TYPES[name], importance)

    def error(grid: BlockGrid) -> float:
        return float(((grid.nearest(W) - W).square() * importance).sum())

    assert error(weighed) < error(plain)


@EVERY_TYPE
def test_refitted_scales_never_lose_and_can_be_stored(name):
    W, H = weights("usual")[:4], hessian()
    grid = fit_blocks(W, TYPES[name], H.damped.diagonal())
    Q, _ = sweep(W, H, grid=grid, actorder=True)
    damped = H.damped.to(W.dtype)
    slope = damped @ (W - Q).T
    before = slope.norm()
    descent = ScaleDescent(Q.T, slope, damped, grid)
    better, refitted = Q + descent.run().T, descent.grid()
    assert (slope - damped @ (W - better).T).norm() < 1e-5 * before
    assert loss(W, Q, H.damped) < loss(W, grid.nearest(W), H.damped)
    assert loss(W, better, H.damped) <= loss(W, Q, H.damped)
    assert torch.equal(refitted._codes(better), grid._codes(Q))
    assert torch.equal(decoded(refitted, better), refitted.dequantized(better))
    assert torch.allclose(refitted.dequantized(better), better, rtol=1e-4, atol=1e-6)
    again, _ = polished(Q, W, H, grid, rounds=2)
    assert loss(W, again, H.damped) <= loss(W, better, H.damped)


@EVERY_TYPE
def test_rows_stack_and_come_apart(name):
    parts = [weights("usual"), weights("outliers")]
    grids = [fit_blocks(W, TYPES[name]) for W in parts]
    stacked = BlockGrid.stacked(grids)
    for W, grid, start in zip(parts, grids, (0, M), strict=True):
        same = stacked.rows(start, start + M).to(torch.float64)
        assert torch.equal(same.encoded(W.double()), grid.encoded(W))


def test_the_nearest_value_of_a_table_is_found():
    x = torch.cat([torch.linspace(-140, 130, 5401), torch.tensor([-1e6, 1e6])])
    found = TYPES["IQ4_NL"].nearest_(x.clone())
    distances = (x[:, None] - torch.tensor(IQ4_TABLE, dtype=x.dtype)).abs()
    assert torch.allclose((x - found).abs(), distances.amin(1), rtol=0, atol=1e-4)


MAPS = {
    ("Q4_K_M", "blk.0.attn_v", 256): "Q6_K",
    ("Q4_K_M", "blk.4.attn_v", 256): "Q6_K",
    ("Q4_K_M", "blk.5.ffn_down", 512): "Q4_K",
    ("Q4_K_M", "blk.4.attn_q", 576): "Q5_0",
    ("Q4_K_M", "token_embd", 256): "Q6_K",
    ("Q4_K_M", "token_embd", 576): "Q8_0",
    ("Q3_K_S", "blk.3.ffn_up", 576): "IQ4_NL",
    ("Q3_K_S", "blk.3.ffn_down", 1536): "Q3_K",
    ("Q3_K_M", "blk.0.ffn_down", 256): "Q5_K",
    ("Q2_K", "blk.9.attn_output", 256): "Q3_K",
    ("Q5_K_M", "blk.3.ffn_up", 576): "Q5_1",
    ("Q4_0", "blk.0.ffn_down", 64): "Q4_1",
    ("Q4_0", "blk.9.ffn_down", 64): "Q4_0",
    ("Q8_0", "token_embd", 256): "Q8_0",
    ("Q6_K", "blk.3.ffn_up", 48): "F16",
    ("Q4_K_M,attn_q=Q8_0", "blk.4.attn_q", 256): "Q8_0",
    ("Q4_K_M,attn_q=Q8_0,blk.4.*=Q2_K", "blk.4.attn_q", 256): "Q2_K",
}


def test_tensors_get_the_types_that_llama_quantize_gives_them():
    of = {case: FileType.parse(case[0]).of(*case[1:], blocks=16, queries=3, tied=True) for case in MAPS}
    assert of == MAPS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Q4_KM", ["'Q4_KM'", "Did you mean 'Q4_K_M'?"]),
        ("Q4_K_M,attn_v", ["'attn_v' is no PATTERN=TYPE"]),
        ("Q4_K_M,attn_v=Q7_K", ["'Q7_K'", "Available: "]),
        ("", ["''"]),
    ],
)
def test_a_type_that_does_not_exist_is_named(text, words):
    with pytest.raises(ValueError, match=r"type|TYPE") as raised:
        FileType.parse(text)
    assert all(word in str(raised.value) for word in words)
