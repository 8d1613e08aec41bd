"""Sliced models of stock shape: what stock transformers computes from them; test_every_family.py does without our code.

Most models here are float64, and so are their norms, so that what is promised to be exact can be told from what is not.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import oracles
import tiny
from compress import pipeline
from compress.architectures.stock import Stock
from compress.calibration.survey import Survey
from compress.calibration.walk import shared_frame
from compress.errors import UsageError
from compress.models.hub import find_model
from compress.numerics.frames import Frame
from compress.planning.prepare import Job, Prepared, take_survey
from compress.recipe import parse_recipe
from recipes import anchored
from runs import tensors_of, unproved

D, HEADS, NEURONS, BLOCKS = tiny.HIDDEN, 4, 48, 2
NARROW = 22
IDLE = 16  # of the neurons
EXACT = 1e-9
# Longer than the sliding windows, so that they cut something off.
IDS = oracles.random_ids(2, 24, seed=3)

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "LlamaForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "gemma": "GemmaForCausalLM",
}
# Of a block: what writes the stream, attention's first.
WRITERS = {
    "opt": ("self_attn.out_proj", "fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
}
GATED_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
EPSILON = {"phi": "layer_norm_eps", "starcoder2": "norm_epsilon"}


@dataclass(frozen=True)
class Variant:
    """
    width: what is kept; for a class whose heads have to divide it, a multiple of 4.
    """

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    width: int = NARROW

    @property
    def head_dim(self) -> int:
        return 12 if self.model_type == "gemma" else D // HEADS

    @property
    def groups(self) -> int:
        """How many KV groups there are; 0 where they cannot be deleted."""
        return {"phi3": 0, "phi": HEADS}.get(self.model_type, 2)

    @property
    def is_layer_norm(self) -> bool:
        return self.model_type in ("phi", "starcoder2")

    def directions(self, width: int) -> int:
        """How many directions of the stream a stock hidden size holds."""
        return width - {"phi": 1, "starcoder2": 2}.get(self.model_type, 0)


# Epsilons are large and the rotary angles unusual, so that what is lost of them shows.
RMS: dict[str, Any] = {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
TIED = {"tie_word_embeddings": True}
VARIANTS = {
    "llama": Variant("llama", {**RMS, "attention_bias": False, "mlp_bias": False}, width=20),
    "qwen2": Variant("qwen2", RMS, width=20),
    "phi": Variant("phi", {"layer_norm_eps": 1e-2}),
    "starcoder2": Variant("starcoder2", {**TIED, "norm_epsilon": 1e-2}),
    "phi3": Variant("phi3", RMS),
    "gemma": Variant("gemma", RMS),
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.1, 2.2, 2.3],
    "original_max_position_embeddings": 64,
    "factor": 1.0,
}
OURS = "The result is written in our architecture: "
# What no stock class has room for, and what the user is told.
FALLBACKS = {
    "phi3, longrope": (
        Variant("phi3", {**RMS, "rope_parameters": LONGROPE}),
        f"{OURS}its config class checks the longrope factors against hidden_size / heads, which no longer holds.",
    ),
    "qwen2, window": (
        Variant("qwen2", {**RMS, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        f"{OURS}its layers attend within a sliding window, which a Llama has not.",
    ),
    "phi, qk_layernorm": (
        Variant("phi", {"layer_norm_eps": 1e-2, "qk_layernorm": True}),
        f"{OURS}it normalizes queries and keys at hidden_size / heads (qk_layernorm).",
    ),
    "opt": (
        Variant("opt"),
        "opt ties the heads' size to the hidden one, so the result is written in our architecture.",
    ),
}


@dataclass(frozen=True)
class Case:
    """A checkpoint to be written.

    width: kept of the stream. units: that are deleted, which do nothing. gain_dtype: what the layout takes the output
    dtype to be, where that is another.
    """

    variant: Variant
    width: int
    units: dict[str, dict[str, int]] = field(default_factory=dict)
    gain_dtype: torch.dtype | None = None

    @property
    def heads(self) -> int:
        groups = self.units.get("kv_groups", {}).get("keep", self.variant.groups)
        return HEADS // self.variant.groups * groups if self.variant.groups else HEADS


@dataclass
class Written:
    """projected: the logits for IDS of the dense model with its stream projected."""

    case: Case
    dense: Any
    out: Path
    result: pipeline.output.Result
    projected: Tensor

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "config.json").read_text(encoding="utf-8"))
        return found


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for name, variant in VARIANTS.items():
        width, neurons = variant.width, {"neurons": {"keep": NEURONS - IDLE}}
        units = neurons | ({"kv_groups": {"keep": variant.groups - 1}} if variant.groups else {})
        fewer_heads = NARROW if width % HEADS == 0 else width  # no multiple of the dense model's heads
        if name in ("llama", "phi"):
            found[f"{name}: idle units"] = Case(variant, fewer_heads, units=units)
        elif name == "gemma":
            found[f"{name}: rounded gain"] = Case(variant, width, gain_dtype=torch.bfloat16)
        else:
            found[f"{name}: sliced"] = Case(variant, width)
        if name == "starcoder2":
            found[f"{name}: full width"] = Case(variant, D, units=neurons)
    return found | {f"{name}: fallback": Case(variant, NARROW) for name, (variant, _) in FALLBACKS.items()}


CASES = cases()


def writers_of(model: Any) -> Iterator[list[Any]]:
    """Of each block, the linears that write the stream: attention's, then the MLP's."""
    names = WRITERS.get(model.config.model_type, GATED_WRITERS)
    blocks = model.model.decoder.layers if model.config.model_type == "opt" else model.model.layers
    for block in blocks:
        yield [block.get_submodule(name) for name in names]


@torch.no_grad()
def dense_model(case: Case) -> Any:
    """With idle units, if the case has them: in each block other neurons, and one other group of heads."""
    changes = {"num_hidden_layers": BLOCKS, **copy.deepcopy(case.variant.changes)}
    model: Any = tiny.tiny_model(case.variant.model_type, **changes)
    if case.units:
        generator = torch.Generator().manual_seed(11)
        for number, (attention, mlp) in enumerate(writers_of(model)):
            mlp.weight[:, torch.randperm(NEURONS, generator=generator)[:IDLE]] = 0
            if groups := case.variant.groups:
                attention.weight.view(D, groups, -1)[:, (number + 1) % groups] = 0
    return model


def projected_logits(dense: Any, P: Tensor) -> Tensor:
    """The dense model, everything that writes the stream followed by x -> x P; norms divide by the dense width.

    A LayerNorm model's P takes the stream's mean away with the rest, which no norm lets pass.
    """
    model = copy.deepcopy(dense)
    tables = [model.get_input_embeddings()]
    if model.config.model_type == "opt":
        tables.append(model.model.decoder.embed_positions)
    for module in [*tables, *(linear for linears in writers_of(model) for linear in linears)]:
        module.register_forward_hook(lambda module, inputs, output: output @ P)
    return oracles.logits_of(model, IDS)


def job_of(case: Case, source: Path, out: Path, text: Path) -> Job:
    stages = anchored({"width": case.width}, refit=False, units=case.units)
    calibration = {"source": str(text), "samples": 5, "seq_len": 32}
    recipe = parse_recipe({"method": "anchored", "stages": stages, "calibration": calibration, "dtype": "float64"})
    return Job(model=find_model(str(source)), recipe=recipe, out=out, command="compress slice")


def write(case: Case, folder: Path) -> Written:
    dense = dense_model(case)
    dense.save_pretrained(folder / "dense")
    tiny.tiny_tokenizer().save_pretrained(folder / "dense")
    job = job_of(case, folder / "dense", folder / "out", tiny.write_text(folder / "text.txt", lines=60))
    frames, stock_layout = list[Frame](), Stock.layout

    def overhear(prepared: Prepared, begin: Callable[[str], None]) -> Survey | None:
        survey = take_survey(prepared, begin)
        frames.append(shared_frame(prepared.plan.stages, survey, layer_norm=prepared.family.norm == "layer"))
        return survey

    with unproved(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "take_survey", overhear)
        if gain_dtype := case.gain_dtype:
            patch.setattr(Stock, "layout", lambda target, dtype: stock_layout(target, gain_dtype))
        result = pipeline.run(job)
    directions = case.variant.directions(case.width) if result.metadata.loads_without_our_code else case.width
    P = frames[0].encode(directions) @ frames[0].decode(directions)
    return Written(case, dense, folder / "out", result, projected_logits(dense, P))


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_projected_model_in_its_class(name, tmp_path):
    made = write(CASES[name], tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(made.out, output_loading_info=True)
    assert not any(info.values())
    logits = oracles.logits_of(model.eval(), IDS)
    assert oracles.largest_difference(logits, made.projected) < EXACT
    # Slicing is no small change, so that the agreement means something. LayerNorm's stream has a direction less than
    # channels, and a head without a bias takes one away for its constant: Starcoder2 loses one at its full width.
    lost = oracles.largest_difference(logits, oracles.logits_of(made.dense, IDS))
    assert 1e-3 < lost < 10 if "full width" in name else lost > 0.1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    if "fallback" in name:
        is_ours(made, name, model)
    else:
        is_stock(made, model)


def is_ours(made: Written, name: str, model: Any) -> None:
    assert made.result.notes == [FALLBACKS[name.split(": ")[0]][1]]
    assert not made.result.metadata.loads_without_our_code
    assert made.result.metadata.architecture == type(model).__name__ == "CompressForCausalLM"
    assert made.config["slicing"]["shortcuts"] is False
    assert not any("shortcut" in key for key in tensors_of(made.out))


def is_stock(made: Written, model: Any) -> None:
    """Without code of ours, and its config says what it is, as JSON too, where engines read it without defaults."""
    case, variant, raw = made.case, made.case.variant, made.config
    assert made.result.metadata.loads_without_our_code
    assert made.result.metadata.architecture == type(model).__name__ == CLASSES[variant.model_type]
    assert list(made.out.glob("*.py")) == []
    epsilon = EPSILON.get(variant.model_type, "rms_norm_eps")
    expected = {
        "architectures": [CLASSES[variant.model_type]],
        "hidden_size": case.width,
        "head_dim": variant.head_dim,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.units.get("kv_groups", {}).get("keep", made.dense.config.num_key_value_heads),
        "intermediate_size": case.units.get("neurons", {}).get("keep", NEURONS),
        "num_hidden_layers": BLOCKS,
        "vocab_size": tiny.VOCAB_SIZE,
        "tie_word_embeddings": False,
        "dtype": "float64",
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        epsilon: pytest.approx(getattr(made.dense.config, epsilon) * D / case.width, rel=1e-12),
    }
    assert {key: raw.get(key) for key in expected} == expected
    loaded = model.config.to_dict() | {"dtype": raw["dtype"]}
    assert {key: loaded.get(key) for key in expected} == expected
    assert raw["rope_parameters"] == made.dense.config.rope_parameters
    assert raw.get("sliding_window") == getattr(made.dense.config, "sliding_window", None)
    assert not {"auto_map", "_name_or_path", "quantization_config"} & set(raw)
    assert str(made.out.parent) not in (made.out / "config.json").read_text(encoding="utf-8")


HEADS_DIVIDE = "A hidden size of {} is no multiple of the {} attention heads, as LlamaForCausalLM asks for. Use {}."
ONE_WIDTH = "One basis for the whole stream has one width. Give one ratio for all blocks, or use --rotation per-layer."
NO_GROUPS = (
    "This model has no kv_groups that could be deleted in every block. Leave prune_units out: compress slice --ratio "
    "narrows the stream alone."
)
STOCK_ALONE = "KV groups can be deleted only where the model keeps a stock shape."
GROUP = {"kv_groups": {"keep": 1}}
SHORT_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
HEAD_LEFT = [*anchored({"ratio": 0.25})[:2], {"stage": "slice", "ratio": 0.25, "round_to": 4}, {"stage": "refit"}]
REFUSED: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    ("qwen2", anchored({"width": 22}), {}, HEADS_DIVIDE.format(22, 4, "--round-to 4")),
    ("qwen2", anchored({"width": 21}, units=GROUP), {}, HEADS_DIVIDE.format(21, 2, "--round-to 2")),
    ("llama", anchored({"linear_ratios": [0.1, 0.5]}, round_to=4), {}, ONE_WIDTH),
    ("llama", HEAD_LEFT, {}, ONE_WIDTH),
    (
        *("starcoder2", anchored({"width": 2}), {}),
        "A hidden size of 2 leaves no direction of the stream. Slice less.",
    ),
    ("phi3", anchored({"width": 16}, units=GROUP), {}, NO_GROUPS),
    ("llama", anchored({"width": 16}, rotation="per-layer", units=GROUP), {}, STOCK_ALONE),
    ("qwen2", anchored({"width": 16}, units=GROUP), SHORT_WINDOW, STOCK_ALONE),
]


@pytest.mark.parametrize(("model_type", "stages", "changes", "said"), REFUSED)
def test_what_has_no_shape_is_refused(model_type, stages, changes, said, tmp_path):
    tiny.tiny_config(model_type, **changes).save_pretrained(tmp_path / "dense")
    calibration = {"source": "stdlib", "samples": 4, "seq_len": 32}
    recipe = parse_recipe({"method": "anchored", "stages": stages, "calibration": calibration})
    job = Job(model=find_model(str(tmp_path / "dense")), recipe=recipe, out=tmp_path / "out", command="compress slice")
    with pytest.raises(UsageError) as error:
        pipeline.plan_only(job)
    assert str(error.value) == said
