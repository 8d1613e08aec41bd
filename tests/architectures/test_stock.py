"""Sliced models of stock shape: what stock transformers computes from them, in a process that has no code of ours.

Most models here are float64, and so are their norms, so that what is promised to be exact can be told from what is not.
The checkpoints that the selected tests ask for are written first, then one clean process looks at all of them
(stock_probe.py).
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

import contract
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
from runs import tensors_of

D, HEADS, NEURONS, BLOCKS = tiny.HIDDEN, 4, 48, 2
NARROW = 22
IDLE = 16  # of the neurons
EXACT = 1e-9
# Longer than the sliding windows, so that they cut something off.
IDS = oracles.random_ids(2, 24, seed=3)
PROMPT = oracles.random_ids(2, 12, seed=4).clamp_min(3)

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
    gradient_weight: float = 0.9

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


# ---- what is written ----


@dataclass(frozen=True)
class Case:
    """A checkpoint to be written.

    width: kept of the stream. refit, units: of the anchored method. idle: the units that are deleted do nothing.
    gain_dtype: what the layout takes the output dtype to be, where that is another.
    """

    variant: Variant
    width: int
    dtype: str = "float64"
    refit: bool = False
    units: dict[str, dict[str, int]] = field(default_factory=dict)
    idle: bool = False
    gain_dtype: torch.dtype | None = None

    @property
    def is_exact(self) -> bool:
        """Nothing is fitted, and what is deleted did nothing."""
        return not self.refit and (self.idle or not self.units)

    @property
    def heads(self) -> int:
        groups = self.units.get("kv_groups", {}).get("keep", self.variant.groups)
        return HEADS // self.variant.groups * groups if self.variant.groups else HEADS


@dataclass
class Written:
    """
    projected: the logits for IDS of the dense model with its stream projected. probe: its ids and what the walk made of
        them.
    """

    case: Case
    dense: Any
    out: Path
    result: pipeline.Result
    projected: Tensor
    probe: tuple[Tensor, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return tensors_of(self.out)

    @property
    def config(self) -> dict[str, Any]:
        return self.read("config.json")

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / name).read_text(encoding="utf-8"))
        return found


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for name, variant in VARIANTS.items():
        width, neurons = variant.width, {"neurons": {"keep": NEURONS - IDLE}}
        units = neurons | ({"kv_groups": {"keep": variant.groups - 1}} if variant.groups else {})
        fewer_heads = NARROW if width % HEADS == 0 else width  # no multiple of the dense model's heads
        found[f"{name}: sliced"] = Case(variant, width)
        if name in ("llama", "phi", "gemma"):
            found[f"{name}: refitted, fewer units"] = Case(variant, fewer_heads, refit=True, units=units)
        if name in ("llama", "phi"):
            found[f"{name}: idle units"] = Case(variant, fewer_heads, units=units, idle=True)
        if name == "starcoder2":
            found[f"{name}: full width"] = Case(variant, D, units=neurons, idle=True)
        if name == "gemma":
            found[f"{name}: rounded gain"] = Case(variant, width, gain_dtype=torch.bfloat16)
    return found | {f"{name}: fallback": Case(variant, NARROW) for name, (variant, _) in FALLBACKS.items()}


CASES = cases()
STOCK = ("sliced", "refitted, fewer units", "idle units", "full width", "rounded gain")


def named(*kinds: str) -> pytest.MarkDecorator:
    """A test of all cases of some kinds, by their name."""
    chosen = [name for name in CASES if name.split(": ")[1] in kinds]
    return pytest.mark.parametrize("name", chosen)


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
    if case.idle:
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
    stages = anchored(
        {"width": case.width}, refit=case.refit, units=case.units, gradient_weight=case.variant.gradient_weight
    )
    calibration = {"source": str(text), "samples": 5, "seq_len": 32}
    recipe = parse_recipe({"method": "anchored", "stages": stages, "calibration": calibration, "dtype": case.dtype})
    return Job(model=find_model(str(source)), recipe=recipe, out=out, command="compress slice")


@dataclass
class Overheard:
    """What the pipeline hands on: the dense model's survey, and the probe that is to be proved."""

    family: Any = None
    survey: Any = None
    stages: Any = None
    probe: Any = None

    def take_survey(self, prepared: Prepared, begin: Callable[[str], None]) -> Survey | None:
        self.survey = take_survey(prepared, begin)
        self.family, self.stages = prepared.family, prepared.plan.stages
        return self.survey

    def verify(self, folder: Path, ids: Tensor, logits: Tensor, *, memory: int) -> float:
        self.probe = ids, logits
        return 0.0  # the clean process of this file proves it instead

    @property
    def frame(self) -> Frame:
        """The basis that the stages make of the survey."""
        frame = shared_frame(self.stages, self.survey, layer_norm=self.family.norm == "layer")
        return frame


def write(case: Case, folder: Path) -> Written:
    dense = dense_model(case)
    dense.save_pretrained(folder / "dense")
    tiny.tiny_tokenizer().save_pretrained(folder / "dense")
    job = job_of(case, folder / "dense", folder / "out", tiny.write_text(folder / "text.txt", lines=60))
    overheard, stock_layout = Overheard(), Stock.layout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify", overheard.verify)
        patch.setattr(pipeline, "take_survey", overheard.take_survey)
        if gain_dtype := case.gain_dtype:
            patch.setattr(Stock, "layout", lambda target, dtype: stock_layout(target, gain_dtype))
        result = pipeline.run(job)
    frame = overheard.frame
    directions = case.variant.directions(case.width) if result.is_stock else case.width
    P = frame.encode(directions) @ frame.decode(directions)
    return Written(case, dense, folder / "out", result, projected_logits(dense, P), overheard.probe)


@pytest.fixture(scope="module")
def written(request, tmp_path_factory) -> Iterator[dict[str, Written]]:
    """The checkpoints of all selected tests. Norms are exact, here and in the clean process."""
    selected = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and "name" in item.fixturenames
    ]
    asked = {params["name"] for params in selected}
    with oracles.exact_norms():
        yield {name: write(case, tmp_path_factory.mktemp("stock")) for name, case in CASES.items() if name in asked}


@pytest.fixture(scope="module")
def looked(written, tmp_path_factory) -> contract.Looked:
    return contract.look_at(written, tmp_path_factory.mktemp("looked"), ids=IDS, prompt=PROMPT)


# ---- what is computed ----


@named("sliced", "idle units", "rounded gain", "fallback")
def test_it_computes_the_projected_model(name, written, looked):
    made = written[name]
    difference = oracles.largest_difference(looked.logits[f"{name}/ids"], made.projected)
    assert difference < EXACT
    # Slicing is no small change, so that the agreement means something.
    assert oracles.largest_difference(made.projected, oracles.logits_of(made.dense, IDS)) > 0.1


@named("full width")
def test_at_full_width_starcoder2_loses_a_direction(name, written, looked):
    """LayerNorm's stream has a direction less than channels; a head without a bias takes one away for its constant."""
    made = written[name]
    logits = looked.logits[f"{name}/ids"]
    assert oracles.largest_difference(logits, made.projected) < EXACT
    assert 1e-3 < oracles.largest_difference(logits, oracles.logits_of(made.dense, IDS)) < 10


# ---- what is written ----


@named(*STOCK)
def test_stock_code_loads_it_without_a_complaint(name, written, looked):
    made, found = written[name], looked.models[name]
    assert found["module"].startswith("transformers.models.")
    assert found["class"] == CLASSES[made.case.variant.model_type] == made.result.architecture
    assert found["dtypes"] == [f"torch.{made.case.dtype}"]
    assert found["said"] == []
    assert made.result.is_stock
    assert list(made.out.glob("*.py")) == []


@named("fallback")
def test_what_has_no_stock_shape_is_written_in_ours(name, written, looked):
    made, found = written[name], looked.models[name]
    _, note = FALLBACKS[name.split(": ")[0]]
    assert made.result.notes == [note]
    assert not made.result.is_stock
    assert made.result.architecture == found["class"] == "CompressForCausalLM"
    assert found["module"].startswith("transformers_modules.")
    assert made.config["slicing"]["shortcuts"] is False
    assert not any("shortcut" in key for key in made.tensors)


@named(*STOCK)
def test_the_config_says_what_it_is(name, written, looked):
    """As JSON, too, where engines read it without the defaults of transformers."""
    made = written[name]
    case, variant, raw = made.case, made.case.variant, made.config
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
        "dtype": case.dtype,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        epsilon: pytest.approx(getattr(made.dense.config, epsilon) * D / case.width, rel=1e-12),
    }
    assert {key: raw.get(key) for key in expected} == expected
    assert {key: looked.models[name]["config"].get(key) for key in expected} == expected
    assert raw["rope_parameters"] == made.dense.config.rope_parameters
    assert raw.get("sliding_window") == getattr(made.dense.config, "sliding_window", None)
    assert not {"auto_map", "_name_or_path", "quantization_config"} & set(raw)
    assert str(made.out.parent) not in (made.out / "config.json").read_text(encoding="utf-8")


# ---- what is refused ----


def refusal(model_type: str, folder: Path, stages: list[dict[str, Any]], **changes: Any) -> str:
    tiny.tiny_config(model_type, **changes).save_pretrained(folder / "dense")
    calibration = {"source": "stdlib", "samples": 4, "seq_len": 32}
    recipe = parse_recipe({"method": "anchored", "stages": stages, "calibration": calibration})
    job = Job(model=find_model(str(folder / "dense")), recipe=recipe, out=folder / "out", command="compress slice")
    with pytest.raises(UsageError) as error:
        pipeline.plan_only(job)
    return str(error.value)


@pytest.mark.parametrize("model_type", ["qwen2"])
def test_a_width_that_the_heads_do_not_divide_is_refused(model_type, tmp_path):
    assert refusal(model_type, tmp_path, anchored({"width": 22})) == (
        "A hidden size of 22 is no multiple of the 4 attention heads, as LlamaForCausalLM asks for. Use --round-to 4."
    )
    assert refusal(model_type, tmp_path, anchored({"width": 21}, units={"kv_groups": {"keep": 1}})) == (
        "A hidden size of 21 is no multiple of the 2 attention heads, as LlamaForCausalLM asks for. Use --round-to 2."
    )


@pytest.mark.parametrize("model_type", ["llama"])
def test_one_basis_takes_one_width(model_type, tmp_path):
    fault = "One basis for the whole stream has one width. Give one ratio for all blocks, or use --rotation per-layer."
    stages = anchored({"linear_ratios": [0.1, 0.5]}, round_to=4)
    assert refusal(model_type, tmp_path, stages) == fault
    head_left = [stage | ({"slice_head": False} if stage["stage"] == "slice" else {}) for stage in stages]
    head_left[2] = {"stage": "slice", "ratio": 0.25, "round_to": 4}
    assert refusal(model_type, tmp_path, head_left) == fault


@pytest.mark.parametrize(("model_type", "width"), [("starcoder2", 2)])
def test_a_width_without_a_direction_is_refused(model_type, width, tmp_path):
    assert refusal(model_type, tmp_path, anchored({"width": width})) == (
        f"A hidden size of {width} leaves no direction of the stream. Slice less."
    )


@pytest.mark.parametrize("model_type", ["phi3"])
def test_groups_of_fused_projections_cannot_be_deleted(model_type, tmp_path):
    stages = anchored({"width": 16}, units={"kv_groups": {"keep": 1}})
    assert refusal(model_type, tmp_path, stages) == "This model has no kv_groups that could be deleted."


def test_groups_are_deleted_in_stock_shapes_alone(tmp_path):
    fault = "KV groups can be deleted only where the model keeps a stock shape."
    units = {"kv_groups": {"keep": 1}}
    assert refusal("llama", tmp_path / "per layer", anchored({"width": 16}, rotation="per-layer", units=units)) == fault
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert refusal("qwen2", tmp_path / "window", anchored({"width": 16}, units=units), **window) == fault
