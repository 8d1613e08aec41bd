"""The streamed walk against SliceGPT written out from the paper, and what must not change its result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
import tiny
from compress.calibration.walk import FinishedPart
from compress.calibration.weights import LazyWeights
from compress.errors import NumericalError
from compress.stages.stream import MeasureError

D = tiny.HIDDEN
LAST = {"opt": 2 * tiny.NUM_BLOCKS, "llama": 2 * tiny.NUM_BLOCKS, "phi": tiny.NUM_BLOCKS}
MODELS = list(LAST)
WINDOWS = oracles.random_ids(5, 12, seed=2)
UNSEEN = oracles.random_ids(2, 16, seed=3)
SLICED = {"ratio": 0.3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for model_type in MODELS:
        found[model_type] = tmp_path_factory.mktemp(model_type)
        tiny.tiny_model(model_type).save_pretrained(found[model_type], max_shard_size="20KB")
    return found


def block_of(model_type: str, point: int) -> int:
    branches = 1 if model_type == "phi" else 2
    return max(0, point - 1) // branches


def least_width(eigenvalues: Tensor, share: float) -> int:
    kept = 0.0
    for width, eigenvalue in enumerate(eigenvalues.tolist(), 1):
        kept += eigenvalue
        if kept >= share * sum(eigenvalues.tolist()):
            return width
    return len(eigenvalues)


def by_rule(rule: dict[str, Any], model_type: str) -> oracles.Choose:
    """The width at a point as the rule says it, from the numbers written here."""
    ratios = {"ratio": [0.3] * 3, "linear_ratios": [0.1, 0.3, 0.5], "block_ratios": [0.25, 0.0, 0.4]}

    def choose(point: int, eigenvalues: Tensor) -> int:
        if point == LAST[model_type] and not rule.get("slice_head"):
            return D
        if "explained_variance" in rule:
            return least_width(eigenvalues, rule["explained_variance"])
        (kind,) = rule.keys() & ratios.keys()
        return int(D * (1 - ratios[kind][block_of(model_type, point)]))

    return choose


RULES = [
    {"ratio": 0.3, "slice_head": True},
    {"linear_ratios": (0.1, 0.5)},
    {"block_ratios": (0.25, 0.0, 0.4)},
    {"explained_variance": 0.85},
]


@pytest.mark.parametrize("model_type", MODELS)
def test_the_oracle_at_full_width_is_the_dense_model(model_type):
    model = tiny.tiny_model(model_type)
    paper = oracles.PaperSliceGPT(model).slice(WINDOWS, lambda point, eigenvalues: D)
    with oracles.exact_norms():
        dense = oracles.logits_of(model, UNSEEN)
    assert oracles.largest_difference(paper.logits(UNSEEN), dense) < 1e-9


@pytest.mark.parametrize(
    ("rule", "signal"),
    [*((rule, "stream") for rule in RULES), ({"ratio": 0.3}, "normed")],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_walk_is_the_paper(rule, signal, folders):
    model_type = MODELS[len(rule) % 3] if rule == SLICED else MODELS[RULES.index(rule) % 3]
    paper = oracles.PaperSliceGPT(tiny.tiny_model(model_type), signal=signal)
    paper.slice(WINDOWS, by_rule(rule, model_type))
    result = oracles.walked(folders[model_type], oracles.slicegpt(rule, signal=signal), WINDOWS)
    assert result.widths == [Q.shape[1] for Q in paper.Q]
    assert min(result.widths) < D
    for point, eigenvalues in zip(result.points, paper.eigenvalues, strict=True):
        kept = eigenvalues[: point["width"]].sum() / eigenvalues.sum()
        assert point["kept_energy"] == pytest.approx(float(kept), rel=1e-10)
    written = oracles.logits_of(oracles.sliced_model(result), UNSEEN)
    assert oracles.largest_difference(written, paper.logits(UNSEEN)) < 1e-8


def test_the_error_report_is_the_papers_prefix_against_the_dense_one(folders):
    model_type = "opt"
    model = tiny.tiny_model(model_type)
    paper = oracles.PaperSliceGPT(model).slice(WINDOWS, by_rule(SLICED, model_type))
    dense = oracles.PaperSliceGPT(model).slice(WINDOWS, lambda point, eigenvalues: D)
    stages = oracles.slicegpt(SLICED)
    result = oracles.walked(folders[model_type], [stages[0], MeasureError(), *stages[1:]], WINDOWS)
    for point, report in enumerate(result.points):
        there, here = dense.stream(WINDOWS, point), paper.stream(WINDOWS, point)
        expected = float((here - there).square().sum() / there.square().sum())
        assert report["relative_error"] == pytest.approx(expected, rel=1e-8, abs=1e-20)
    assert result.points[0]["relative_error"] == 0
    assert result.points[-1]["relative_error"] > 1e-3
    without = oracles.walked(folders[model_type], stages, WINDOWS)
    assert_same_bytes(without.tensors, result.tensors)


def assert_same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(("model_type", "streams"), [("opt", 1), ("phi", 2)])
def test_activations_on_disk_give_the_same_bytes(model_type, streams, folders, monkeypatch):
    # An error is measured against the dense stream, a second one.
    stages = [*oracles.slicegpt(SLICED), *([MeasureError()] if streams == 2 else [])]
    mapped = []
    from_file = torch.from_file

    def noting(*args: Any, **options: Any) -> Tensor:
        mapped.append(args)
        return from_file(*args, **options)

    monkeypatch.setattr(torch, "from_file", noting)
    before = sorted(folders[model_type].iterdir())
    in_memory = oracles.walked(folders[model_type], stages, WINDOWS)
    assert not mapped
    on_disk = oracles.walked(folders[model_type], stages, WINDOWS, cache_memory=0)
    assert len(mapped) == streams
    assert_same_bytes(in_memory.tensors, on_disk.tensors)
    assert in_memory.points == on_disk.points
    assert torch.equal(in_memory.probe_logits, on_disk.probe_logits)
    assert sorted(folders[model_type].iterdir()) == before


def off_the_grid(tensor: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of 16 bytes, as a file may well give them."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(("model_type", "cache_memory"), [("llama", oracles.UNLIMITED), ("phi", 0)])
def test_a_walk_goes_on_from_any_part(model_type, cache_memory, folders):
    """To the bit, wherever in memory the state lies: products of matrices round differently by their alignment."""
    stages = [*oracles.slicegpt(SLICED, final_orientation="random"), MeasureError()]
    options: dict[str, Any] = {"cache_memory": cache_memory, "batch_size": 2}
    walk = oracles.new_walk(folders[model_type], stages, WINDOWS, **options)
    parts: list[FinishedPart] = []
    states: list[dict[str, Tensor]] = []
    for part in walk.parts():
        parts.append(part)
        states.append({name: off_the_grid(tensor) for name, tensor in walk.state().items()})
    assert len(parts) == tiny.NUM_BLOCKS + 2
    for done, state in enumerate(states, 1):
        again = oracles.new_walk(folders[model_type], stages, WINDOWS, **options)
        again.restore(state, done)
        rest = list(again.parts())
        assert [part.index for part in rest] == [part.index for part in parts[done:]]
        for part, undisturbed in zip(rest, parts[done:], strict=True):
            assert_same_bytes(part.tensors, undisturbed.tensors)
            assert part.points == undisturbed.points
        assert torch.equal(again.probe, walk.probe)


def test_the_probe_sees_the_rounded_weights(folders):
    """What verification compares with was computed in float32 from the weights as they are written, in bfloat16."""
    result = oracles.walked(
        folders["opt"], oracles.slicegpt(SLICED), WINDOWS, dtype=torch.float32, output_dtype=torch.bfloat16
    )
    model = oracles.empty_sliced_model(result.config, result.family, result.widths, torch.float32)
    model.load_state_dict(result.tensors)
    written = oracles.logits_of(model, WINDOWS[:1])
    assert oracles.largest_difference(written, result.probe_logits) < 1e-4 * float(written.abs().max())


def test_one_part_at_a_time_has_weights_and_each_is_read_once(folders, monkeypatch):
    asked: list[str] = []
    read = LazyWeights.read

    def noting(weights: LazyWeights, names: list[str]) -> dict[str, Tensor]:
        asked.extend(names)
        return read(weights, names)

    monkeypatch.setattr(LazyWeights, "read", noting)
    walk = oracles.new_walk(folders["opt"], oracles.slicegpt(SLICED), WINDOWS)
    every, tables = set(walk.decoder.parameter_shapes()), set(walk.decoder.embedding_names())
    for part in walk.parts():
        filled = [name for name, p in walk.decoder.model.named_parameters() if p.device.type != "meta"]
        assert not filled or part.name == "head"
    once = [name for name in asked if name not in tables]
    assert len(once) == len(set(once))
    assert set(asked) == every - {"lm_head.weight"}


def test_a_weight_too_large_for_the_output_names_the_dtype(tmp_path):
    model = tiny.tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.get_submodule("lm_head").weight.mul_(1e6)
    model.save_pretrained(tmp_path)
    with pytest.raises(NumericalError) as error:
        oracles.walked(tmp_path, oracles.slicegpt(SLICED), WINDOWS, dtype=torch.float32, output_dtype=torch.float16)
    assert str(error.value) == (
        "The compressed weight 'lm_head.weight' has a NaN or Inf in torch.float16. Try --dtype bfloat16 or float32."
    )
