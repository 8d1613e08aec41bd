"""Leaving out blocks: which go, what is left of the model, and that all else is as on the model that never had them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import oracles
import tiny
from compress import pipeline
from compress.calibration.depth import Depth
from compress.errors import UsageError
from compress.models.loading import with_blocks
from compress.numerics.functional import kl_divergence
from compress.planning.prepare import depth_site, prepare
from recipes import anchored
from runs import job_of, tensors_of, unproved

BLOCKS = 4
# Models whose blocks are built in two ways.
MIXED: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {},
    "deepseek_v3": {"first_k_dense_replace": 2},
    "qwen3_moe": {"decoder_sparse_step": 2, "intermediate_size": 40},
}
IDS = oracles.random_ids(2, 24, seed=3)
DROP = {"stage": "drop_blocks", "count": 1}
REFIT = {"stage": "refit"}
LORD = [REFIT, {"stage": "factorize", "allocation": "fisher", "rank_frac": 0.5, "multiple": 4}]
RECIPES = {
    "low rank": LORD,
    "sliced": anchored({"width": 16}, rotation="per-layer"),
    "num_bits": [REFIT, {"stage": "slim", "quantize": {"num_bits": 4, "group_size": 8}, "form": "compact"}],
}


def idle(model: PreTrainedModel, block: int) -> None:
    """Let a block add nothing to the stream."""
    layer = model.model.layers[block]
    with torch.no_grad():
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.zero_()
            writer.bias.zero_()


def without(model: PreTrainedModel, *dropped: int) -> PreTrainedModel:
    """The stock model of the blocks that are left."""
    kept = [block for block in range(BLOCKS) if block not in dropped]
    short = AutoModelForCausalLM.from_config(with_blocks(model.config, kept), dtype=model.dtype).eval()
    names = {f"model.layers.{new}.": f"model.layers.{old}." for new, old in enumerate(kept)}
    dense = model.state_dict()
    short.load_state_dict(
        {
            name: dense[next((name.replace(new, old) for new, old in names.items() if name.startswith(new)), name)]
            for name in short.state_dict()
        }
    )
    return short


def logits(folder: Path | PreTrainedModel) -> Tensor:
    model = folder if isinstance(folder, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def written(
    folder: Path, model_type: str = "llama", *, idle_block: int | None = None, **options: Any
) -> PreTrainedModel:
    options = {"dtype": torch.float32, "num_hidden_layers": BLOCKS} | options
    model = tiny.tiny_model(model_type, **options)
    if idle_block is not None:
        idle(model, idle_block)
    save(model, folder)
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder / "dense")
    tiny.tiny_tokenizer().save_pretrained(folder / "dense")
    tiny.write_text(folder / "text.txt", lines=60)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "smollm3", *MIXED])
def test_without_a_refit_the_rest_is_as_it_was(tmp_path, model_type):
    model = written(tmp_path, model_type, **MIXED.get(model_type, {}))
    with unproved():
        result = pipeline.run(job_of(tmp_path, model_type, [{"stage": "drop_blocks", "blocks": [2, 1]}]))
    assert result.metadata.loads_without_our_code
    torch.testing.assert_close(logits(tmp_path / "out"), logits(without(model, 1, 2)), rtol=0, atol=1e-5)


def test_blocks_go_by_the_divergence_of_the_model_without_them(tmp_path):
    model = written(tmp_path)
    prepared = prepare(job_of(tmp_path, "llama", [{"stage": "drop_blocks", "count": 2}]))
    depth = depth_site(prepared, 2, lambda _: None)
    prepared.plan.stages[0].apply(depth)
    ids = torch.cat([batch.ids for batch in depth.batches])

    def divergence(*dropped: int) -> float:
        with torch.no_grad():
            return float(kl_divergence(model(ids).logits, without(model, *dropped)(ids).logits).mean())

    found = list[int](), list[float]()
    for _ in range(2):
        rises = {block: divergence(*found[0], block) for block in range(BLOCKS) if block not in found[0]}
        found[0].append(min(rises, key=rises.__getitem__))
        found[1].append(min(rises.values()))
    assert depth.dropped == tuple(found[0])
    torch.testing.assert_close(depth.divergences, tuple(found[1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_else_is_as_on_the_model_that_never_had_the_block(tmp_path, recipe):
    model = written(tmp_path, idle_block=2)
    save(without(model, 2), tmp_path / "short")
    with unproved():
        result = pipeline.run(job_of(tmp_path, "llama", [DROP, *RECIPES[recipe]]))
        pipeline.run(job_of(tmp_path / "short", "llama", RECIPES[recipe]))
    assert "Blocks left out, counted from 0: 2." in result.notes
    ours, short = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "short" / "out")
    assert ours.keys() == short.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, short[name], rtol=1e-3, atol=1e-4)


def test_what_writes_before_the_gap_is_fitted_to_the_stream_after_it(tmp_path):
    written(tmp_path)
    found = {}
    with unproved():
        for name, stages in {"refitted": [DROP, REFIT], "not": [DROP, {**REFIT, "damping": 1e9}]}.items():
            found[name] = pipeline.run(
                job_of(tmp_path, "llama", stages, out=name, samples=64)
            ).metadata.held_out_divergence
    assert found["refitted"] < 0.9 * found["not"]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            [{"stage": "drop_blocks", "count": 4}],
            "drop_blocks has count 4; the model has 4 blocks, counted from 0. Leave out fewer.",
        ),
        (
            [{"stage": "drop_blocks", "blocks": [1, 7]}],
            "drop_blocks has blocks .1, 7.; the model has 4 blocks, counted from 0",
        ),
        ([REFIT, DROP], "drop_blocks comes first; the order is refit, drop_blocks"),
        ([{**DROP, "blocks": [1]}], "drop_blocks takes one of count, keep, blocks; got count, blocks"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, stages, said):
    written(tmp_path)
    with pytest.raises(UsageError, match=said):
        pipeline.run(job_of(tmp_path, "llama", stages))


def test_blocks_are_chosen_once(tmp_path, monkeypatch):
    written(tmp_path)

    def interrupt(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    job = job_of(tmp_path, "llama", [DROP, REFIT])
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_survey", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(job)
    monkeypatch.setattr(Depth, "measure", interrupt)
    with unproved():
        pipeline.run(job_of(tmp_path, "llama", [DROP, REFIT]).__class__(**{**vars(job), "resume": True}))
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers) == BLOCKS - 1


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "opt"])
def test_idle_units_go_and_the_stream_stays_as_it_is(tmp_path, model_type):
    """Norms, a tied head and the class are the dense model's own where nothing changes the stream."""
    model = tiny.tiny_model(model_type, dtype=torch.float32, num_hidden_layers=2, tie_word_embeddings=True)
    writers = {"opt": "fc2"}.get(model_type, "mlp.down_proj")
    layers = model.model.decoder.layers if model_type == "opt" else model.model.layers
    with torch.no_grad():
        for layer in layers:
            layer.get_submodule(writers).weight[:, 16:] = 0
    save(model, tmp_path)
    with unproved():
        stages = [REFIT, {"stage": "prune_units", "units": "neurons", "keep": 16}]
        result = pipeline.run(job_of(tmp_path, model_type, stages, samples=64))
    assert result.metadata.loads_without_our_code
    assert result.units["neurons"] == 16
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.config.tie_word_embeddings
    assert type(found) is type(model)
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-3)


def test_a_budget_may_leave_blocks_out_and_keep_the_head_tied(tmp_path):
    model = tiny.tiny_model("llama", dtype=torch.float32, num_hidden_layers=BLOCKS, tie_word_embeddings=True)
    idle(model, 1)
    save(model, tmp_path)
    stages = [{"stage": "drop_blocks"}, *anchored({}, units={"neurons": {}})]
    with unproved():
        result = pipeline.run(job_of(tmp_path, "llama", stages, samples=64, budget={"keep_params": 0.72}))
    assert result.size.parameters <= 0.72 * result.dense.parameters
    assert "Blocks left out, counted from 0: 1." in result.notes
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (found.config.hidden_size, found.config.tie_word_embeddings) == (tiny.HIDDEN, True)


def test_the_only_shape_that_fits_keeps_the_stream_and_loses_its_block(tmp_path):
    """The one choice of a budget is made while planning, before it is known which block goes."""
    model = tiny.tiny_model("llama", dtype=torch.float32, num_hidden_layers=BLOCKS, tie_word_embeddings=True)
    idle(model, 1)
    save(model, tmp_path)
    stages = [DROP, *anchored({}, round_to=tiny.HIDDEN, units={"neurons": {}})]
    with unproved():
        pipeline.run(job_of(tmp_path, "llama", stages, samples=64, budget={"keep_params": 0.9}))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (len(found.model.layers), found.config.hidden_size) == (BLOCKS - 1, tiny.HIDDEN)
    assert found.config.tie_word_embeddings
    torch.testing.assert_close(found.model.norm.weight, model.model.norm.weight)
