"""The same on a GPU: the walk's result, its resuming, and the pipeline from end to end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress  # noqa: F401 (registers the architecture)
import oracles
import tiny
from compress.models.hub import find_model
from compress.pipeline import run
from compress.planning.prepare import Job
from compress.recipe import parse_recipe
from compress.stages.stream import MeasureError
from recipes import anchored, lowrank, slicegpt, slim

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
WINDOWS = oracles.random_ids(5, 24, seed=2)
UNSEEN = oracles.random_ids(2, 24, seed=3)
STAGES = [*oracles.slicegpt({"ratio": 0.3}, final_orientation="random"), MeasureError()]
HEAD_TOO = [*oracles.slicegpt({"ratio": 0.3, "slice_head": True}, final_orientation="random"), MeasureError()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for model_type in tiny.FAMILIES:
        found[model_type] = tmp_path_factory.mktemp(model_type)
        tiny.tiny_model(model_type).save_pretrained(found[model_type], max_shard_size="20KB")
    return found


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_the_walk_gives_what_it_gives_on_the_cpu(model_type, folders):
    stages = HEAD_TOO if model_type in tiny.ONE_END else STAGES
    with oracles.exact_norms():
        here = oracles.walked(folders[model_type], stages, WINDOWS)
        there = oracles.walked(folders[model_type], stages, WINDOWS, device=DEVICE)
        logits = [oracles.logits_of(oracles.sliced_model(result), UNSEEN) for result in (here, there)]
    assert {tensor.device.type for tensor in there.tensors.values()} == {"cpu"}
    assert here.widths == there.widths
    assert oracles.largest_difference(*logits) < 1e-8
    for mine, others in zip(here.points, there.points, strict=True):
        assert mine["relative_error"] == pytest.approx(others["relative_error"], rel=1e-8, abs=1e-20)


@pytest.mark.parametrize("model_type", ["opt", "llama", "phi"])
def test_a_walk_goes_on_to_the_bit(model_type, folders, tmp_path):
    walk = oracles.new_walk(folders[model_type], STAGES, WINDOWS, device=DEVICE)
    parts = []
    for part in walk.parts():
        parts.append(part)
        save_file({name: tensor.contiguous() for name, tensor in walk.state().items()}, tmp_path / f"{part.index}")
    for done in range(1, len(parts)):
        again = oracles.new_walk(folders[model_type], STAGES, WINDOWS, device=DEVICE)
        again.restore(load_file(tmp_path / f"{done - 1}"), done)
        for part, undisturbed in zip(again.parts(), parts[done:], strict=True):
            assert all(torch.equal(part.tensors[name], undisturbed.tensors[name]) for name in undisturbed.tensors)


@pytest.mark.parametrize("cache_memory", [oracles.UNLIMITED, 0], ids=["in memory", "on disk"])
def test_activations_that_the_device_does_not_hold_give_the_same_bytes(cache_memory, folders, monkeypatch):
    on_device = oracles.walked(folders["llama"], STAGES, WINDOWS, device=DEVICE)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 0))
    elsewhere = oracles.walked(folders["llama"], STAGES, WINDOWS, device=DEVICE, cache_memory=cache_memory)
    assert all(torch.equal(on_device.tensors[name], elsewhere.tensors[name]) for name in on_device.tensors)


HOW: dict[str, dict[str, Any]] = {
    "slicegpt": {"stages": slicegpt({"ratio": 0.3})},
    "anchored": {"stages": anchored({"ratio": 0.3}, units={"neurons": {"ratio": 0.25}})},
    "anchored, per layer": {"stages": anchored({"ratio": 0.3}, rotation="per-layer")},
    "lord": {"stages": lowrank("lord", {"rank_frac": 0.4}, form="factors")},
    # In 8 bits a weight that is rounded the other way makes little of a difference.
    "slim": {
        "stages": slim(
            prune={"method": "wanda", "pattern": "2:4"},
            quantize={"method": "mse", "num_bits": 8, "strategy": "channel"},
            adapt={"method": "slim", "rank": 0.2},
            refit=False,
            form="compact",
        )
    },
    "low rank, budget": {
        "stages": lowrank("anchored", {}, allocation="auto", gradient_weight=0.9),
        "budget": {"keep_params": 0.7, "trial_samples": 8},
    },
    "budget": {"stages": anchored({}, units={"neurons": {}}), "budget": {"keep_params": 0.7, "trial_samples": 8}},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("model_type", ["opt", "llama", "phi"])
def test_the_pipeline_from_end_to_end(model_type, how, tmp_path):
    """Written, reloaded in a clean process on the CPU, and close to what the CPU writes; it runs on the GPU too."""
    tiny.write_model(tmp_path / "dense", model_type, dtype=torch.float32)
    text = tiny.write_text(tmp_path / "text.txt")
    recipe = parse_recipe({"method": "any", "calibration": {"source": str(text), "samples": 8, "seq_len": 32}, **how})
    models: list[Any] = []
    for device in ("cpu", DEVICE):
        out = tmp_path / device
        result = run(
            Job(
                model=find_model(str(tmp_path / "dense")),
                recipe=recipe,
                out=out,
                command="compress slice",
                device=torch.device(device),
            )
        )
        assert result.difference < 1e-4
        models.append(AutoModelForCausalLM.from_pretrained(out).eval())
    here, there = (oracles.logits_of(model, UNSEEN) for model in models)
    assert oracles.largest_difference(here, there) < 1e-3
    on_device = oracles.logits_of(models[1].to(DEVICE), UNSEEN.to(DEVICE)).cpu()
    assert oracles.largest_difference(on_device, there) < 1e-3
