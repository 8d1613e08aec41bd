"""Factorised models, out of the walk and out of the pipeline, against the methods written out on whole models."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTBigCodeConfig, PreTrainedModel

import compress
import oracles
import tiny
from compress import families, pipeline
from compress.checkpoints.dense import DenseTarget
from compress.checkpoints.lowrank import LowRankTarget
from compress.errors import UsageError
from compress.job import Job
from compress.models.decoder import Decoder
from compress.models.factors import factor_module
from compress.models.hub import find_model
from compress.models.loading import load_config
from compress.models.modeling_experts import unfuse_experts
from compress.models.modeling_lowrank import LowRankLinear, PivotLinear, factorize_architecture
from compress.needs import Room
from compress.numerics.lowrank import InputMoments
from compress.numerics.ridge import DAMPINGS
from compress.plan import Plan, make_plan
from compress.preflight import read_windows
from compress.recipe import Recipe, anchored, lowrank, parse_recipe
from compress.stages._stage import FactorisingStage, StageConfig
from compress.stages.factorize import Factorize
from compress.stages.refit import Refit
from compress.streaming.linears import LinearSite, linear_shape
from compress.streaming.loader import PartLoader
from compress.streaming.spectra import GradientFiles, LinearObserver
from compress.streaming.streams import CacheFolder, split_windows
from compress.streaming.survey import Survey, SurveyNeed, Surveyor
from compress.streaming.walk import Walk, WalkSettings
from compress.streaming.weights import LazyWeights

D, NEURONS, RANK = tiny.HIDDEN, 48, 9
WINDOWS = oracles.random_ids(8, 16, seed=2)
UNSEEN = oracles.random_ids(2, 24, seed=3)
SHALLOW = {"num_hidden_layers": 2}
# Two of eight, evenly spread.
HELD_OUT = [2, 6]
SLOW = pytest.mark.slow
PROBE = Path(__file__).with_name("stock_probe.py")
METHODS = ("anchored", "lord", "svd-llm", "asvd", "svd")
FORMS = ("factors", "pivot", "dense")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in tiny.FAMILIES},
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
}
EVERY_MODEL = pytest.mark.parametrize("variant", VARIANTS)
QUICK = ("llama", "opt", "gpt_bigcode", "gpt_neox, one after the other")
MOST_LATER = pytest.mark.parametrize(
    "variant", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in VARIANTS]
)
WITHOUT_BIASES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {},
    "phi3": {},
    "gemma": {},
    "qwen3": {},
}


@pytest.fixture(scope="module", autouse=True)
def _exact():
    with oracles.exact_norms():
        yield


Models = Callable[..., tuple[PreTrainedModel, Path]]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    """A model in memory and its folder, made once."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def make(model_type: str, **changes: Any) -> tuple[PreTrainedModel, Path]:
        key = f"{model_type} {sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            model = tiny.tiny_model(model_type, **SHALLOW | changes)
            model.save_pretrained(folder)
            made[key] = unfuse_experts(model), folder
        return made[key]

    return make


# ---- a walk ----


def survey_of(folder: Path, stages: Sequence[StageConfig], windows: Tensor) -> Survey | None:
    wanting = [stage for stage in stages if stage.survey is not SurveyNeed.NONE]
    if not wanting:
        return None
    decoder = new_decoder(folder)
    assert isinstance(wanting[0], FactorisingStage)
    observer = LinearObserver(wanting[0].watch, GradientFiles(folder), decoder)
    surveyor = Surveyor(
        decoder,
        PartLoader(decoder, LazyWeights(folder)),
        split_windows(windows, 4, held_out=0),
        CacheFolder(decoder, folder),
        memory=2**40,
        observer=observer,
    )
    return surveyor.run(gradient=SurveyNeed.GRADIENT in wanting[0].survey)


def new_decoder(folder: Path) -> Decoder:
    config = load_config(folder)
    return Decoder(config, families.find(config), dtype=torch.float64, device=torch.device("cpu"))


def walked(
    folder: Path, stages: Sequence[StageConfig], *, windows: Tensor = WINDOWS, held_out: int = 0
) -> oracles.Walked:
    target = LowRankTarget(DenseTarget(load_config(folder)))
    settings = WalkSettings(
        layout=target.layout(torch.float64),
        output_dtype=torch.float64,
        batch_size=3,
        held_out=held_out,
        probe_tokens=windows.shape[1],
        seed=7,
        cache_memory=2**40,
        scratch=folder,
    )
    survey = survey_of(folder, stages, windows)
    return oracles.finished(Walk(new_decoder(folder), LazyWeights(folder), windows, stages, settings, survey))


def reports(result: oracles.Walked) -> dict[str, dict[str, Any]]:
    """What is said of the linears, by path."""
    entries = [entry for part in result.parts for entry in part.groups if "linear" in entry]
    return {entry["linear"]: entry for entry in entries if not entry["linear"].endswith(tiny.ROUTERS)}


def written_model(model: PreTrainedModel, result: oracles.Walked) -> Any:
    """The dense model with what the walk wrote in it."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in result.tensors.items()}
    entries = {
        path: {
            "rank": entry["rank"],
            "form": entry["form"],
            "bias": f"{path}.second.bias" in tensors,
        }
        for path, entry in reports(result).items()
        if "rank" in entry and f"{path}.second.weight" in tensors
    }
    made: Any = copy.deepcopy(model)
    factorize_architecture(made, entries)
    for path, entry in reports(result).items():
        if path not in entries and "rank" in entry:
            assert f"{path}.weight" in tensors, "neither factors nor a dense linear"
    missing, unexpected = made.load_state_dict(tensors, strict=False)
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if made.config.tie_word_embeddings else set())
    return made


def same_function(a: Tensor, b: Tensor, share: float) -> None:
    assert oracles.largest_difference(a, b) < share * float(b.abs().max())


# ---- the methods, written out on a whole model ----


@dataclass
class Seen:
    """The rows that a linear is given and gives."""

    X: Tensor
    Y: Tensor


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    prefix = families.find(model.config).blocks
    return {
        f"{prefix}.{name}": module
        for name, module in model.get_submodule(prefix).named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(tiny.ROUTERS)
    }


@torch.no_grad()
def watched(model: PreTrainedModel, windows: Tensor = WINDOWS) -> dict[str, Seen]:
    """Window by window through the whole model."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda _module, inputs, output: found.setdefault(path, []).append((flat(inputs[0]), flat(output)))

    handles = [linear.register_forward_hook(note(path)) for path, linear in block_linears(model).items()]
    for ids in windows:
        model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {path: Seen(*(torch.cat(rows) for rows in zip(*pairs, strict=True))) for path, pairs in found.items()}


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def top(C: Tensor, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(C)
    return vectors[:, values.argsort(descending=True)[:rank]]


Affine = tuple[Tensor, Tensor | None]


def by_lord(linear: nn.Linear, seen: Seen, rank: int) -> Affine:
    """U of the outputs' covariance, B = U, A = U^T W, b' = U U^T b + (I - U U^T) E y."""
    W, b = linear.weight, linear.bias if linear.bias is not None else torch.zeros(len(linear.weight)).double()
    mean = seen.Y.mean(0)
    C = torch.zeros(len(W), len(W)).double()
    for y in seen.Y:
        C += torch.outer(y - mean, y - mean)
    P = top(C, rank) @ top(C, rank).T
    return P @ W, P @ b + mean - P @ mean


def by_svd(linear: nn.Linear, seen: Seen, rank: int) -> Affine:
    U, S, Vh = torch.linalg.svd(linear.weight)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank], linear.bias


def by_asvd(linear: nn.Linear, seen: Seen, rank: int) -> Affine:
    scale = torch.diag(seen.X.abs().mean(0).sqrt())
    U, S, Vh = torch.linalg.svd(linear.weight @ scale)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank] @ torch.linalg.inv(scale), linear.bias


def by_svd_llm(linear: nn.Linear, seen: Seen, rank: int) -> Affine:
    S = torch.linalg.cholesky(seen.X.T @ seen.X)
    U, sigma, Vh = torch.linalg.svd(linear.weight @ S)
    return U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank] @ torch.linalg.inv(S), linear.bias


PLAIN = {"lord": by_lord, "svd": by_svd, "asvd": by_asvd, "svd-llm": by_svd_llm}


@torch.no_grad()
def with_linears(model: PreTrainedModel, made: Mapping[str, Affine]) -> PreTrainedModel:
    """A copy of the model with other affine maps in the places of its linears."""
    other = copy.deepcopy(model)
    for path, (W, b) in made.items():
        put(other, path, W, b)
    return other


def put(model: PreTrainedModel, path: str, W: Tensor, b: Tensor | None) -> None:
    linear = nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=torch.float64)
    linear.weight = nn.Parameter(W.clone(), requires_grad=False)
    if b is not None:
        linear.bias = nn.Parameter(b.clone(), requires_grad=False)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, linear)


def written_out(model: PreTrainedModel, method: str, rank: int) -> PreTrainedModel:
    linears = block_linears(model)
    seen = watched(model)
    with torch.no_grad():
        return with_linears(model, {path: PLAIN[method](linears[path], seen[path], rank) for path in linears})


@EVERY_MODEL
def test_lord_is_its_papers_formula(variant, models):
    """Every linear by the dense model's own inputs, fused ones too."""
    model_type, changes = VARIANTS[variant]
    model, folder = models(model_type, **changes)
    result = walked(folder, [Factorize(method="lord", rank=RANK, form="factors")])
    assert {entry["rank"] for entry in reports(result).values()} == {RANK}
    assert reports(result).keys() == block_linears(model).keys()
    made, plain = written_model(model, result), written_out(model, "lord", RANK)
    expected = oracles.logits_of(plain, UNSEEN)
    same_function(oracles.logits_of(made, UNSEEN), expected, 1e-8)
    same_function(result.probe_logits, oracles.logits_of(plain, WINDOWS[:1]), 1e-8)
    # It is no small change, so that the agreement means something.
    assert oracles.largest_difference(oracles.logits_of(model, UNSEEN), expected) > 0.05
    assert sum(isinstance(module, LowRankLinear) for module in made.modules()) == len(block_linears(model))


@pytest.mark.parametrize("method", ["svd", "asvd", "svd-llm"])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox", "codegen"])
def test_other_methods_are_their_papers(method, model_type, models):
    model, folder = models(model_type)
    result = walked(folder, [Factorize(method=method, rank=RANK)])
    expected = oracles.logits_of(written_out(model, method, RANK), UNSEEN)
    same_function(oracles.logits_of(written_model(model, result), UNSEEN), expected, 1e-8)
    assert oracles.largest_difference(oracles.logits_of(model, UNSEEN), expected) > 0.05


@pytest.mark.parametrize("model_type", WITHOUT_BIASES)
def test_lord_without_its_bias_is_svd_llm(model_type, models):
    model, folder = models(model_type, **WITHOUT_BIASES[model_type])
    stages = [Factorize(method="lord", rank=RANK, bias=False), Factorize(method="svd-llm", rank=RANK)]
    lord, llm = (written_model(model, walked(folder, [stage])) for stage in stages)
    assert not any("bias" in name for name, _ in lord.named_parameters())
    same_function(oracles.logits_of(lord, UNSEEN), oracles.logits_of(llm, UNSEEN), 1e-9)


def test_what_is_said_to_be_lost_is_lost(models):
    """The share of the outputs' variance, about their mean where a bias keeps it."""
    model, folder = models("llama")
    result, seen = walked(folder, [Factorize(method="lord", rank=RANK)]), watched(model)
    for path, entry in reports(result).items():
        Y = seen[path].Y - seen[path].Y.mean(0)
        values = torch.linalg.eigvalsh(Y.T @ Y).flip(0)
        assert entry["lost"] == pytest.approx(float(values[RANK:].sum() / values.sum()), rel=1e-8)
        assert entry["full_rank"] == min(block_linears(model)[path].weight.shape)


# ---- at full rank ----


class Whole(Factorize):
    """Makes factors that are no smaller, too."""

    def is_smaller(self, linear: Any, rank: int) -> bool:
        return True


@pytest.mark.parametrize("method", METHODS)
@MOST_LATER
def test_full_rank_keeps_the_logits(variant, method, models):
    model_type, changes = VARIANTS[variant]
    model, folder = models(model_type, **changes)
    stages: list[StageConfig] = [Whole(method=method, rank_frac=1.0, form="factors")]
    result = walked(folder, [Refit(), *stages] if method == "anchored" else stages, held_out=2)
    linears = block_linears(model)
    assert {path: entry["rank"] for path, entry in reports(result).items()} == {
        path: min(linear.weight.shape) for path, linear in linears.items()
    }
    same_function(oracles.logits_of(written_model(model, result), UNSEEN), oracles.logits_of(model, UNSEEN), 1e-8)


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_bigcode"])
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_at_one_linear(model_type, method, models):
    """Factors in both forms from the linear as it is met, of every shape there is."""
    model, _ = models(model_type)
    stage = Whole(method=method, rank_frac=1.0)
    for path, seen in watched(model).items():
        linear = block_linears(model)[path]
        name = path.split(".", 3)[-1]
        moments = InputMoments(seen.X.T @ seen.X / len(seen.X), seen.X.mean(0), seen.X.abs().mean(0))
        shape = linear_shape(path, name, "mlp", linear)
        site = LinearSite(path, shape, linear, moments, put=lambda module: None)
        factors = stage.factors(site, shape.full_rank)
        # Pivots are some of the outputs, never all.
        for form in ("factors", "pivot") if shape.full_rank < shape.m else ("factors",):
            thin = factor_module(factors, form, torch.float64)
            same_function(thin(seen.X), seen.Y, 1e-9)


def test_what_would_not_be_smaller_stays_as_it_was(models):
    """3/4 of the full rank makes factors of a square no smaller, of a fused one it does; at full rank nothing does."""
    model, folder = models("gpt_neox")
    dense = model.state_dict()
    result = walked(folder, [Factorize(method="lord", rank_frac=0.75, form="factors")])
    ranks = {path: entry.get("rank") for path, entry in reports(result).items()}
    for path, rank in ranks.items():
        m, n = block_linears(model)[path].weight.shape
        # All its linears have biases, so that none is added.
        assert rank == (24 if 24 * (m + n) < m * n else None)
        if rank is None:
            assert torch.equal(result.tensors[f"model.{path}.weight"], dense[f"{path}.weight"])
    assert {*ranks.values()} == {None}
    result = walked(folder, [Factorize(method="lord", rank_frac=0.7, form="factors")])
    assert {entry.get("rank") for entry in reports(result).values()} == {None, 22}
    result = walked(folder, [Factorize(method="lord", rank_frac=1.0)])
    assert {name.removeprefix("model.") for name in result.tensors} == {
        name for name in dense if not name.endswith(("inv_freq",))
    }
    for name, tensor in result.tensors.items():
        assert torch.equal(tensor, dense[name.removeprefix("model.")])


# ---- the forms ----


@pytest.mark.slow
@pytest.mark.parametrize("method", ["anchored", "lord", "svd"])
@MOST_LATER
def test_all_forms_are_one_function(variant, method, models):
    model_type, changes = VARIANTS[variant]
    model, folder = models(model_type, **changes)
    before: list[StageConfig] = [Refit()] if method == "anchored" else []
    # A stock model has no room for added biases; without them all three have as much to say.
    options = {"bias": False} if method == "lord" else {}
    made = {
        form: written_model(
            model, walked(folder, [*before, Factorize(method=method, rank=RANK, form=form, **options)], held_out=2)
        )
        for form in FORMS
    }
    logits = {form: oracles.logits_of(each, UNSEEN) for form, each in made.items()}
    same_function(logits["pivot"], logits["factors"], 1e-8)
    same_function(logits["dense"], logits["factors"], 1e-8)
    for path, linear in block_linears(model).items():
        m, n = linear.weight.shape
        bias = 0 if linear.bias is None else m
        numbers = {form: sum(p.numel() for p in each.get_submodule(path).parameters()) for form, each in made.items()}
        assert numbers == {
            "factors": RANK * (m + n) + bias,
            "pivot": RANK * (m + n - RANK) + bias,
            "dense": m * n + bias,
        }
    assert sum(isinstance(module, PivotLinear) for module in made["pivot"].modules()) == len(block_linears(model))


# ---- anchored, written out ----


def norm_names(model: PreTrainedModel) -> list[str]:
    """Those of the stream in the order they are passed: two a block, then the final one."""
    family = families.find(model.config)
    norms = [branch.norms[0] for branch in family.branches]
    blocks = range(model.config.num_hidden_layers)
    return [f"{family.blocks}.{block}.{norm}" for block in blocks for norm in norms] + [str(family.final_norm)]


@dataclass
class Pass:
    """What one pass of all windows met: the stream before each norm, what the norm made of it, inputs of linears."""

    before: dict[str, Tensor]
    behind: dict[str, Tensor]
    inputs: dict[str, Tensor]


@torch.no_grad()
def passed(model: PreTrainedModel, windows: Tensor) -> Pass:
    found = Pass({}, {}, {})

    def note_norm(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.before[name], found.behind[name] = flat(inputs[0]), flat(output)

        return note

    def note_linear(name: str) -> Callable[..., None]:
        return lambda _module, inputs, _output: found.inputs.__setitem__(name, flat(inputs[0]))

    handles = [model.get_submodule(name).register_forward_hook(note_norm(name)) for name in norm_names(model)]
    handles += [linear.register_forward_hook(note_linear(path)) for path, linear in block_linears(model).items()]
    model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def solution(U: Tensor, T: Tensor, W0: Tensor, w: Tensor, damping: float | None) -> Tensor:
    """min sum of w ||u W - t||^2 + damping mean(diag G) ||W - W0||^2, as stacked rows."""
    if damping is None:
        return W0
    root = w.sqrt()[:, None]
    pull = (damping * (root * U).square().sum(0).mean()).sqrt()
    stacked = torch.cat([root * U, pull * torch.eye(U.shape[1]).double()])
    return torch.linalg.lstsq(stacked, torch.cat([root * T, pull * W0]), driver="gelsd").solution


def refitted(U: Tensor, T: Tensor, W0: Tensor, w: Tensor, S: Tensor, apart: Tensor) -> Tensor:
    """With the damping that is best on the windows held out, or as it was."""

    def error(W: Tensor) -> float:
        return float((w[apart] * ((U[apart] @ W - T[apart]) @ S).square().sum(1)).sum())

    solutions = [W0] + [solution(U[~apart], T[~apart], W0, w[~apart], damping) for damping in DAMPINGS]
    return min(solutions, key=error)


def ones(U: Tensor) -> Tensor:
    return torch.cat([U, torch.ones(len(U), 1).double()], dim=1)


def cut(W: Tensor, b: Tensor | None, X: Tensor, w: Tensor, rank: int, metric: Tensor | None, *, biased: bool) -> Affine:
    """The outputs' principal components, tokens counting by w; with a metric M, an error e counts e M e.

    biased: a bias holds the mean, so that only what varies about it counts.
    """
    Y, w = X @ W.T, w / w.sum()
    mean = w @ Y
    Y = Y - mean if biased else Y
    L = torch.eye(len(W)).double() if metric is None else torch.linalg.cholesky(metric)
    seen = Y @ L
    U = top(seen.T @ (w[:, None] * seen), rank)
    P = torch.linalg.inv(L.T) @ U @ U.T @ L.T
    if not biased:
        return P @ W, b
    start = torch.zeros(len(W)).double() if b is None else b
    return P @ W, start + mean - P @ mean


@torch.no_grad()
def anchored_by_hand(
    model: PreTrainedModel,
    windows: Tensor,
    rank: int,
    *,
    held_out: Sequence[int],
    metrics: Mapping[str, Tensor] | None = None,
    add_bias: bool = False,
) -> PreTrainedModel:
    """Branch by branch over a copy of the model; every time all windows pass both models from their start."""
    family, made, names = families.find(model.config), copy.deepcopy(model), norm_names(model)
    apart = torch.isin(torch.arange(len(windows)), torch.tensor(held_out)).repeat_interleave(windows.shape[1])
    dense, eps = passed(model, windows), family.epsilon(model.config)
    equal = torch.ones(len(apart)).double()

    def put_cut(path: str, W: Tensor, b: Tensor | None, X: Tensor, w: Tensor) -> None:
        metric = None if metrics is None else metrics[path]
        biased = b is not None or add_bias
        put(made, path, *cut(W, b, X, w, rank, metric, biased=biased))

    for place, norm in enumerate(names[:-1]):
        branch = family.branches[place % 2]
        prefix = norm.removesuffix(branch.norms[0])
        readers = {f"{prefix}{name}": block_linears(made)[f"{prefix}{name}"] for name in branch.readers}
        now = passed(made, windows)
        U, T = now.behind[norm], dense.behind[norm]
        biased = all(reader.bias is not None for reader in readers.values())
        identity, none = torch.eye(D).double(), torch.zeros(1, D).double()
        start = torch.cat([identity, none]) if biased else identity
        S = torch.cat([reader.weight.T for reader in readers.values()], dim=1)
        turn = refitted(ones(U) if biased else U, T, start, equal, S, apart)
        for path, reader in readers.items():
            b = reader.bias + reader.weight @ turn[-1] if biased else reader.bias
            put_cut(path, reader.weight @ turn[:D].T, b, U, equal)

        now = passed(made, windows)
        (path,) = (f"{prefix}{name}" for name in branch.writers)
        writer, X = block_linears(made)[path], now.inputs[path]
        after = dense.before[names[place + 1]]
        about = after - after.mean(1, keepdim=True) if family.norm == "layer" else after
        w = 1 / (about.square().mean(1) + eps)
        start, biased = writer.weight.T, writer.bias is not None
        if biased:
            start = torch.cat([start, writer.bias[None]])
        W = refitted(ones(X) if biased else X, after - now.before[norm], start, w, identity, apart)
        put_cut(path, W[: X.shape[1]].T, W[-1] if biased else None, X, w)

    # The head is refitted too where it is the model's own, and never cut.
    if not model.config.tie_word_embeddings:
        head, U = made.get_submodule(family.head), passed(made, windows).behind[names[-1]]
        assert isinstance(head, nn.Linear)
        biased = head.bias is not None
        start = torch.cat([identity, none]) if biased else identity
        turn = refitted(ones(U) if biased else U, dense.behind[names[-1]], start, equal, head.weight.T, apart)
        shift = head.bias + head.weight @ turn[-1] if biased else None
        put(made, family.head, head.weight @ turn[:D].T, shift)
    return made


def moments_of_gradients(model: PreTrainedModel, windows: Tensor) -> dict[str, Tensor]:
    """E g g^T of the loss's gradient by each linear's outputs, by autograd through the whole model."""
    sums: dict[str, Tensor] = {}
    for ids in windows:
        outputs: dict[str, Tensor] = {}

        def note(path: str, outputs: dict[str, Tensor] = outputs) -> Callable[..., Tensor]:
            def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                outputs[path] = output.detach().clone().requires_grad_() if not output.requires_grad else output
                return outputs[path]

            return hook

        handles = [linear.register_forward_hook(note(path)) for path, linear in block_linears(model).items()]
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        losses = [-logits[i].log_softmax(-1)[ids[i + 1]] for i in range(len(ids) - 1)]
        found = torch.autograd.grad(torch.stack(losses).sum(), list(outputs.values()))
        for path, g in zip(outputs, found, strict=True):
            for row in flat(g):
                sums[path] = sums.get(path, 0) + torch.outer(row, row) / windows.numel()
    return sums


ANCHORED = {
    "llama": ("llama", {}),
    "llama without biases": ("llama", WITHOUT_BIASES["llama"]),
    "opt": ("opt", {}),
    "opt untied": ("opt", {"tie_word_embeddings": False}),
    "gemma": ("gemma", {}),
}


@pytest.mark.parametrize("name", ANCHORED)
def test_anchored_is_refitted_and_cut_as_written_out(name, models):
    model_type, changes = ANCHORED[name]
    model, folder = models(model_type, **changes)
    result = walked(folder, [Refit(), Factorize(rank=RANK)], held_out=2)
    plain = anchored_by_hand(model, WINDOWS, RANK, held_out=HELD_OUT)
    expected = oracles.logits_of(plain, UNSEEN)
    same_function(oracles.logits_of(written_model(model, result), UNSEEN), expected, 1e-7)
    assert oracles.largest_difference(oracles.logits_of(model, UNSEEN), expected) > 0.05
    if "without" in name:
        assert not any("bias" in key for key in result.tensors)


def test_anchored_with_added_biases(models):
    model, folder = models("llama", **WITHOUT_BIASES["llama"])
    result = walked(folder, [Refit(), Factorize(rank=RANK, bias=True)], held_out=2)
    plain = anchored_by_hand(model, WINDOWS, RANK, held_out=HELD_OUT, add_bias=True)
    same_function(oracles.logits_of(written_model(model, result), UNSEEN), oracles.logits_of(plain, UNSEEN), 1e-7)


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_anchored_cuts_by_what_the_loss_feels(model_type, models):
    model, folder = models(model_type)
    result = walked(folder, [Refit(), Factorize(rank=RANK, gradient_weight=0.9)], held_out=2)
    metrics = {}
    for path, G in moments_of_gradients(model, WINDOWS).items():
        if len(G) > 2 * D:
            G = torch.diag(G.diagonal())
        metrics[path] = 0.1 * torch.eye(len(G)).double() + 0.9 * G / G.diagonal().mean()
    plain = anchored_by_hand(model, WINDOWS, RANK, held_out=HELD_OUT, metrics=metrics)
    # The gradients' moments wait in float32.
    same_function(oracles.logits_of(written_model(model, result), UNSEEN), oracles.logits_of(plain, UNSEEN), 1e-4)
    without = walked(folder, [Refit(), Factorize(rank=RANK)], held_out=2)
    assert oracles.largest_difference(result.probe_logits, without.probe_logits) > 1e-2


# ---- runs of the pipeline ----

Stages = Sequence[StageConfig | dict[str, Any]]


def recipe_of(stages: Stages, source: str, **more: Any) -> Recipe:
    calibration = {"source": source, "samples": 16, "seq_len": 16}
    return parse_recipe({"method": "test", "stages": list(stages), "calibration": calibration, **more})


def job_of(folder: Path, model_type: str, stages: Stages, *, changes: Any = None, **more: Any) -> Job:
    options = {"dtype": torch.float32, "num_hidden_layers": 1} | (changes or {})
    tiny.write_model(folder / "dense", model_type, **options)
    text = tiny.write_text(folder / "text.txt", lines=60)
    chosen = recipe_of(stages, str(text), **more)
    return Job(model=find_model(str(folder / "dense")), recipe=chosen, out=folder / "out", command="compress lord")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@contextmanager
def unproved() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify", lambda *_arguments, **_options: 0.0)
        yield


def run_unproved(job: Job) -> tuple[Plan, pipeline.Result]:
    """What was planned and what came out, and that the tensors are those of the planned architecture."""
    plan = pipeline.plan_only(job)
    with unproved():
        result = pipeline.run(job)
    file_name = plan.target.layout(torch.float32).file_name
    expected = {file_name(name): tensor.shape for name, tensor in plan.target.model(plan.shape).state_dict().items()}
    tensors = tensors_of(job.out)
    if plan.target.dense.tie_word_embeddings and "lm_head.weight" not in " ".join(tensors):
        expected = {name: shape for name, shape in expected.items() if not name.endswith("lm_head.weight")}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    return plan, result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "model_type",
    [name if name in ("llama", "qwen2", "gpt_bigcode") else pytest.param(name, marks=SLOW) for name in tiny.FAMILIES],
)
def test_what_is_planned_is_what_is_written_and_loaded(model_type, form, tmp_path):
    job = job_of(tmp_path, model_type, lowrank("lord", {"rank_frac": 0.4}, form=form), dtype="bfloat16")
    plan, result = run_unproved(job)
    tensors = tensors_of(job.out)
    assert plan.size == result.size
    assert result.size.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert {path: factors.rank for path, factors in plan.factors.items()} == (result.ranks if form != "dense" else {})
    loaded: Any = AutoModelForCausalLM.from_pretrained(job.out)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    assert result.size.parameters == parameters
    indices = {name: tensor for name, tensor in tensors.items() if not tensor.is_floating_point()}
    assert bool(indices) == (form == "pivot")
    # Indices are bytes, no parameters.
    assert result.size.bytes == 2 * parameters + 4 * sum(tensor.numel() for tensor in indices.values())
    for name, tensor in indices.items():
        assert name.endswith(".order")
        assert tensor.dtype == torch.int32
        assert sorted(tensor.tolist()) == list(range(len(tensor)))
    factored = {path for path in result.ranks if f"model.{path}.second.weight" in tensors}
    assert factored == (set() if form == "dense" else set(result.ranks))
    assert result.is_stock == (form == "dense")
    assert plan.removed == 1 - result.size.parameters / result.dense.parameters


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_bigcode", "codegen"])
@pytest.mark.slow
def test_the_pipeline_proves_it(model_type, tmp_path):
    """In a clean process of its own: with a head of its own, a tied one, blocks that return tuples."""
    job = job_of(tmp_path, model_type, lowrank("anchored", {"rank_frac": 0.5}, gradient_weight=0.9))
    result = pipeline.run(job)
    assert result.difference is not None
    assert result.difference < 1e-5
    assert result.divergence is not None
    assert result.divergence > 0


# ---- together with slicing, pruning and quantising ----


def slicing(model_type: str, rotation: str, *, width: int, keep: int | None = None, refit: bool = True) -> Stages:
    units = {"neurons": {"keep": keep}} if keep else None
    round_to = 1 if model_type in ("phi", "gpt_neox", "opt") else 4
    return anchored({"width": width}, rotation=rotation, units=units, round_to=round_to, refit=refit)


CUT: list[dict[str, Any]] = lowrank("anchored", {"rank_frac": 0.5}, refit=False)
COMPOSED: dict[str, tuple[str, str, int, int | None]] = {
    "llama": ("llama", "shared", 20, None),
    "llama, fewer neurons": ("llama", "shared", 20, 12),
    "llama, per layer": ("llama", "per-layer", 20, None),
    "llama, per layer, fewer neurons": ("llama", "per-layer", 20, 12),
    "opt": ("opt", "shared", 21, None),
    "opt, per layer, fewer neurons": ("opt", "per-layer", 21, 12),
    "qwen2, which becomes a llama": ("qwen2", "shared", 20, None),
    "phi": ("phi", "shared", 20, None),
    "phi, fewer neurons": ("phi", "shared", 21, 12),
    "starcoder2": ("starcoder2", "shared", 20, None),
    "starcoder2, a high rank": ("starcoder2", "shared", 20, None),
    "starcoder2, fewer neurons": ("starcoder2", "shared", 24, 12),
    "gemma": ("gemma", "shared", 20, None),
    "qwen3": ("qwen3", "shared", 20, None),
    "gpt_neox": ("gpt_neox", "shared", 21, 12),
    "phi3": ("phi3", "shared", 20, 12),
}


QUICK_COMPOSED = (
    "llama, fewer neurons",
    "opt, per layer, fewer neurons",
    "qwen2, which becomes a llama",
    "phi",
    "starcoder2, a high rank",
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK_COMPOSED else pytest.param(name, marks=SLOW) for name in COMPOSED]
)
def test_a_sliced_model_is_factorised_as_it_was_planned(name, tmp_path):
    model_type, rotation, width, keep = COMPOSED[name]
    # A stream of 20 channels has 18 directions in starcoder2.
    rule = {"rank": 17} if "high" in name else {"rank_frac": 0.5}
    cut_stages = lowrank("anchored", rule, refit=False)
    job = job_of(tmp_path, model_type, [*slicing(model_type, rotation, width=width, keep=keep), *cut_stages])
    plan, result = run_unproved(job)
    assert plan.size == result.size
    assert result.widths[0] == width
    assert result.ranks == {path: factors.rank for path, factors in plan.factors.items()}
    assert result.ranks


# One for each way of being written; what is planned is compared with what is written for all.
RELOADED = (
    "llama, fewer neurons",
    "llama, per layer",
    "opt",
    "qwen2, which becomes a llama",
    "phi, fewer neurons",
    "starcoder2, a high rank",
    "gpt_neox",
)


@pytest.mark.parametrize("name", RELOADED)
@pytest.mark.slow
def test_a_sliced_and_factorised_model_reloads(name, tmp_path):
    model_type, rotation, width, keep = COMPOSED[name]
    stages = [*slicing(model_type, rotation, width=width, keep=keep), *CUT]
    result = pipeline.run(job_of(tmp_path, model_type, stages))
    assert result.difference is not None
    assert result.difference < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("rotation", ["shared", "per-layer"])
def test_a_sliced_and_factorised_config_comes_back_from_json(model_type, rotation, tmp_path):
    job = job_of(tmp_path, model_type, [*slicing(model_type, rotation, width=20), *CUT])
    plan = pipeline.plan_only(job)
    config = plan.target.config(plan.shape, torch.float32)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config.to_diff_dict(), default=str), encoding="utf-8")
    again: Any = type(config).from_pretrained(tmp_path / "saved")
    assert again.to_dict() == config.to_dict()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(again)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert plan.size is not None
    assert numbers == plan.size.parameters


FULL_WIDTH = ["llama", "opt", "phi", "gemma", "qwen3", "qwen2", "phi3", "gpt_neox"]


@pytest.mark.parametrize("rotation", ["shared", "per-layer"])
@pytest.mark.parametrize(
    "model_type", [name if name in ("llama", "opt", "phi") else pytest.param(name, marks=SLOW) for name in FULL_WIDTH]
)
def test_full_width_and_full_rank_keep_the_logits(model_type, rotation, tmp_path, monkeypatch):
    """Through the pipeline, whose own walk says what the written model gives; proved elsewhere."""
    stages = [*slicing(model_type, rotation, width=D), Whole(rank_frac=1.0, form="factors")]
    job = job_of(tmp_path, model_type, stages, changes={"dtype": torch.float64})
    overheard: list[tuple[Tensor, Tensor]] = []

    def overhear(_folder: Path, ids: Tensor, logits: Tensor, **_options: Any) -> float:
        overheard.append((ids, logits))
        return 0.0

    monkeypatch.setattr(pipeline, "verify", overhear)
    result = pipeline.run(job)
    assert len(result.ranks) == len(block_linears(tiny.tiny_model(model_type, num_hidden_layers=1)))
    ((ids, logits),) = overheard
    dense = tiny.tiny_model(model_type, num_hidden_layers=1)
    same_function(logits, oracles.logits_of(dense, ids), 1e-8)


class RoundToNearest(StageConfig):
    """A toy: 4 bits a row, nothing else."""

    site: ClassVar = LinearSite
    stage: Literal["round_to_nearest"] = "round_to_nearest"
    on_dense: bool = False

    @property
    def dense_inputs(self) -> bool:
        return self.on_dense

    def apply(self, site: LinearSite) -> None:
        for linear in site.linears():
            rounded = nn.Linear(linear.shape.n, linear.shape.m, bias=linear.bias is not None)
            rounded.weight = nn.Parameter(to_nearest(linear.weight).to(linear.dtype), requires_grad=False)
            if linear.bias is not None:
                rounded.bias = nn.Parameter(linear.bias.to(linear.dtype), requires_grad=False)
            linear.replace(rounded)


def to_nearest(W: Tensor) -> Tensor:
    scale = W.abs().amax(1, keepdim=True).clamp_min(1e-30) / 7
    return (W / scale).round() * scale


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_what_is_quantised_behind_is_what_is_written(model_type, form, models):
    """By the dense model's inputs one linear's rounding is nothing to another: the same factors, rounded."""
    _, folder = models(model_type)
    stage = Factorize(method="lord", rank=RANK, form=form)
    plain = walked(folder, [stage]).tensors
    rounded = walked(folder, [stage, RoundToNearest(on_dense=True)]).tensors
    assert plain.keys() == rounded.keys()
    blocks = {name for name in plain if ".h." in name or ".layers." in name}
    weights = {name for name in blocks if name.endswith("weight") and plain[name].ndim == 2}
    assert len(weights) >= 8
    for name in plain:
        expected = to_nearest(plain[name]) if name in weights else plain[name]
        assert torch.equal(rounded[name], expected), name


def test_what_is_behind_a_quantised_linear_sees_its_error(models):
    """In the anchored walk the stream passes what was rounded, so that what comes later makes up for it."""
    model, folder = models("llama")
    stages: list[StageConfig] = [Refit(), Factorize(rank=24), RoundToNearest()]
    result = walked(folder, stages, held_out=2)
    made = written_model(model, result)
    same_function(result.probe_logits, oracles.logits_of(made, WINDOWS[:1]), 1e-9)
    before = walked(folder, stages[:2], held_out=2)
    name = "model.model.layers.0.self_attn.o_proj.first.weight"
    assert not torch.equal(result.tensors[name], to_nearest(before.tensors[name]))
    assert torch.equal(result.tensors[name], to_nearest(result.tensors[name]))


# ---- multiplied out ----


@pytest.mark.slow
def test_materialized_it_is_a_stock_model(tmp_path):
    """Loaded by stock code in a process without ours; at one function with the factors."""
    request, factors = {}, {}
    for model_type in ("llama", "gpt_bigcode", "qwen2", "phi"):
        changes = {"dtype": torch.float64}
        for form in ("dense", "pivot"):
            stages = lowrank("lord", {"rank": RANK}, form=form, bias=False)
            job = job_of(tmp_path / model_type / form, model_type, stages, changes=changes)
            run_unproved(job)
            if form == "dense":
                ids = {"ids": UNSEEN.tolist()}
                request[model_type] = {
                    "folder": str(job.out),
                    "trust": False,
                    "ids": ids,
                    "prompt": UNSEEN[:, :12].tolist(),
                }
            else:
                factors[model_type] = AutoModelForCausalLM.from_pretrained(job.out).eval()
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-I", str(PROBE), str(tmp_path / "request.json"), str(tmp_path / "answers")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "answers" / "found.json").read_text(encoding="utf-8"))
    logits = load_file(tmp_path / "answers" / "logits.safetensors")
    assert found["ours"] == []
    for model_type, model in factors.items():
        looked = found["models"][model_type]
        assert looked["module"].startswith("transformers.models.")
        assert (looked["info"], looked["said"]) == ({}, [])
        assert looked["cached"] == looked["greedy"]
        assert list((tmp_path / model_type / "dense" / "out").glob("*.py")) == []
        same_function(logits[f"{model_type}/ids"], oracles.logits_of(model, UNSEEN), 1e-8)


# ---- on a model that was trained ----

DEMO = Path(compress.__file__).parent / "assets/demo"


@pytest.mark.slow
def test_anchored_ends_nearer_to_the_dense_model_than_lord(tmp_path):
    """The stream before the final norm, on the calibration text; at the same ranks."""
    errors = {}
    dense: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    for method in ("anchored", "lord"):
        calibration = {"source": "stdlib", "samples": 24, "seq_len": 128}
        stages = lowrank(method, {"rank_frac": 0.4}, bias=False if method == "lord" else None)
        chosen = parse_recipe({"method": method, "stages": stages, "calibration": calibration})
        job = Job(model=find_model(str(DEMO)), recipe=chosen, out=tmp_path / method, command="compress lord")
        _, result = run_unproved(job)
        assert result.ranks
        windows = read_windows(job, DEMO)
        made: Any = AutoModelForCausalLM.from_pretrained(tmp_path / method, dtype=torch.float32).eval()
        there = last_stream(dense, dense.config, windows)
        here = last_stream(made.model, dense.config, windows)
        errors[method] = float((here - there).square().sum() / there.square().sum())
    assert 0 < errors["anchored"] < 0.9 * errors["lord"]


@torch.no_grad()
def last_stream(model: Any, config: Any, windows: Tensor) -> Tensor:
    found: list[Tensor] = []
    norm = model.get_submodule(families.find(config).final_norm)
    handle = norm.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].double()))
    for ids in windows.split(8):
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return torch.cat(found)


# ---- plans of the published ladder ----

STARCODER: dict[str, Any] = {
    "n_embd": 6144,
    "n_layer": 40,
    "n_head": 48,
    "n_positions": 8192,
    "vocab_size": 49152,
    "multi_query": True,
    "n_inner": 24576,
}


def starcoder_plan(stages: Stages, **more: Any) -> Plan:
    config = GPTBigCodeConfig(**STARCODER)
    calibration = {"source": "stdlib", "samples": 128, "seq_len": 2048}
    chosen = parse_recipe({"method": "lord", "stages": list(stages), "calibration": calibration, **more})
    return make_plan(
        chosen,
        config,
        families.find(config),
        dtype=torch.bfloat16,
        computing=torch.float32,
        room=Room(1, 8 * 10**9),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "billions"), [(4672, 14.92), (4480, 14.45), (4224, 13.82), (3968, 13.19), (3712, 12.56)]
)
def test_starcoders_published_sizes(rank, billions):
    """LoRD, arXiv 2309.14021, table 1: the MLPs of StarCoder 16B, two factors each."""
    rule = {"rank": rank}
    plan = starcoder_plan(lowrank("lord", rule, target=["mlp"], form="factors", multiple=1))
    assert plan.size is not None
    assert round(plan.size.parameters / 1e9, 2) == billions
    assert {factors.rank for factors in plan.factors.values()} == {rank}
    assert len(plan.factors) == 80


def test_starcoders_ranks_are_rounded_to_what_kernels_take():
    plan = starcoder_plan(lowrank("lord", {"rank_frac": 0.6042}, target=["mlp"], form="factors"))
    assert {factors.rank for factors in plan.factors.values()} == {3712}


@pytest.mark.slow
@pytest.mark.parametrize("gradient_weight", [0.0, 0.9])
def test_starcoder_fits_a_machine(gradient_weight):
    for stages in (
        lowrank("anchored", {"rank_frac": 0.6}, gradient_weight=gradient_weight),
        lowrank("lord", {"rank_frac": 0.6}),
    ):
        plan = starcoder_plan(stages)
        # The least that is there: the equations of the widest linear. The most: windows of 8192 tokens take 17 GB of
        # it on their way through a block, sums in two numbers 24, activations that stay 8.
        assert 8 * 24576**2 < plan.memory_bytes < 64e9
        assert plan.size is not None
        assert plan.disk_bytes > plan.size.bytes


# ---- what is refused, and what is told ----


def planned(model_type: str, stages: Stages, *, samples: int = 128, **more: Any) -> Plan:
    config = tiny.tiny_config(model_type)
    calibration = {"source": "stdlib", "samples": samples, "seq_len": 16}
    chosen = parse_recipe({"method": "test", "stages": list(stages), "calibration": calibration, **more})
    family = families.find(config)
    return make_plan(chosen, config, family, dtype=torch.float16, computing=torch.float32, room=Room(1, 2**30))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as error:
        call()
    return str(error.value)


HALF = {"rank_frac": 0.5}
BUDGET = {"budget": {"keep_params": 0.7, "trial_samples": 8}}
FAULTS: dict[str, tuple[Stages, dict[str, Any], str]] = {
    "a pattern of no linear": (
        lowrank("lord", HALF, target=["*.down_proj", "experts.*"]),
        {},
        "No linear matches the target 'experts.*'. There are mlp.down_proj, mlp.gate_proj, mlp.up_proj, "
        "self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj.",
    ),
    "a rank for no linear": (
        lowrank("lord", {"ranks": {"model.layers.0.mlp.down_proj": 8, "model.layers.7.mlp.down_proj": 8}}),
        {},
        "factorize gives a rank to model.layers.7.mlp.down_proj, which the model has not.",
    ),
    "two rules": (
        lowrank("lord", {"rank": 8, "rank_frac": 0.5}),
        {},
        "stages.0: factorize takes one of rank_frac, rank, ranks; got rank_frac, rank",
    ),
    "a refit beside the dense model's inputs": (
        [{"stage": "refit"}, *lowrank("lord", HALF)],
        {},
        "factorize goes by the dense model's inputs, so refit cannot be beside it; give factorize inputs: compressed",
    ),
    "a slice beside the dense model's inputs": (
        [*slicing("llama", "shared", width=20, refit=False), *lowrank("svd", HALF)],
        {},
        "factorize goes by the dense model's inputs, so fold_norms cannot be beside it; "
        "give factorize inputs: compressed",
    ),
    "widths and ranks open": (
        [*anchored({}), *lowrank("anchored", {}, refit=False)],
        BUDGET,
        "a budget is spent on widths or on ranks; tell slice how much to keep",
    ),
    "trials of lord": (
        lowrank("lord", {}, allocation="auto"),
        BUDGET,
        "stages.0: allocation auto compares by trial, which lord cannot: name an allocation",
    ),
    "no rule and no budget": (
        lowrank("lord", {}),
        {},
        "factorize is not told how much to keep; give it a ratio, or the recipe a budget",
    ),
    "a rule and a budget": (
        lowrank("lord", HALF),
        BUDGET,
        "the recipe has a budget, but every stage says how much it keeps; leave one open",
    ),
    "gradients for lord": (
        lowrank("lord", HALF, gradient_weight=0.5),
        {},
        "stages.0: gradient_weight is of method anchored, not of lord",
    ),
    "a bias for svd": (lowrank("svd", HALF, bias=True), {}, "stages.0: svd adds no bias"),
    "nothing smaller": (
        lowrank("lord", {"rank_frac": 0.9}, form="factors"),
        {},
        "No linear would be smaller in factors of these ranks. Keep less, or choose --form pivot.",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_one_short_message(name):
    stages, more, fault = FAULTS[name]
    assert refusal(lambda: planned("llama", stages, **more)) == fault


def test_two_stages_at_one_linear_are_refused_before_the_walk():
    """The second would find factors where it looks for a linear."""
    twice = lowrank("lord", HALF) + lowrank("lord", {"rank_frac": 0.25})
    fault = "Two stages would factorise self_attn.q_proj. Give each its own target."
    assert refusal(lambda: planned("llama", twice)) == fault


def test_two_stages_at_different_linears(tmp_path):
    stages = lowrank("lord", HALF, target=["attention"]) + lowrank("svd", {"rank": 7}, target=["mlp"])
    job = job_of(tmp_path, "llama", stages)
    plan, result = run_unproved(job)
    assert plan.size == result.size
    assert {rank for path, rank in result.ranks.items() if ".mlp." in path} == {7}
    assert {rank for path, rank in result.ranks.items() if ".self_attn." in path} == {8, 16}


def test_ranks_that_no_data_is_needed_for_are_refused_when_they_save_nothing():
    """Spread over the linears, too."""
    fault = refusal(lambda: planned("llama", lowrank("anchored", {"rank_frac": 1.0}, allocation="energy")))
    assert fault == "No linear would be smaller in factors of these ranks. Keep less, or choose --form pivot."


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_that_a_linear_has_not_is_refused(form):
    """Of a recipe's own ranks."""
    stages = lowrank("lord", {"ranks": {"model.layers.0.mlp.down_proj": 33}}, form=form)
    assert refusal(lambda: planned("llama", stages)) == (
        "factorize gives model.layers.0.mlp.down_proj a rank of 33, its full one is 32."
    )


def test_what_stays_dense_is_told():
    plan = planned("llama", lowrank("lord", {"rank_frac": 0.5}, form="factors"))
    assert plan.notes == [
        "Factors of this rank would be no smaller, so these stay dense: self_attn.q_proj (3 times), "
        "self_attn.o_proj (3 times)."
    ]


def test_too_little_text_is_told():
    few, enough = (planned("llama", lowrank("lord", HALF), samples=samples) for samples in (11, 12))
    (note,) = few.notes
    assert note == ("Calibration has 176 tokens for linears of 48 inputs: expect a poor fit. Use more --samples.")
    assert enough.notes == []


TARGETS: dict[str, tuple[Sequence[str], set[str]]] = {
    "attention": (["attention"], {"attn.c_attn", "attn.c_proj"}),
    "mlp": (["mlp"], {"mlp.c_fc", "mlp.c_proj"}),
    "a pattern": (["*.c_proj"], {"attn.c_proj", "mlp.c_proj"}),
    "a name": (["c_fc"], {"mlp.c_fc"}),
    "two": (["attention", "*.c_fc"], {"attn.c_attn", "attn.c_proj", "mlp.c_fc"}),
    "all": (["all"], {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name):
    target, expected = TARGETS[name]
    plan = planned("gpt_bigcode", lowrank("lord", {"rank": 8}, target=target))
    assert {path.split(".", 3)[-1] for path in plan.factors} == expected
    assert len(plan.factors) == tiny.NUM_BLOCKS * len(expected)
