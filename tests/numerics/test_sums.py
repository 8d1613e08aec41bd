"""Float64 sums of float32 products against products in float64; and what of a walk is in float64 at all."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracles
import tiny
from compress.calibration.processes import ALONE
from compress.calibration.statistics import EquationSums
from compress.numerics.sums import GramSum
from compress.stages.groups import Refit
from compress.stages.stream import MeasureError

CPU = torch.device("cpu")
WIDTH = 300  # more than one block of rows
TOKENS = 5000  # more than one product


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ill_conditioned() -> Tensor:
    """Of condition 1e6, in no channel's direction."""
    turn, _ = torch.linalg.qr(random(WIDTH, WIDTH, seed=1))
    return random(TOKENS, WIDTH) @ (torch.logspace(0, -6, WIDTH)[:, None] * turn)


def with_massive_activations() -> Tensor:
    """As large models have them: at one token, in few channels."""
    X = random(TOKENS, WIDTH)
    X[17, 3:5] *= 1000
    return X


def with_a_massive_token() -> Tensor:
    X = random(TOKENS, WIDTH)
    X[17] *= 1000
    return X


INPUTS: list[Callable[[], Tensor]] = [
    lambda: random(TOKENS, WIDTH),
    ill_conditioned,
    with_massive_activations,
    with_a_massive_token,
]


def gram(X: Tensor) -> Tensor:
    total = GramSum(X.shape[1], CPU)
    for batch in X.split(1700):
        total.add(batch)
    return total.close()


@pytest.mark.parametrize("inputs", INPUTS, ids=["random", "ill-conditioned", "massive activations", "massive token"])
def test_a_gram_matrix_is_as_good_in_each_entry_as_float32_products_are(inputs):
    X = inputs()
    found, exact = gram(X), X.double().T @ X.double()
    assert (found - exact).norm() < 1e-6 * exact.norm()
    size = exact.diagonal().sqrt()
    assert ((found - exact).abs() / torch.outer(size, size)).max() < 3e-6


def test_equations_count_tokens_by_their_weights():
    U, T, weights = random(TOKENS, 40), random(TOKENS, 9, seed=1), random(TOKENS, 1, seed=2).exp()
    found, place = EquationSums(40, 9, CPU), slice(3000, None)
    found.add(U[:3000], T[:3000], weights=weights[:3000])
    found.add(U[place], T[place].double(), weights=weights[place], held_out=True)
    u, t, w = U.double(), T.double(), weights.double()
    for equations, rows in ((found.equations(ALONE), slice(3000)), (found.equations(ALONE, held_out=True), place)):
        exact = (w[rows] * u[rows]).T
        assert (equations.G - exact @ u[rows]).norm() < 1e-6 * (exact @ u[rows]).norm()
        assert (equations.B - exact @ t[rows]).norm() < 1e-6 * exact.norm() * t[rows].norm()
        assert equations.tokens == pytest.approx(float(w[rows].sum()), rel=1e-6)
    inputs = found.inputs(ALONE)
    assert torch.allclose(inputs.total, (w * u).sum(0), rtol=1e-6, atol=1e-6 * float((w * u.abs()).sum(0).max()))
    assert torch.allclose(inputs.absolute, (w * u.abs()).sum(0), rtol=1e-6)
    assert (found.fitted, found.seen) == (3000, TOKENS)


WINDOWS = oracles.random_ids(14, 13, seed=2)
BATCH = 7


class NoDoubleByToken(TorchDispatchMode):
    """Fails at a float64 tensor that has a row for each token of a batch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                shape, by_window = tuple(tensor.shape), (BATCH, WINDOWS.shape[1])
                assert math.prod(by_window) not in shape, f"{func}: {shape}"
                assert by_window != shape[:2], f"{func}: {shape}"
        return found


@pytest.mark.parametrize("model_type", ["llama", "opt", "mixtral"])
def test_nothing_that_grows_with_the_tokens_is_in_float64_in_a_walk(model_type, tmp_path):
    tiny.tiny_model(model_type).save_pretrained(tmp_path)
    stages = [*oracles.slicegpt({"ratio": 0.25}, signal="normed", stream="dense"), Refit(), MeasureError()]
    walk = oracles.new_walk(tmp_path, stages, WINDOWS, dtype=torch.float32, batch_size=BATCH, held_out=BATCH)
    with NoDoubleByToken():
        assert list(walk.parts())[-1].divergence > 0
