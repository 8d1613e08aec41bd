"""A written checkpoint as its users meet it: loaded, run, generated from, trained, saved again, and tampered with."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import contract
import oracles
import tiny
from compress import pipeline
from compress.checkpoints.verify import verify
from compress.datasets.windows import calibration_windows
from compress.errors import UsageError, VerificationError
from compress.models.hub import find_model
from compress.own_model.modeling_compress import CompressForCausalLM
from compress.planning.prepare import Job
from compress.recipe import parse_recipe
from recipes import slicegpt
from runs import proved_here

RULE = {"ratio": 0.3}
NARROW, DENSE = 22, tiny.HIDDEN
UNSEEN = oracles.random_ids(2, 24, seed=3)
SAMPLES, SEQ_LEN, SEED = 5, 32, 42
EVERY_KIND = pytest.mark.parametrize("model_type", ["opt", "phi3", "gpt_bigcode"])


@dataclass
class Made:
    """A checkpoint, the dense model it was made of, and what the walk said of its probe."""

    dense: Any
    source: Path
    out: Path
    probe: tuple[Tensor, Tensor]
    result: pipeline.output.Result


def job(folder: Path, stages: Any) -> Job:
    """Of the model that is written in `folder / "dense"`."""
    text = tiny.write_text(folder / "text.txt")
    calibration = {"source": str(text), "samples": SAMPLES, "seq_len": SEQ_LEN}
    recipe = parse_recipe({"method": "slicegpt", "stages": stages, "calibration": calibration, "seed": SEED})
    source = find_model(str(folder / "dense"))
    return Job(model=source, recipe=recipe, out=folder / "out", batch_size=2, command="compress slice")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Made]:
    """Checkpoints of the pipeline in float64, each written once."""
    finished: dict[str, Made] = {}

    def make(model_type: str) -> Made:
        if model_type not in finished:
            root = tmp_path_factory.mktemp(model_type)
            dense = tiny.write_model(root / "dense", model_type)
            run = contract.run_noted(job(root, slicegpt(RULE, round_to=1)))
            finished[model_type] = Made(dense, root / "dense", run.out, run.probe, run.result)
        return finished[model_type]

    return make


def varied(model_type: str) -> dict[str, Any]:
    """Another width in every block, as far as the stock code lets."""
    same_ends = {"block_ratios": (0.1, 0.5, 0.1), "slice_head": True}
    return same_ends if model_type in tiny.ONE_END else {"block_ratios": (0.1, 0.5, 0.3)}


@pytest.fixture(scope="module")
def any_model(tmp_path_factory) -> Callable[..., Any]:
    """A sliced model of any family in memory, a new one each time, from the tensors of one walk."""
    walked: dict[str, oracles.Walked] = {}

    def make(model_type: str, *, stages: Any = None, **changes: Any) -> Any:
        key = f"{model_type} {stages} {changes}"
        if key not in walked:
            folder = tmp_path_factory.mktemp(model_type)
            tiny.tiny_model(model_type, **changes).save_pretrained(folder)
            stages = stages or oracles.slicegpt(varied(model_type))
            walked[key] = oracles.walked(folder, stages, oracles.random_ids(3, 16))
        return oracles.sliced_model(walked[key])

    return make


def test_it_loads_and_says_what_the_paper_says(made):
    """Against SliceGPT written out, from the same weights and the same windows."""
    checkpoint = made("opt")
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint.out, output_loading_info=True)
    assert type(model) is CompressForCausalLM
    assert not any(info.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.source)
    text = str(checkpoint.source.with_name("text.txt"))
    windows = calibration_windows(text, tokenizer, num_samples=SAMPLES, seq_len=SEQ_LEN, seed=SEED, data_dir=None)
    paper = oracles.PaperSliceGPT(checkpoint.dense)
    paper.slice(windows, lambda point, eigenvalues: DENSE if point == 2 * tiny.NUM_BLOCKS else NARROW)
    expected = paper.logits(UNSEEN)
    # Statistics are float32 products there: directions of almost equal variance turn a little.
    assert oracles.largest_difference(oracles.logits_of(model.eval(), UNSEEN), expected) < 1e-8
    # Slicing is no small change, so that the agreement means something.
    assert oracles.largest_difference(oracles.logits_of(checkpoint.dense, UNSEEN), expected) > 0.1


def test_the_config_says_what_it_is(made):
    checkpoint = made("opt")
    config = json.loads((checkpoint.out / "config.json").read_text())
    dense = config["text_config"]
    assert (config["model_type"], config["architectures"]) == ("compress", ["CompressForCausalLM"])
    assert (config["tie_word_embeddings"], dense["tie_word_embeddings"], config["dtype"]) == (False, False, "float64")
    assert (dense["model_type"], dense["hidden_size"]) == ("opt", DENSE)
    assert checkpoint.result.widths == [NARROW] * 6 + [DENSE]
    assert config["slicing"] == {
        **{"stream_widths": checkpoint.result.widths, "shortcuts": True, "mlp_widths": None},
        **{"norm_width": DENSE, "norm_eps": 1e-5, "reader_bias": True},
    }
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 2)
    assert config["auto_map"] == {
        "AutoConfig": "configuration_compress.CompressConfig",
        "AutoModel": "modeling_compress.CompressModel",
        "AutoModelForCausalLM": "modeling_compress.CompressForCausalLM",
    }
    said = json.loads((checkpoint.out / "compress.json").read_text())
    assert said["not_for_vllm"] == "of our architecture it is known to run only llama, mistral, qwen2, qwen3"
    assert str(checkpoint.source) not in (checkpoint.out / "config.json").read_text()
    loaded: Any = AutoConfig.from_pretrained(checkpoint.out)
    assert (loaded.vocab_size, loaded.get_text_config().num_hidden_layers) == (tiny.VOCAB_SIZE, tiny.NUM_BLOCKS)
    assert checkpoint.dense.config.tie_word_embeddings  # of the dense model; it was tied


def generate(model: Any, ids: Tensor, tokens: int, **options: Any) -> Tensor:
    generated: Tensor = model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=2, **options
    )
    return generated


@EVERY_KIND
def test_padding_on_the_left_changes_nothing(model_type, any_model):
    model = any_model(model_type)
    ids = oracles.random_ids(1, 9, seed=5).clamp_min(3)
    padded = torch.cat([torch.full((1, 4), 2), ids], dim=1)
    mask = (padded != 2).long()
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        beside = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    assert oracles.largest_difference(alone, beside) < 1e-6
    assert torch.equal(
        generate(model, padded, 8, attention_mask=mask)[:, 4:],
        generate(model, ids, 8, attention_mask=torch.ones_like(ids)),
    )


@EVERY_KIND
def test_every_parameter_learns(model_type, any_model):
    """With gradient checkpointing as without: the same gradients."""
    model = any_model(model_type).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            # Since transformers 5.20 or so the other is deprecated.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            assert all(block.gradient_checkpointing for block in model.get_submodule(model.config.structure["blocks"]))
        model.zero_grad()
        output = model(input_ids=UNSEEN, labels=UNSEEN, use_cache=False)
        output.loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name in gradients[0]:
        assert gradients[0][name].abs().max() > 0, name
        assert oracles.largest_difference(gradients[0][name], gradients[1][name]) < 1e-10, name


def test_accelerate_may_place_it(made):
    out = made("opt").out
    placed, whole = (AutoModelForCausalLM.from_pretrained(out, device_map=where).eval() for where in ("auto", None))
    assert torch.equal(oracles.logits_of(placed, UNSEEN), oracles.logits_of(whole, UNSEEN))
    # A block stays in one place: its shortcuts add what came in to what its branches give.
    sizes = {"cpu": whole.get_memory_footprint() * 6 // 10, "disk": 10**9}
    places = infer_auto_device_map(whole, max_memory=sizes, no_split_module_classes=whole._no_split_modules)
    assert set(places.values()) == {"cpu", "disk"}
    blocks = f"{whole.config.structure['blocks']}."
    assert all(name.removeprefix(blocks).count(".") == 0 for name in places if name.startswith(blocks))


def lose_a_tensor(tensors: dict[str, Tensor]) -> None:
    del tensors["model.decoder.embed_tokens.weight"]


def change_a_value(tensors: dict[str, Tensor]) -> None:
    tensors["model.decoder.embed_tokens.weight"] *= 1.01


def test_the_ends_of_the_stream_are_alike_where_the_stock_code_has_it_so(tmp_path):
    tiny.write_model(tmp_path / "dense", "codegen")
    with pytest.raises(UsageError) as error:
        pipeline.plan_only(job(tmp_path, slicegpt(RULE, round_to=1)))
    assert str(error.value) == (
        f"The stock code of codegen gives the head a stream as wide as the embeddings', here {DENSE} and "
        f"{NARROW}. Give one ratio for all blocks, and use --set slice.slice_head=true."
    )


@pytest.mark.parametrize(
    ("tampering", "said"),
    [
        (lose_a_tensor, "The written checkpoint has missing keys on reload: model.decoder.embed_tokens.weight."),
        (change_a_value, "The written checkpoint reloads with other logits: they differ by "),
    ],
)
def test_what_was_changed_fails_the_proof(tampering, said, made, tmp_path):
    """test_cli.py has the proof in a process of its own, test_slim_world.py with little memory."""
    checkpoint = made("opt")
    shutil.copytree(checkpoint.out, tmp_path / "tampered")
    file = min((tmp_path / "tampered").glob("*.safetensors"))
    tensors = load_file(file)
    tampering(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with proved_here(tmp_path / "modules"), pytest.raises(VerificationError) as error:
        verify(tmp_path / "tampered", *checkpoint.probe, memory=10**9)
    assert str(error.value).startswith(said)
