"""Experts one by one: the stock block's function, the names in files, statistics and fits by their own tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import oracles
import tiny
from compress.calibration.groups import gather_experts
from compress.calibration.observers import GradientFiles, LinearObserver
from compress.calibration.processes import ALONE
from compress.calibration.rewriting import LinearRewriter
from compress.calibration.statistics import EquationSums, Regularized, regularized, rows
from compress.calibration.streams import Batch, Streams
from compress.calibration.weights import LazyWeights, PartLoader
from compress.models.branch import Branch, read_through, write_through
from compress.numerics.moments import InputMoments
from compress.numerics.ridge import NormalEquations
from compress.own_model.modeling_compress import SparseMLP, unfuse_experts
from compress.stages.factorize import Factorize
from matrices import random

pytestmark = pytest.mark.usefixtures("exact_norms")
FEW: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2},
    "deepseek_v3": {"num_experts_per_tok": 2},
}
WINDOWS = oracles.random_ids(4, 16, seed=2)
EVERY_FAMILY = pytest.mark.parametrize("model_type", tiny.SPARSE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model of each family, of which each token takes two experts of six."""
    made = {}
    for model_type in tiny.SPARSE:
        made[model_type] = tmp_path_factory.mktemp(model_type)
        tiny.tiny_model(model_type, num_hidden_layers=2, **FEW[model_type]).save_pretrained(made[model_type])
    return made


def stock_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()


@EVERY_FAMILY
@pytest.mark.parametrize("normalizes", [True, False])
@torch.no_grad()
def test_the_block_computes_what_the_stock_block_does(model_type, normalizes):
    changes = {} if model_type == "mixtral" else {"norm_topk_prob": normalizes}
    stock: Any = tiny.tiny_model(model_type, **FEW[model_type] | changes)
    ours: Any = unfuse_experts(tiny.tiny_model(model_type, **FEW[model_type] | changes))
    x = torch.randn(3, 7, tiny.HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for theirs, own in zip(stock.model.layers, ours.model.layers, strict=True):
        assert isinstance(own.mlp, SparseMLP)
        assert oracles.largest_difference(own.mlp(x), theirs.mlp(x)) < 1e-12
    assert oracles.largest_difference(oracles.logits_of(ours, WINDOWS), oracles.logits_of(stock, WINDOWS)) < 1e-12


@pytest.mark.parametrize("fused", [False, True])
@EVERY_FAMILY
def test_every_weight_is_found_whatever_files_call_it(model_type, fused, tmp_path):
    model = tiny.tiny_model(model_type, num_hidden_layers=1)
    model.save_pretrained(tmp_path, save_original_format=not fused, max_shard_size="10KB")
    weights = LazyWeights(tmp_path)
    assert any(name.endswith("mlp.experts.down_proj") for name in weights.stored.tensors) is fused
    parameters = dict(unfuse_experts(model).named_parameters())
    weights.check_against({name: parameter.shape for name, parameter in parameters.items()})
    for name, tensor in weights.read(parameters).items():
        assert torch.equal(tensor, parameters[name])


def sums_of(U: Tensor, T: Tensor | None = None, weights: Tensor | None = None) -> EquationSums:
    sums = EquationSums(U.shape[1], 0 if T is None else T.shape[1], torch.device("cpu"))
    if len(U):
        sums.add(U, T, weights=weights)
    return sums


def test_what_missing_tokens_give_is_what_the_weights_make_of_them():
    """Least squares with the missing ones stays at the weights where the given ones say nothing."""
    U, W, weights = random(2, 6), random(6, 3, seed=1), torch.tensor([[0.5], [2.0]]).double()
    sums = sums_of(U, U @ W, weights)
    filled = regularized(sums, ALONE, matrix=W)
    assert torch.allclose(torch.linalg.solve(filled.fit.G, filled.fit.B), W)
    assert filled.fit.tokens == pytest.approx(2.5 * 6 / 2)


@dataclass
class Routed:
    """Of one branch in plain loops: what each expert's linears are given, by token, and its shares."""

    x: Tensor
    shares: Tensor

    def tokens(self, number: int) -> Tensor:
        return self.shares[:, number].nonzero()[:, 0]


def routed(block: Any, x: Tensor, top_k: int, *, normalizes: bool) -> Routed:
    shares = torch.zeros(len(x), len(block.expert), dtype=torch.float64)
    if block.scores is not None:
        facts = {"weight": block.gate.weight, "hidden_dim": x.shape[1], "e_score_correction_bias": block.correction}
        facts |= {"num_group": block.scores.groups, "topk_group": block.scores.top_groups, "top_k": top_k}
        facts |= {"routed_scaling_factor": block.scores.scale, "norm_topk_prob": normalizes}
        _, best_shares, best = oracles.exact_sigmoid_router(SimpleNamespace(**facts), x)
        return Routed(x, shares.scatter_(1, best, best_shares))
    for token, given in enumerate(x):
        chance = torch.softmax(block.gate.weight @ given, dim=0)
        best = chance.argsort(descending=True)[:top_k]
        shares[token, best] = chance[best] / (chance[best].sum() if normalizes else 1)
    return Routed(x, shares)


def hidden(expert: Any, x: Tensor) -> Tensor:
    gate = expert.gate_proj(x)
    activated: Tensor = gate * torch.sigmoid(gate) * expert.up_proj(x)
    return activated


@EVERY_FAMILY
@torch.no_grad()
def test_experts_linears_are_measured_by_the_tokens_that_reach_them(model_type, folders, monkeypatch):
    """Readers by each token once, writers by what their share makes of it; filled up where they are too few."""
    given: dict[str, InputMoments] = {}
    notes: dict[str, int] = {}

    def overhear(_self: Any, _branch: Branch, block: int, names: list[str], inputs: Any, tokens: Any) -> list[Any]:
        if block == 0:
            given.update(dict.fromkeys(names, inputs))
            notes.update(dict.fromkeys(names, tokens))
        return []

    monkeypatch.setattr(LinearRewriter, "rewrite", overhear)
    walk = oracles.new_walk(folders[model_type], [Factorize(method="lord", rank=4)], WINDOWS)
    list(walk.parts())
    model = unfuse_experts(stock_model(folders[model_type]))
    block = model.model.layers[0]
    seen: list[Tensor] = []
    block.mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].flatten(0, -2)))
    model(input_ids=WINDOWS, use_cache=False)
    plain = routed(block.mlp, seen[0], 2, normalizes=model_type != "qwen2_moe")
    every = plain.x.T @ plain.x / len(plain.x)
    few = 0
    for number, expert in enumerate(block.mlp.expert):
        tokens = plain.tokens(number)
        X, n = plain.x[tokens], len(tokens)
        H = hidden(expert, X) * plain.shares[tokens, number, None]
        for name, inputs in (("gate_proj", X), ("up_proj", X), ("down_proj", H)):
            C, k = inputs.T @ inputs, inputs.shape[1]
            if n < k:
                white = torch.eye(k).double() * inputs.square().mean()
                C = C + (k - n) * (white if name == "down_proj" else every)
                few += 1
            path = f"mlp.expert.{number}.{name}"
            assert torch.allclose(given[path].second, C / max(n, k), rtol=1e-9, atol=1e-12)
            assert notes[path] == n
    assert few > 0
    assert torch.allclose(given["mlp.gate"].second, every)
    assert notes["mlp.gate"] is None


def test_an_expert_that_no_token_reaches_has_a_spectrum_of_its_weights(folders, tmp_path):
    """Of white inputs; the loss feels nothing of it."""
    watch = Factorize(gradient_weight=0.5).requires.watch
    surveyor = oracles.surveyor(
        folders["mixtral"],
        WINDOWS[:1, :2],
        observe=lambda decoder: LinearObserver(watch, GradientFiles(tmp_path), decoder),
    )
    found = surveyor.run(gradient=True).spectra
    model, reached = unfuse_experts(stock_model(folders["mixtral"])), set[str]()
    for path in found:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: reached.add(path))
    oracles.logits_of(model, WINDOWS[:1, :2])
    unreached = found.keys() - reached
    assert len(unreached) >= 3 * 2 * (6 - 4)  # linears, blocks, and two tokens reach four experts of six at most
    for path in unreached:
        assert ".expert." in path
        energies = torch.linalg.svdvals(model.get_submodule(path).weight).square()
        assert torch.allclose(found[path].energy, energies)
        assert torch.equal(found[path].felt, torch.zeros_like(energies))


class Given(Streams):
    """Streams of random numbers, the last window held out."""

    def __init__(self, stream: Tensor, dense: Tensor) -> None:
        self.processes = ALONE
        self.pairs = list(zip(stream.split(1), dense.split(1), strict=True))
        self.batches = [Batch(i, torch.zeros(1, 1).long(), i == len(stream) - 1) for i in range(len(stream))]

    def now(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        return self.pairs[batch.index]

    def update(self, branch: Branch, stream: Tensor, batch: Batch, block: int) -> Tensor:
        assert branch.run is not None
        update: Tensor = branch.run(stream, {})
        return update


@dataclass
class Problem:
    """A sparse MLP that is to take one random stream to another, in a narrower basis."""

    branch: Branch
    streams: Given
    encode: Tensor

    def equations(self, numbers: range) -> list[tuple[Regularized, NormalEquations]]:
        return gather_experts(self.branch, numbers, 0, self.streams, weigh, self.encode)

    def dense(self, batch: Batch) -> Tensor:
        dense = self.streams.now(batch)[1]
        return dense

    def lacking(self, batch: Batch) -> Tensor:
        """What is missing to the dense stream, a row a token."""
        stream, _ = self.streams.now(batch)
        return rows(self.dense(batch) @ self.encode - stream - self.streams.update(self.branch, stream, batch, 0))

    def error(self) -> float:
        """As tokens weigh, over the windows to fit on."""
        pairs = [(self.lacking(b), weigh(rows(self.dense(b)))) for b in self.streams.batches if not b.held_out]
        return float(sum((weights * lacking.square()).sum() for lacking, weights in pairs))


def weigh(t: Tensor) -> Tensor:
    return 1 / (t.square().mean(-1, keepdim=True) + 0.1)


@contextmanager
def problem(folder: Path, *, tokens: int = 40) -> Iterator[Problem]:
    decoder, width = oracles.new_decoder(folder), 20
    with torch.no_grad(), PartLoader(decoder, LazyWeights(folder)).block(0):
        branch = decoder.block_branches(0)[1]
        stream, dense = random(3, tokens, width), random(3, tokens, tiny.HIDDEN, seed=1)
        encode = torch.linalg.qr(random(tiny.HIDDEN, width, seed=2)).Q
        norm: Any = branch.norm
        norm.weight = torch.nn.Parameter(norm.weight[:width], requires_grad=False)
        read_through(branch, encode.T)
        write_through(branch, encode)
        yield Problem(branch, Given(stream, dense), encode)


@EVERY_FAMILY
def test_each_expert_is_to_make_up_for_its_share_of_what_its_tokens_lack(model_type, folders):
    """The equations, a token at a time: u = share h, t = u W0 + part r, weighing w / part."""
    with problem(folders[model_type]) as given:
        branch = given.branch
        assert branch.norm is not None
        block: Any = branch.sparse
        experts = [*block.expert, *([] if block.shared_expert is None else [block.shared_expert])]
        found = given.equations(range(len(experts)))
        expected = [(torch.zeros_like(s.fit.G), torch.zeros_like(s.fit.B)) for s, _ in found]
        seen = [0] * len(experts)
        for batch in given.streams.batches[:-1]:
            x = rows(branch.norm(given.streams.now(batch)[0]))
            shares = routed(block, x, 2, normalizes=model_type != "qwen2_moe").shares
            if len(experts) > shares.shape[1]:
                gate = block.shared_expert_gate
                everyones = torch.ones(len(x), 1) if gate is None else torch.sigmoid(gate(x))
                shares = torch.cat([shares, everyones], dim=1)
            weights = weigh(rows(given.dense(batch)))
            for token, r in enumerate(given.lacking(batch)):
                for number in shares[token].nonzero()[:, 0].tolist():
                    part = shares[token, number] / shares[token].sum()
                    u = shares[token, number] * hidden(experts[number], x[token])
                    t = u @ experts[number].down_proj.weight.T + part * r
                    expected[number][0].addr_(u, u, alpha=float(weights[token] / part))
                    expected[number][1].addr_(u, t, alpha=float(weights[token] / part))
                    seen[number] += 1
        whole = [number for number, count in enumerate(seen) if count >= 48]
        for number in whole:
            assert torch.allclose(found[number][0].fit.G, expected[number][0], rtol=1e-9)
            assert torch.allclose(found[number][0].fit.B, expected[number][1], rtol=1e-9)
        assert all(given.tokens >= count for (given, _), count in zip(found, seen, strict=True))
        assert sum(given.tokens for given, _ in found) > sum(seen)  # those held out are counted too
        for (filled, _), (G, B), count, expert in zip(found, expected, seen, experts, strict=True):
            if count < len(G):  # where too few came, the weights themselves are added
                missing = filled.fit.G - G
                assert missing.trace() > 0
                assert torch.allclose(filled.fit.B - B, missing @ expert.down_proj.weight.T)
