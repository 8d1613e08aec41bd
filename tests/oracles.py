"""Slow, obvious references: exact norms, SliceGPT written out from the paper, and a walk held in memory."""

import copy
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import families
from compress.architectures.architecture import ModelSpec
from compress.architectures.own import Own
from compress.calibration.observers import LinearObserver
from compress.calibration.streams import CacheFolder, split_windows
from compress.calibration.survey import Survey, Surveyor
from compress.calibration.walk import FinishedPart, Walk, WalkSettings
from compress.calibration.weights import Layout, LazyWeights, PartLoader
from compress.families import Family
from compress.models.decoder import Decoder
from compress.models.loading import load_config
from compress.own_model.modeling_compress import CompressForCausalLM
from compress.stages._stage import StageConfig
from compress.stages.stream import FoldNorms, Rotate, Slice
from tiny import VOCAB_SIZE

UNLIMITED = 2**40


def kinds(ending: str, models: str) -> list[Any]:
    """Classes of transformers' modeling files by the end of their names."""
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in models.split()]
    found = [(kind, module) for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    return [kind for kind, module in found if kind.__module__ == module.__name__ and kind.__name__.endswith(ending)]


RMS_NORMS = kinds(
    "RMSNorm",
    "llama mistral qwen2 qwen3 phi3 granite smollm3 ministral glm glm4 olmo2 olmo3 mixtral qwen2_moe qwen3_moe "
    "granitemoehybrid llama4 deepseek_v3",
)
RMS_PLUS_ONE_NORMS = kinds("RMSNorm", "gemma gemma2 gemma3 qwen3_5")
COHERE = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in ("cohere", "cohere2")]


def exact_rms_norm(norm: Any, x: Tensor) -> Tensor:
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps  # only Llama 4 calls it so
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def exact_l2_norm(norm: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)


def exact_complex_rotation(q: Tensor, k: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, :, None, :]).flatten(3).to(x.dtype)

    return turned(q), turned(k)


def exact_rms_plus_one_norm(norm: Any, x: Tensor) -> Tensor:
    return (1 + norm.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)


def exact_cohere_norm(norm: Any, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def exact_olmo_norm(norm: Any, x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, norm.normalized_shape, eps=1e-5)


def exact_cohere_rotation(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x: Tensor) -> Tensor:
        return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin

    return turned(q), turned(k)


def exact_attention(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(-1, -2)
    weights = torch.softmax((scores if mask is None else scores + mask) / attention.scale_attn, dim=-1)
    return weights @ value, weights


def exact_router(router: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = x.reshape(-1, router.hidden_dim) @ router.weight.T
    shares, chosen = torch.softmax(logits, dim=-1).topk(router.top_k, dim=-1)
    if getattr(router, "norm_topk_prob", True):
        shares = shares / shares.sum(-1, keepdim=True)
    return logits, shares, chosen


def in_its_dtype(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A stock forward that takes float64 to float32 nowhere."""
    to_float, to = Tensor.float, Tensor.to

    def to_other(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return x if x.dtype == torch.float64 and args[:1] == (torch.float32,) else to(x, *args, **options)

    def run(*args: Any, **arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x))
            patch.setattr(Tensor, "to", to_other)
            return forward(*args, **arguments)

    return run


def exact_sigmoid_router(router: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups one by one, with loops."""
    logits = x.reshape(-1, router.hidden_dim) @ router.weight.T
    scores = 1 / (1 + torch.exp(-logits))
    shares, chosen = [], []
    for row in scores:
        rank = row + router.e_score_correction_bias
        groups = list(torch.arange(len(row)).chunk(router.num_group))
        groups.sort(key=lambda group: -float(rank[group].sort().values[-2:].sum()))
        open_ones = torch.cat(groups[: router.topk_group])
        best = open_ones[rank[open_ones].argsort(descending=True)[: router.top_k]]
        total = row[best].sum() if router.norm_topk_prob else 1.0
        shares.append(router.routed_scaling_factor * row[best] / total)
        chosen.append(best)
    return logits, torch.stack(shares), torch.stack(chosen)


# What of transformers computes in float32 whatever it is given, and the same in the dtype it is given.
EXACT: dict[tuple[Any, str], Callable[..., Any]] = {
    **{(kind, "forward"): exact_rms_norm for kind in RMS_NORMS},
    **{(kind, "forward"): exact_rms_plus_one_norm for kind in RMS_PLUS_ONE_NORMS},
    **{(kind, "forward"): exact_cohere_norm for kind in kinds("LayerNorm", "cohere cohere2")},
    **{(kind, "forward"): exact_olmo_norm for kind in kinds("LayerNorm", "olmo")},
    **{(module, "apply_rotary_pos_emb"): exact_cohere_rotation for module in COHERE},
    **{(kind, "forward"): in_its_dtype(kind.forward) for kind in kinds("GatedDeltaNet", "qwen3_5")},
    **{(kind, "forward"): in_its_dtype(kind.forward) for kind in kinds("MambaLayer", "granitemoehybrid")},
    **{(kind, "forward"): exact_sigmoid_router for kind in kinds("TopkRouter", "deepseek_v3")},
    **{(kind, "forward"): exact_l2_norm for kind in kinds("L2Norm", "llama4")},
    (importlib.import_module("transformers.models.llama4.modeling_llama4"), "apply_rotary_emb"): exact_complex_rotation,
    **{(kind, "_attn"): exact_attention for kind in kinds("Attention", "codegen gptj") if hasattr(kind, "_attn")},
    **{(kind, "forward"): exact_router for kind in kinds("TopKRouter", "mixtral qwen2_moe qwen3_moe")},
}


@contextmanager
def exact_norms() -> Iterator[None]:
    """transformers' norms, Cohere's rotary positions, and CodeGen's and GPT-J's attention, in the dtype given."""
    with pytest.MonkeyPatch.context() as patch:
        for (kind, name), exact in EXACT.items():
            patch.setattr(kind, name, exact)
        yield


def random_ids(windows: int, tokens: int, *, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB_SIZE, (windows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max())


@torch.no_grad()
def passed_through(model: Any, paths: Iterable[str], ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What modules are given and give while a model runs, by path, a row a token."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[path] = inputs[0].flatten(0, -2), output.flatten(0, -2)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(note(path)) for path in paths]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


# ---- a walk held in memory ----


@dataclass
class Walked:
    """What a walk gave: its parts, and what it says of the stream and the probe."""

    parts: list[FinishedPart]
    config: Any
    family: Family
    probe_logits: Tensor
    walk: Walk

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for part in self.parts for name, tensor in part.tensors.items()}

    @property
    def points(self) -> list[dict[str, Any]]:
        return [point for part in self.parts for point in part.points]

    @property
    def widths(self) -> list[int]:
        return [point["width"] for point in self.points]


def new_walk(
    folder: Path,
    stages: Sequence[StageConfig],
    windows: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    output_dtype: torch.dtype | None = None,
    batch_size: int = 3,
    cache_memory: int = UNLIMITED,
    seed: int = 7,
    device: str = "cpu",
    held_out: int = 0,
    layout: Layout | None = None,
    survey: Survey | None = None,
) -> Walk:
    settings = WalkSettings(
        layout=layout or Layout(),
        held_out=held_out,
        probe_tokens=windows.shape[1],
        output_dtype=output_dtype or dtype,
        batch_size=batch_size,
        seed=seed,
        cache_memory=cache_memory,
        scratch=folder,
    )
    return Walk(new_decoder(folder, dtype=dtype, device=device), LazyWeights(folder), windows, stages, settings, survey)


def new_decoder(folder: Path, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Decoder:
    config = load_config(folder)
    return Decoder(config, families.find(config), dtype=dtype, device=torch.device(device))


def surveyor(
    folder: Path,
    windows: Tensor,
    *,
    batch_size: int = 4,
    memory: int = UNLIMITED,
    dtype: torch.dtype = torch.float64,
    observe: Callable[[Decoder], LinearObserver] | None = None,
) -> Surveyor:
    """observe: what looks at single linears, made for the survey's decoder."""
    decoder = new_decoder(folder, dtype=dtype)
    return Surveyor(
        PartLoader(decoder, LazyWeights(folder)),
        split_windows(windows, batch_size, held_out=0),
        CacheFolder(decoder, folder),
        memory=memory,
        observer=None if observe is None else observe(decoder),
    )


def walked(folder: Path, stages: Sequence[StageConfig], windows: Tensor, **options: Any) -> Walked:
    return finished(new_walk(folder, stages, windows, **options))


def finished(walk: Walk) -> Walked:
    parts = list(walk.parts())
    return Walked(parts, walk.decoder.config, walk.decoder.family, walk.probe, walk)


def fold_only() -> list[StageConfig]:
    return [FoldNorms()]


def fold_and_rotate(**rotation: Any) -> list[StageConfig]:
    return [FoldNorms(), Rotate(**rotation)]


def slicegpt(rule: dict[str, Any], **rotation: Any) -> list[StageConfig]:
    return [FoldNorms(), Rotate(**rotation), Slice(**{"round_to": 1, **rule})]


def sliced_model(result: Walked, dtype: torch.dtype = torch.float64) -> CompressForCausalLM:
    """The tensors of a walk in the architecture that is written; a stretch left in its basis has the identity."""
    model = empty_sliced_model(result.config, result.family, result.widths, dtype)
    tensors = dict(result.tensors)
    for name, parameter in model.named_parameters():
        if name.endswith("_shortcut.weight") and result.walk.branch_pass.decode is None:
            assert name not in tensors
            tensors[name] = torch.eye(len(parameter), dtype=dtype)
    model.load_state_dict(tensors)
    return model


def empty_sliced_model(
    config: Any, family: Family, widths: Sequence[int], dtype: torch.dtype = torch.float64
) -> CompressForCausalLM:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        spec = replace(ModelSpec.dense(Own(config, family), dtype), widths=tuple(widths))
        model = CompressForCausalLM(spec.config())
    finally:
        torch.set_default_dtype(before)
    return model.eval()


# ---- SliceGPT as the paper has it ----

# Of each branch: its norm, what reads the normed stream, what writes the stream.
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BRANCHES: dict[str, list[tuple[str, tuple[str, ...], tuple[str, ...]]]] = {
    "opt": [("self_attn_layer_norm", ATTENTION, ("self_attn.out_proj",)), ("final_layer_norm", ("fc1",), ("fc2",))],
    "llama": [
        ("input_layernorm", ATTENTION, ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    ],
    "phi": [("input_layernorm", (*ATTENTION, "mlp.fc1"), ("self_attn.dense", "mlp.fc2"))],
}
EMBEDDINGS = {
    "opt": ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    "llama": ("model.embed_tokens",),
    "phi": ("model.embed_tokens",),
}
BLOCKS = {"opt": "model.decoder.layers", "llama": "model.layers", "phi": "model.layers"}
FINAL_NORM = {"opt": "model.decoder.final_layer_norm", "llama": "model.norm", "phi": "model.final_layernorm"}
EPSILON = {"llama": "rms_norm_eps", "phi": "layer_norm_eps"}

Choose = Callable[[int, Tensor], int]


@dataclass
class Affine:
    """x -> x W^T + b, W being (d_out, d_in)."""

    W: Tensor
    b: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.W.T + self.b


class PaperSliceGPT:
    """A decoder as plain float64 matrices, and SliceGPT (arXiv 2401.15024) done to it step by step.

    No forward pass is shared: for every rotation the calibration text goes through the whole sliced prefix again.
    `choose(point, eigenvalues)` gives the width kept at a point of the stream: 0 after the embeddings, then one after
    each branch.
    """

    def __init__(self, model: PreTrainedModel, *, signal: str = "stream") -> None:
        config: Any = model.config
        self.kind: str = config.model_type
        self.signal = signal
        self.D: int = config.hidden_size
        self.eps: float = getattr(config, EPSILON[self.kind]) if self.kind in EPSILON else 1e-5
        self.heads: int = config.num_attention_heads
        self.rotary: Any = None if self.kind == "opt" else model.base_model.rotary_emb
        state: dict[str, Tensor] = model.state_dict()
        self.weights = {name: tensor.detach().double().clone() for name, tensor in state.items()}
        self.tables = [self.weights[f"{name}.weight"] for name in EMBEDDINGS[self.kind]]
        self.branches: list[tuple[list[Affine], list[Affine]]] = []
        for block in range(config.num_hidden_layers):
            for norm, readers, writers in BRANCHES[self.kind]:
                prefix = f"{BLOCKS[self.kind]}.{block}."
                branch = (
                    [self.affine(prefix + name) for name in readers],
                    [self.affine(prefix + name) for name in writers],
                )
                self.fold_reader(prefix + norm, branch[0])
                self.branches.append(branch)
        self.head = self.affine("lm_head")
        self.fold_reader(FINAL_NORM[self.kind], [self.head])
        if self.kind != "llama":
            self.subtract_means()
        self.Q: list[Tensor] = []
        self.eigenvalues: list[Tensor] = []

    def affine(self, name: str) -> Affine:
        W = self.weights[f"{name}.weight"]
        return Affine(W, self.weights.get(f"{name}.bias", torch.zeros(len(W), dtype=torch.float64)))

    def fold_reader(self, norm: str, readers: list[Affine]) -> None:
        """Linear(x diag(a) + b) = x (W diag(a))^T + (W b + bias)."""
        a, b = self.weights[f"{norm}.weight"], self.weights.get(f"{norm}.bias")
        for reader in readers:
            if b is not None:
                reader.b = reader.b + reader.W @ b
            reader.W = reader.W @ torch.diag(a)

    def subtract_means(self) -> None:
        """LayerNorm subtracts the mean over coordinates, M = I - 11^T/D: whatever writes the stream does it instead."""
        M = torch.eye(self.D, dtype=torch.float64) - torch.ones(self.D, self.D, dtype=torch.float64) / self.D
        self.tables = [table @ M for table in self.tables]
        for _, writers in self.branches:
            for writer in writers:
                writer.W, writer.b = M @ writer.W, M @ writer.b

    def slice(self, windows: Tensor, choose: Choose) -> "PaperSliceGPT":
        for point in range(len(self.branches) + 1):
            X = self.stream(windows, point).flatten(0, 1)
            if self.signal == "normed":
                X = self.rms_norm(X)
            C = torch.zeros(self.D, self.D, dtype=torch.float64)
            for x in X:
                C += torch.outer(x, x)
            eigenvalues, vectors = torch.linalg.eigh(C)
            order = torch.argsort(eigenvalues, descending=True)
            self.eigenvalues.append(eigenvalues[order])
            self.Q.append(vectors[:, order[: choose(point, eigenvalues[order])]])
        return self

    def stream(self, ids: Tensor, point: int) -> Tensor:
        """The stream at a point in the original basis, D wide, behind a prefix that is already sliced."""
        x = self.tables[0][ids]
        if self.kind == "opt":
            x = x + self.tables[1][torch.arange(ids.shape[1]) + 2]
        for i in range(point):
            Q_in = self.Q[i]
            Q_out = self.Q[i + 1] if i + 1 < point else torch.eye(self.D, dtype=torch.float64)
            xs = x @ Q_in if i == 0 else x
            readers, writers = self.branches[i]
            readers = [Affine(reader.W @ Q_in, reader.b) for reader in readers]
            writers = [Affine(Q_out.T @ writer.W, Q_out.T @ writer.b) for writer in writers]
            x = xs @ (Q_in.T @ Q_out) + self.branch(i, self.rms_norm(xs), readers, writers)
        return x

    def logits(self, ids: Tensor) -> Tensor:
        Q = self.Q[-1]
        return Affine(self.head.W @ Q, self.head.b)(self.rms_norm(self.stream(ids, len(self.branches)) @ Q))

    def rms_norm(self, x: Tensor) -> Tensor:
        """Deleted coordinates count as zeros: the sum of squares is over D, however wide x is."""
        return x / torch.sqrt(x.square().sum(-1, keepdim=True) / self.D + self.eps)

    def branch(self, i: int, x: Tensor, readers: list[Affine], writers: list[Affine]) -> Tensor:
        if self.kind == "phi":
            mlp = nn.functional.gelu(readers[3](x), approximate="tanh")
            return writers[0](self.attention(x, *readers[:3])) + writers[1](mlp)
        if i % 2 == 0:
            return writers[0](self.attention(x, *readers))
        if self.kind == "opt":
            return writers[0](torch.relu(readers[0](x)))
        gate = readers[0](x)
        return writers[0](gate * torch.sigmoid(gate) * readers[1](x))

    def attention(self, x: Tensor, q: Affine, k: Affine, v: Affine) -> Tensor:
        """Head by head, query by query."""
        windows, tokens, _ = x.shape
        width = len(q.W) // self.heads
        queries_per_key = len(q.W) // len(k.W)
        output = torch.zeros(windows, tokens, len(q.W), dtype=torch.float64)
        for head in range(self.heads):
            own = slice(head * width, (head + 1) * width)
            shared = slice(head // queries_per_key * width, (head // queries_per_key + 1) * width)
            queries, keys, values = self.turn(q(x)[..., own]), self.turn(k(x)[..., shared]), v(x)[..., shared]
            for token in range(tokens):
                scores = (keys[:, : token + 1] @ queries[:, token, :, None]).squeeze(-1) / math.sqrt(width)
                weights = torch.softmax(scores, dim=-1)
                output[:, token, own] = (weights[:, :, None] * values[:, : token + 1]).sum(1)
        return output

    def turn(self, x: Tensor) -> Tensor:
        """Rotary positions, on as many coordinates as the model has angles for."""
        if self.rotary is None:
            return x
        cos, sin = self.rotary(x, torch.arange(x.shape[1])[None])
        turned = x[..., : cos.shape[-1]]
        first, second = turned.chunk(2, dim=-1)
        rotated = turned * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([rotated, x[..., cos.shape[-1] :]], dim=-1)


def scaled(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """A model whose whole stream is smaller by `factor`, so that the norms' epsilon counts."""
    if factor == 1:
        return model
    model = copy.deepcopy(model)
    config: Any = model.config
    family = families.find(config)
    writers = [name for branch in family.branches for name in branch.writers]
    blocks: Any = model.get_submodule(family.blocks)
    modules: list[Any] = [model.get_submodule(name) for name in family.embeddings]
    modules += [block.get_submodule(name) for block in blocks for name in writers]
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.mul_(factor)
    return model


# ---- ridge regression ----


def refitted(
    U: Tensor, T: Tensor, W0: Tensor, weights: Tensor, S: Tensor, apart: Tensor
) -> tuple[float | None, Tensor]:
    """The damping that is best on the rows held out (`apart`), where an error e counts ||e S||^2, and its solution:
    min sum of w ||u W - t||^2 + damping mean(diag G) ||W - W0||^2 over the other rows, as stacked rows.
    """
    root = weights[~apart].sqrt()[:, None]
    U_fit, T_fit = root * U[~apart], root * T[~apart]

    def solved(damping: float | None) -> Tensor:
        if damping is None:
            return W0
        pull = (damping * U_fit.square().sum(0).mean()).sqrt()
        rows = torch.cat([U_fit, pull * torch.eye(U.shape[1], dtype=torch.float64)])
        return torch.linalg.lstsq(rows, torch.cat([T_fit, pull * W0]), driver="gelsd").solution

    def error(damping: float | None) -> float:
        return float((weights[apart] * ((U[apart] @ solved(damping) - T[apart]) @ S).square().sum(1)).sum())

    damping = best_damping(error)
    return damping, solved(damping)


def best_damping(error: Callable[[float | None], float]) -> float | None:
    """Of 0.01, 0.1, 1 and the lowest point of a parabola through these the one of least error; None: unfitted."""
    found = {damping: error(damping) for damping in (None, 0.01, 0.1, 1.0)}
    a, b, _ = numpy.polyfit([-2, -1, 0], [found[damping] for damping in (0.01, 0.1, 1.0)], 2)
    end = 1 if found[1.0] < found[0.01] else -3
    fourth = float(f"{10 ** max(-4, min(-b / (2 * a) if a > 0 else end, 1)):.2g}")
    found[fourth] = error(fourth)
    return min(found, key=lambda damping: found[damping])
