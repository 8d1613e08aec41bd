"""Our own class beside the stock one: what it is without any part, its names, and the formats that are refused."""

import json
from typing import Any

import pytest
import torch

import compress
import oracles
import tiny
from compress import families
from compress.checkpoints.metadata import read_metadata
from compress.errors import CheckpointError
from compress.models.loading import load_config
from compress.own_model.configuration_compress import CompressConfig
from compress.own_model.modeling_compress import CompressForCausalLM, unfuse_experts
from compress.version import FORMAT

IDS = oracles.random_ids(2, 12, seed=5).clamp_min(3)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in tiny.EVERY},
    "opt, 350M": ("opt", tiny.OPT_350M),
}


def without_parts(stock: Any) -> CompressForCausalLM:
    before = torch.get_default_dtype()
    torch.set_default_dtype(stock.dtype)
    try:
        structure = families.find(stock.config).structure()
        return CompressForCausalLM(CompressConfig(text_config=stock.config, structure=structure)).eval()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", MODELS)
def test_without_any_part_it_is_the_stock_model(name):
    model_type, changes = MODELS[name]
    stock: Any = unfuse_experts(tiny.tiny_model(model_type, **changes))
    own = without_parts(stock)
    own.load_state_dict(stock.state_dict())
    assert own.all_tied_weights_keys == stock.all_tied_weights_keys
    with torch.no_grad():
        expected, found = (model(input_ids=IDS, labels=IDS) for model in (stock, own))
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("kind", ["sliced", "lowrank", "compact_lowrank_sliced"])
def test_a_checkpoint_of_the_first_format_is_to_be_made_again(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": f"compress_{kind}", "text_config": {}}))
    for read in (load_config, lambda folder: compress.load(folder)):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        assert str(caught.value) == (
            f"{tmp_path} is a checkpoint of format 1; this version of compress reads format {FORMAT}. "
            "Make it again with this version."
        )


@pytest.mark.parametrize(
    ("facts", "said"),
    [({}, r"format 1; .* Make it again"), ({"format": FORMAT + 1}, rf"format {FORMAT + 1}; .* Update compress\.")],
)
def test_what_a_checkpoint_says_of_itself_is_of_one_format(facts, said, tmp_path):
    (tmp_path / "compress.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=said):
        read_metadata(tmp_path)
