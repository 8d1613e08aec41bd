"""Factorized models out of the walk, against the methods written out on whole models."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import oracles
import tiny
from compress import families
from compress.architectures.own import as_own
from compress.architectures.stock import Stock
from compress.calibration.observers import GradientFiles, LinearObserver
from compress.calibration.survey import SurveyNeed
from compress.models.loading import load_config
from compress.own_model.modeling_compress import LowRankLinear, PivotLinear, factorize_linears
from compress.stages._stage import StageConfig
from compress.stages.factorize import Factorize
from compress.stages.groups import Refit
from factorizing import FORMS, RANK, Whole, block_linears, reports, same_function

pytestmark = pytest.mark.usefixtures("exact_norms")
D, NEURONS = tiny.HIDDEN, 48
WINDOWS = oracles.random_ids(8, 16, seed=2)
UNSEEN = oracles.random_ids(2, 24, seed=3)
HELD_OUT = [6, 7]
METHODS = ("anchored", "lord", "svd-llm", "asvd", "svd")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("opt", "phi3", "gpt_bigcode", "mixtral")},
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
}
EVERY_MODEL = pytest.mark.parametrize("variant", VARIANTS)
WITHOUT_BIASES = {"attention_bias": False, "mlp_bias": False}


def walked(folder: Path, stages: Sequence[StageConfig], *, held_out: int = 0) -> Any:
    """Its survey is in `folder`."""
    config, survey = load_config(folder), None
    wanting = [stage.requires for stage in stages if stage.requires.survey is not SurveyNeed.NONE]
    if wanting:
        watch = wanting[0].watch
        surveyor = oracles.surveyor(
            folder, WINDOWS, observe=lambda decoder: LinearObserver(watch, GradientFiles(folder), decoder)
        )
        survey = surveyor.run(gradient=SurveyNeed.GRADIENT in wanting[0].survey)
    layout = as_own(Stock(config, families.find(config))).layout(torch.float64)
    return oracles.walked(folder, stages, WINDOWS, held_out=held_out, layout=layout, survey=survey)


def written_model(model: PreTrainedModel, result: oracles.Walked) -> Any:
    """The dense model with what the walk wrote in it."""
    tensors = dict(result.tensors)
    entries = {
        path: {"rank": entry["rank"], "form": entry["form"], "bias": f"{path}.second.bias" in tensors}
        for path, entry in reports(result).items()
        if "rank" in entry and f"{path}.second.weight" in tensors
    }
    made: Any = copy.deepcopy(model)
    factorize_linears(made, entries)
    for path, entry in reports(result).items():
        if path not in entries and "rank" in entry:
            assert f"{path}.weight" in tensors, "neither factors nor a dense linear"
    missing, unexpected = made.load_state_dict(tensors, strict=False)
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if made.config.tie_word_embeddings else set())
    return made


def top(C: Tensor, rank: int) -> Tensor:
    values, vectors = torch.linalg.eigh(C)
    return vectors[:, values.argsort(descending=True)[:rank]]


Affine = tuple[Tensor, Tensor | None]


def by_lord(linear: nn.Linear, Y: Tensor, rank: int) -> Affine:
    """U of the outputs' covariance, B = U, A = U^T W, b' = U U^T b + (I - U U^T) E y."""
    W, b = linear.weight, linear.bias if linear.bias is not None else torch.zeros(len(linear.weight)).double()
    mean = Y.mean(0)
    C = torch.zeros(len(W), len(W)).double()
    for y in Y:
        C += torch.outer(y - mean, y - mean)
    P = top(C, rank) @ top(C, rank).T
    return P @ W, P @ b + mean - P @ mean


def put(model: PreTrainedModel, path: str, W: Tensor, b: Tensor | None) -> None:
    linear = nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=torch.float64)
    linear.weight = nn.Parameter(W.clone(), requires_grad=False)
    if b is not None:
        linear.bias = nn.Parameter(b.clone(), requires_grad=False)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, linear)


@torch.no_grad()
def written_out(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """By LoRD, in a copy; the formulas of the other methods are in test_lowrank.py."""
    other, linears = copy.deepcopy(model), block_linears(model)
    for path, (_, Y) in oracles.passed_through(model, linears, WINDOWS).items():
        put(other, path, *by_lord(linears[path], Y, rank))
    return other


@EVERY_MODEL
def test_lord_is_its_papers_formula(variant, models):
    """Every linear by the dense model's own inputs, fused ones too."""
    model_type, changes = VARIANTS[variant]
    model, folder = models(model_type, **changes)
    result = walked(folder, [Factorize(method="lord", rank=RANK, form="factors")])
    assert {entry["rank"] for entry in reports(result).values()} == {RANK}
    assert reports(result).keys() == block_linears(model).keys()
    made, plain = written_model(model, result), written_out(model, RANK)
    expected = oracles.logits_of(plain, UNSEEN)
    same_function(oracles.logits_of(made, UNSEEN), expected, 1e-8)
    same_function(result.probe_logits, oracles.logits_of(plain, WINDOWS[:1]), 1e-8)
    # It is no small change, so that the agreement means something.
    assert oracles.largest_difference(oracles.logits_of(model, UNSEEN), expected) > 0.05
    assert sum(isinstance(module, LowRankLinear) for module in made.modules()) == len(block_linears(model))


@pytest.mark.parametrize(("variant", "method"), [*zip(VARIANTS, METHODS, strict=True)])
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


@pytest.mark.parametrize(("variant", "method"), [("opt", "anchored"), ("gpt_bigcode", "lord")])
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


def norm_names(model: PreTrainedModel) -> list[str]:
    """Those of the stream in the order they are passed: two a block, then the final one."""
    family = families.find(model.config)
    norms = [branch.norms[0] for branch in family.branches]
    blocks = range(model.config.num_hidden_layers)
    return [f"{family.blocks}.{block}.{norm}" for block in blocks for norm in norms] + [str(family.final_norm)]


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
    model: PreTrainedModel, *, metrics: Mapping[str, Tensor] | None = None, add_bias: bool = False
) -> PreTrainedModel:
    """Branch by branch over a copy of the model; every time all windows pass both models from their start."""
    windows, rank = WINDOWS, RANK
    family, made, names = families.find(model.config), copy.deepcopy(model), norm_names(model)

    def passed(model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
        return oracles.passed_through(model, [*names, *block_linears(model)], windows)

    apart = torch.isin(torch.arange(len(windows)), torch.tensor(HELD_OUT)).repeat_interleave(windows.shape[1])
    dense, eps = passed(model), family.epsilon(model.config)
    equal = torch.ones(len(apart)).double()

    def put_cut(path: str, W: Tensor, b: Tensor | None, X: Tensor, w: Tensor) -> None:
        metric = None if metrics is None else metrics[path]
        biased = b is not None or add_bias
        put(made, path, *cut(W, b, X, w, rank, metric, biased=biased))

    for place, norm in enumerate(names[:-1]):
        branch = family.branches[place % 2]
        prefix = norm.removesuffix(branch.norms[0])
        readers = {f"{prefix}{name}": block_linears(made)[f"{prefix}{name}"] for name in branch.readers}
        now = passed(made)
        U, T = now[norm][1], dense[norm][1]
        biased = all(reader.bias is not None for reader in readers.values())
        identity, none = torch.eye(D).double(), torch.zeros(1, D).double()
        start = torch.cat([identity, none]) if biased else identity
        S = torch.cat([reader.weight.T for reader in readers.values()], dim=1)
        _, turn = oracles.refitted(ones(U) if biased else U, T, start, equal, S, apart)
        for path, reader in readers.items():
            b = reader.bias + reader.weight @ turn[-1] if biased else reader.bias
            put_cut(path, reader.weight @ turn[:D].T, b, U, equal)

        now = passed(made)
        (path,) = (f"{prefix}{name}" for name in branch.writers)
        writer, X = block_linears(made)[path], now[path][0]
        after = dense[names[place + 1]][0]
        about = after - after.mean(1, keepdim=True) if family.norm == "layer" else after
        w = 1 / (about.square().mean(1) + eps)
        start, biased = writer.weight.T, writer.bias is not None
        if biased:
            start = torch.cat([start, writer.bias[None]])
        _, W = oracles.refitted(ones(X) if biased else X, after - now[norm][0], start, w, identity, apart)
        put_cut(path, W[: X.shape[1]].T, W[-1] if biased else None, X, w)

    # The head is refitted too where it is the model's own, and never cut.
    if not model.config.tie_word_embeddings:
        head, U = made.get_submodule(family.head), passed(made)[names[-1]][1]
        assert isinstance(head, nn.Linear)
        biased = head.bias is not None
        start = torch.cat([identity, none]) if biased else identity
        T = dense[names[-1]][1]
        _, turn = oracles.refitted(ones(U) if biased else U, T, start, equal, head.weight.T, apart)
        shift = head.bias + head.weight @ turn[-1] if biased else None
        put(made, family.head, head.weight @ turn[:D].T, shift)
    return made


ANCHORED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama without biases": ("llama", WITHOUT_BIASES, {}),
    "llama, biases added": ("llama", WITHOUT_BIASES, {"bias": True}),
    "opt": ("opt", {}, {}),
}


@pytest.mark.parametrize("name", ANCHORED)
def test_anchored_is_refitted_and_cut_as_written_out(name, models):
    model_type, changes, options = ANCHORED[name]
    model, folder = models(model_type, **changes)
    result = walked(folder, [Refit(), Factorize(rank=RANK, **options)], held_out=2)
    expected = oracles.logits_of(anchored_by_hand(model, add_bias=bool(options)), UNSEEN)
    same_function(oracles.logits_of(written_model(model, result), UNSEEN), expected, 1e-7)
    assert oracles.largest_difference(oracles.logits_of(model, UNSEEN), expected) > 0.05
    assert any("bias" in key for key in result.tensors) == (changes == {} or bool(options))


def test_anchored_cuts_by_what_the_loss_feels(models):
    """The gradients' moments are those of the survey, which test_lowrank_survey.py takes by autograd."""
    model, folder = models("llama")
    result = walked(folder, [Refit(), Factorize(rank=RANK, gradient_weight=0.9)], held_out=2)
    metrics = {}
    for file in folder.glob("finding-gradients-*.safetensors"):
        for path, moment in load_file(file).items():
            G = moment.double() if moment.ndim == 2 else torch.diag(moment.double())
            metrics[path] = 0.1 * torch.eye(len(G)).double() + 0.9 * G / G.diagonal().mean()
    plain = anchored_by_hand(model, metrics=metrics)
    # The gradients' moments wait in float32.
    same_function(oracles.logits_of(written_model(model, result), UNSEEN), oracles.logits_of(plain, UNSEEN), 1e-4)
    without = walked(folder, [Refit(), Factorize(rank=RANK)], held_out=2)
    assert oracles.largest_difference(result.probe_logits, without.probe_logits) > 1e-2
