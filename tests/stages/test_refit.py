"""The anchored method on walks: refits, the shared rotation and pruned units, against the same written out plainly."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import oracles
import tiny
from compress import families
from compress.architectures.architecture import Architecture, ModelSpec
from compress.architectures.own import Own
from compress.architectures.stock import Stock
from compress.calibration.sites import Stage
from compress.calibration.survey import Survey, SurveyNeed
from compress.calibration.walk import FinishedPart, Walk
from compress.models.loading import load_config
from compress.models.tensor_files import own_name
from compress.numerics.frames import Frame, pca
from compress.own_model.modeling_compress import CompressForCausalLM, unfuse_experts
from compress.stages._stage import StageConfig
from compress.stages.groups import PruneUnits, Refit
from compress.stages.stream import FoldNorms, MeasureError, Rotate, RotateShared, Slice
from matrices import prune_units

pytestmark = pytest.mark.usefixtures("exact_norms")
D, NEURONS = tiny.HIDDEN, 48
NARROW = 20
WINDOWS = oracles.random_ids(8, 16, seed=2)
UNSEEN = oracles.random_ids(2, 24, seed=3)
HELD_OUT = [6, 7]
WITHOUT_BIASES = {"attention_bias": False, "mlp_bias": False}


SURVEYS: dict[tuple[Path, bool], Survey] = {}


def survey_of(folder: Path, gradient: bool, windows: Tensor) -> Survey:
    """Taken once for a model: all walks of these tests are over the same windows."""
    if (folder, gradient) not in SURVEYS:
        SURVEYS[folder, gradient] = oracles.surveyor(folder, windows).run(gradient=gradient)
    return SURVEYS[folder, gradient]


def target_of(folder: Path, kind: str = "ours") -> Architecture:
    config = load_config(folder)
    family = families.find(config)
    if kind == "stock":
        return Stock(config, family, narrows=True)
    return Own(config, family, shortcuts=kind == "ours")


def new_walk(
    folder: Path,
    stages: Sequence[Stage],
    *,
    windows: Tensor = WINDOWS,
    held_out: int = len(HELD_OUT),
    target: Architecture | None = None,
    **options: Any,
) -> Walk:
    need = SurveyNeed.NONE
    for stage in stages:
        need |= stage.requires.survey if isinstance(stage, StageConfig) else SurveyNeed.NONE
    survey = None if need is SurveyNeed.NONE else survey_of(folder, SurveyNeed.GRADIENT in need, windows)
    layout = (target or target_of(folder)).layout(torch.float64)
    options = {"batch_size": 4, "held_out": held_out, "layout": layout, "survey": survey, **options}
    return oracles.new_walk(folder, stages, windows, **options)


def walked(folder: Path, stages: Sequence[Stage], **options: Any) -> oracles.Walked:
    return oracles.finished(new_walk(folder, stages, **options))


def dampings(parts: Iterable[FinishedPart]) -> dict[str, float]:
    """Of the groups that were fitted, by their names."""
    groups = [group for part in parts for group in part.groups]
    return {group["group"]: group["damping"] for group in groups if "damping" in group}


def written_model(result: oracles.Walked, target: Architecture, **kept: int) -> Any:
    """The tensors of a walk in the class they are written for."""
    dense = ModelSpec.dense(target, torch.float64)
    config = replace(dense, widths=tuple(result.widths), units={**dense.units, **kept}).config()
    if target.is_stock:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    else:
        model = CompressForCausalLM(config).double()
    unfuse_experts(model).load_state_dict({own_name(name): tensor for name, tensor in result.tensors.items()})
    return model.eval()


def shared(width: int = NARROW, **options: Any) -> list[StageConfig]:
    return [RotateShared(**options), Slice(width=width, round_to=1, slice_head=True)]


def per_layer(width: int = NARROW) -> list[StageConfig]:
    return [Rotate(signal="normed", stream="dense"), Slice(width=width, round_to=1, slice_head=True)]


ROTATIONS = {"shared": shared, "per layer": per_layer}


@pytest.mark.parametrize(
    ("model_type", "rotation"),
    [("opt", "shared"), ("llama", "per layer"), ("phi3", "none"), ("granite", "shared"), ("mixtral", "shared")],
)
def test_at_the_full_width_a_refit_changes_nothing(model_type, rotation, models):
    model, folder = models(model_type)
    stages = [FoldNorms(), *(ROTATIONS[rotation](D) if rotation in ROTATIONS else []), Refit()]
    result = walked(folder, stages)
    assert result.widths == [D] * len(result.widths)
    assert oracles.largest_difference(result.probe_logits, oracles.logits_of(model, WINDOWS[:1])) < 1e-9
    assert result.parts[-1].divergence == pytest.approx(0, abs=1e-12)


# Rows of inputs and targets of every calibration token, what the matrix was, what tokens and errors count by.
Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def solved(problem: Problem) -> tuple[float | None, Tensor]:
    """None where nothing is better than what there was."""
    apart = torch.isin(torch.arange(len(WINDOWS)), torch.tensor(HELD_OUT)).repeat_interleave(WINDOWS.shape[1])
    return oracles.refitted(*problem, apart)


def identity(width: int) -> Tensor:
    return torch.eye(width, dtype=torch.float64)


def flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def with_ones(U: Tensor, biased: bool) -> Tensor:
    return torch.cat([U, torch.ones(len(U), 1, dtype=torch.float64)], dim=1) if biased else U


class FirstBranch:
    """The first branch of a model in plain matrices, behind embeddings that are sliced.

    encode, decode: of the stream before it; encode_after: of the stream behind it.
    """

    def __init__(self, model: PreTrainedModel, frame: Frame | None, *, biased: bool) -> None:
        self.paper = oracles.PaperSliceGPT(model)
        self.biased = biased
        self.shared = frame is not None
        self.readers, self.writers = self.paper.branches[0]
        self.dense = self.paper.stream(WINDOWS, 0)
        given = self.writer_inputs(self.dense, self.readers)
        self.after = self.dense + sum(writer(x) for writer, x in zip(self.writers, given, strict=True))
        if frame is not None:
            self.encode, self.decode, self.encode_after = (
                frame.encode(NARROW),
                frame.decode(NARROW),
                frame.encode(NARROW),
            )
        else:
            self.encode, self.encode_after = self.components(self.dense), self.components(self.after)
            self.decode = self.encode.T
        self.narrow = self.dense @ self.encode

    def components(self, x: Tensor) -> Tensor:
        """Of the stream after the norm, over all calibration tokens."""
        normed = flat(self.paper.rms_norm(x))
        Q, _ = pca(normed.T @ normed / len(normed), name="a test")
        return Q[:, :NARROW]

    def writer_inputs(self, x: Tensor, readers: list[oracles.Affine]) -> list[Tensor]:
        normed = self.paper.rms_norm(x)
        inputs = [self.paper.attention(normed, *readers[:3])]
        if self.paper.kind == "phi":
            inputs.append(nn.functional.gelu(readers[3](normed), approximate="tanh"))
        return inputs

    def reader_problem(self) -> Problem:
        """The compressed stream behind its norm is to become the dense one behind its own, as all readers see it."""
        U = with_ones(flat(self.paper.rms_norm(self.narrow)), self.biased)
        start = torch.cat([self.decode, self.decode.new_zeros(1, D)]) if self.biased else self.decode
        S = torch.cat([reader.W.T for reader in self.readers], dim=1)
        return U, flat(self.paper.rms_norm(self.dense)), start, torch.ones(len(U)).double(), S

    def turned(self, turn: Tensor) -> list[oracles.Affine]:
        """The readers behind a solution of their problem."""
        constant = turn[-1] if self.biased else torch.zeros(D).double()
        return [oracles.Affine(r.W @ turn[:NARROW].T, r.b + r.W @ constant) for r in self.readers]

    def writer_problem(self, readers: list[oracles.Affine]) -> Problem:
        """From the writers' inputs behind the refitted readers to what the compressed stream lacks of the dense one.

        With a shortcut, the stream is one of the inputs and nothing is carried past them.
        """
        given = [flat(x) for x in self.writer_inputs(self.narrow, readers)]
        start = [writer.W.T @ self.encode_after for writer in self.writers]
        target = flat(self.after @ self.encode_after)
        if self.shared:
            target = target - flat(self.narrow)
        else:
            given, start = [flat(self.narrow), *given], [self.decode @ self.encode_after, *start]
        if self.biased:
            start.append(torch.stack([writer.b for writer in self.writers]).sum(0, keepdim=True) @ self.encode_after)
        weights = 1 / (flat(self.after).square().mean(1) + self.paper.eps)
        return with_ones(torch.cat(given, dim=1), self.biased), target, torch.cat(start), weights, identity(NARROW)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", WITHOUT_BIASES), ("opt", {}), ("phi", {})],
    ids=["llama without biases", "opt", "phi"],
)
def test_the_first_branch_is_refitted_as_written_out(model_type, changes, rotation, models):
    model, folder = models(model_type, **changes)
    result = walked(folder, [FoldNorms(), *ROTATIONS[rotation](), Refit()])
    notes = dampings(result.parts[1:2])
    name = "parallel" if model_type == "phi" else "attention"
    biased = changes is not WITHOUT_BIASES
    plain = FirstBranch(model, result.walk.branch_pass.frame, biased=biased)
    expected: dict[str, Tensor] = {}

    damping, turn = solved(plain.reader_problem())
    assert notes.get(f"block 0 {name} readers") == damping
    readers = plain.turned(turn)
    _, reader_names, writer_names = oracles.BRANCHES[model_type][0]
    for reader_name, reader in zip(reader_names, readers, strict=True):
        expected |= {f"{reader_name}.weight": reader.W} | ({f"{reader_name}.bias": reader.b} if biased else {})

    damping, rest = solved(plain.writer_problem(readers))
    assert notes.get(f"block 0 {name} writers") == damping
    if rotation == "per layer":
        expected[f"{name}_shortcut.weight"], rest = rest[:NARROW].T, rest[NARROW:]
    for writer_name, writer in zip(writer_names, plain.writers, strict=True):
        expected[f"{writer_name}.weight"], rest = rest[: writer.W.shape[1]].T, rest[writer.W.shape[1] :]
        if biased:
            expected[f"{writer_name}.bias"] = torch.zeros(NARROW).double()
    if biased:
        # One bias for all of them: the stream takes in only the sum.
        expected[f"{writer_names[0]}.bias"] = rest[0]

    for key, tensor in expected.items():
        found = result.parts[1].tensors[f"{oracles.BLOCKS[model_type]}.0.{key}"]
        assert oracles.largest_difference(found, tensor) < 1e-8, key
    of_branch = {key for key in result.parts[1].tensors if any(f".{linear}." in key for linear in linears(expected))}
    assert len(of_branch) == len(expected)


def linears(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def divergence(dense: Tensor, other: Tensor) -> float:
    """KL(dense || other), token by token and entry by entry."""
    p, q = dense.softmax(-1), other.softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@contextmanager
def projected(model: PreTrainedModel, P: Tensor) -> Iterator[PreTrainedModel]:
    """The dense model with everything that is written to its stream projected, x -> x P."""
    family = families.find(model.config)
    blocks: Any = model.get_submodule(family.blocks)
    writers = [block.get_submodule(name) for block in blocks for branch in family.branches for name in branch.writers]
    writers += [model.get_submodule(name) for name in family.embeddings]
    handles = [writer.register_forward_hook(lambda _module, _inputs, output: output @ P) for writer in writers]
    yield model
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("model_type", "gradient_weight"), [("llama", 0.0), ("opt", 0.9), ("phi", 0.9)])
def test_a_shared_rotation_is_the_dense_model_with_its_stream_projected(model_type, gradient_weight, models):
    """The norms still divide by the dense width, and LayerNorm finds no mean to subtract."""
    model, folder = models(model_type)
    stages = [FoldNorms(), *shared(gradient_weight=gradient_weight), MeasureError()]
    target = target_of(folder, "one basis")
    result = walked(folder, stages, target=target)
    assert result.widths == [NARROW] * len(result.widths)
    frame = result.walk.branch_pass.frame
    P = frame.encode(NARROW) @ frame.decode(NARROW)
    dense, held_out = oracles.logits_of(model, UNSEEN), oracles.logits_of(model, WINDOWS[HELD_OUT])
    with projected(model, P):
        assert oracles.largest_difference(result.probe_logits, oracles.logits_of(model, WINDOWS[:1])) < 1e-9
        logits = oracles.logits_of(model, UNSEEN)
        expected = divergence(held_out, oracles.logits_of(model, WINDOWS[HELD_OUT]))
    assert oracles.largest_difference(oracles.logits_of(written_model(result, target), UNSEEN), logits) < 1e-9
    assert oracles.largest_difference(logits, dense) > 1e-2
    assert result.parts[-1].divergence == pytest.approx(expected, rel=1e-8)
    (symmetric,) = {oracles.largest_difference(P, P.T) < 1e-9}
    assert symmetric == (gradient_weight == 0)


@dataclass
class Unit:
    """
    rows: of the readers, what belongs to each unit. writer: what reads the units. after: the norm behind it, below the
    blocks.
    """

    kind: str
    count: int
    rows: dict[str, Tensor]
    writer: str
    after: str


def neighbors(count: int, size: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + count * size).view(count, size)


NEURON = neighbors(NEURONS, 1)
MLP = {"mlp.gate_proj": NEURON, "mlp.up_proj": NEURON}
# Two groups, each of a key head and a value head and the two query heads that share them.
HEADS = {
    "self_attn.q_proj": neighbors(2, D // 2),
    **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), neighbors(2, D // 4)),
}
NEXT, BESIDE = "1.input_layernorm", "0.post_attention_layernorm"
UNITS = {
    "llama neurons": Unit("neurons", NEURONS, MLP, "mlp.down_proj", NEXT),
    "opt neurons": Unit("neurons", NEURONS, {"fc1": NEURON}, "fc2", "1.self_attn_layer_norm"),
    "llama kv_groups": Unit("kv_groups", 2, HEADS, "self_attn.o_proj", BESIDE),
}
KEPT = {"neurons": 29, "kv_groups": 1}


@pytest.mark.parametrize("case", UNITS)
def test_units_are_deleted_as_written_out(case, models):
    """In the first branch that has them, before which nothing is changed: the same in all readers and the writer.

    An input counts by the inverse mean square of the dense stream behind the branch, as the next norm will weigh it.
    """
    model_type, unit = case.split()[0], UNITS[case]
    model, folder = models(model_type)
    blocks = families.find(model.config).blocks
    dense = walked(folder, [FoldNorms()]).parts[1].tensors
    part = walked(folder, [FoldNorms(), *pruned((unit.kind,))], held_out=0).parts[1]

    names = f"{blocks}.0.{unit.writer}", f"{blocks}.{unit.after}"
    seen = oracles.passed_through(model, names, WINDOWS)
    U, stream = (seen[name][0] for name in names)
    layer_norm = families.find(model.config).norm == "layer"
    stream = stream - stream.mean(1, keepdim=True) if layer_norm else stream
    W, bias = dense[f"{blocks}.0.{unit.writer}.weight"].T, dense.get(f"{blocks}.0.{unit.writer}.bias")
    if bias is not None:
        U, W = with_ones(U, biased=True), torch.cat([W, bias[None]])
    G = torch.zeros(len(W), len(W)).double()
    for u, x in zip(U, stream, strict=True):
        G += torch.outer(u, u) / (x.square().mean() + families.find(model.config).epsilon(model.config))
    inputs = neighbors(unit.count, dense[f"{blocks}.0.{unit.writer}.weight"].shape[1] // unit.count)
    kept, expected = prune_units(W, G, inputs, KEPT[unit.kind], damping=0.01, name="a test")

    for name, rows in unit.rows.items():
        stay = rows[kept].T.flatten() if unit.kind == "neurons" else rows[kept].flatten()
        for key in {f"{blocks}.0.{name}.weight", f"{blocks}.0.{name}.bias"} & dense.keys():
            assert torch.equal(part.tensors[key], dense[key][stay])
    found = part.tensors[f"{blocks}.0.{unit.writer}.weight"]
    assert oracles.largest_difference(found, expected[inputs[kept].flatten()].T) < 1e-8
    if bias is not None:
        assert oracles.largest_difference(part.tensors[f"{blocks}.0.{unit.writer}.bias"], expected[-1]) < 1e-8


def pruned(kinds: Iterable[str]) -> list[StageConfig]:
    return [PruneUnits.model_validate({"units": kind, "keep": KEPT[kind]}) for kind in kinds]
