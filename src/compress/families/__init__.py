"""Model families as tables: one file a `model_type`, found by its name.

A decoder is a chain of residual branches. Each reads the stream through a norm, by linears (`readers`), and adds to it
by linears (`writers`); embeddings only write, the head only reads. A family names these parts and says how its norm is
built; everything else follows from the table. Names are those of the stock transformers modules.
"""

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from compress.errors import UnsupportedModel


@dataclass(frozen=True, kw_only=True)
class Units:
    """Parts of a branch's inner width that can be deleted whole: MLP neurons, or KV groups with their query heads.

    kind: `neurons` or `kv_groups`. count: the config's key for how many there are; None there is four times the width.
    readers: which linears produce them, and in how many stacks: 2 where gate and up are one linear.
    writer: the linear that reads them; each unit is as many neighboring inputs of it.
    """

    kind: Literal["neurons", "kv_groups"]
    count: str
    readers: tuple[tuple[str, int], ...]
    writer: str

    def number(self, config: Any) -> int:
        count = getattr(config, self.count)
        return 4 * config.hidden_size if count is None else int(count)


@dataclass(frozen=True, kw_only=True)
class StockShape:
    """How a narrower model of this family is written so that a stock class of transformers loads it.

    written_as: the model_type, None for the family's own. adds: what its config says besides what the two share.
    heads_divide_width: the config class refuses a hidden size that is no multiple of the number of heads.
    constant_channel: the head has no bias of its own, so one channel of the final LayerNorm is kept constant for it.
    zero_biases: writers that have a bias in the stock class but none in this family.
    normed_readers: readers whose outputs have a norm of the same epsilon, and those norms.
    not_stock: why a model with this config has no stock shape, None where it has.
    """

    written_as: str | None = None
    adds: Mapping[str, Any] = field(default_factory=dict)
    heads_divide_width: bool = False
    constant_channel: bool = False
    zero_biases: tuple[str, ...] = ()
    normed_readers: tuple[tuple[str, str], ...] = ()
    not_stock: Callable[[Any], str | None] = lambda config: None


@dataclass(frozen=True, kw_only=True)
class BranchTable:
    """One residual branch of a block. Names are below the block.

    paths: the chains of modules from norm to stream; more than one where attention and MLP run in parallel.
    norms: one for all paths, or one for each; none where the stream is read as it is.
    post_norm: a norm after the branch, of what it is about to write, or with `post_norm_of` "stream" of the stream
        that has taken that in. Such a branch has one writer.
    experts: the parts of it that have only some of the tokens each, as branches of their own without a norm; what they
        read and write is the branch's too.
    inner: linears between readers and writers, which stay as they are.
    """

    name: str
    norms: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...]
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    units: tuple[Units, ...] = ()
    post_norm: str | None = None
    post_norm_of: Literal["update", "stream"] = "update"
    experts: tuple["BranchTable", ...] = ()
    inner: tuple[str, ...] = ()

    def structure(self) -> dict[str, Any]:
        names = {key: value for key, value in asdict(self).items() if key not in ("experts", "inner", "units")}
        neurons = next((units for units in self.units if units.kind == "neurons"), None)
        names["neurons"] = neurons and {"readers": dict(neurons.readers), "writer": neurons.writer}
        return names

    def readers_by_norm(self) -> dict[str | None, tuple[str, ...]]:
        """Readers by the norm before them; None without a norm."""
        if len(self.norms) <= 1:
            return {next(iter(self.norms), None): self.readers}
        after = {norm: tuple(f"{step}." for step in path) for norm, path in zip(self.norms, self.paths, strict=True)}
        return {
            norm: tuple(name for name in self.readers if f"{name}.".startswith(steps)) for norm, steps in after.items()
        }


@dataclass(frozen=True, kw_only=True)
class Family:
    """The parts of a family's causal LM. Names are below the causal LM, those in `branches` below a block.

    others: the branches of the blocks that are built otherwise, by their numbers; as many, of the same names. All units
        of one kind are in all blocks.
    project_in, project_out: linears that the embeddings and what the head reads pass, where the model has them.
    final_norm: None where the head reads the stream as it is.
    norm: `layer` (LayerNorm), `rms` (gain w), `rms_plus_one` (gain 1 + w).
    norm_gain, norm_offset: whether norms have a gain, and LayerNorms an offset.
    norm_eps: the config's key for the norm's epsilon, or a number where the model fixes it.
    multiplier: the config's key for what everything that a branch writes is multiplied by.
    logits: what the model does to the head's outputs, in order, each with the key of its number in the config:
        `multiplier`, `divisor`, `softcap` (c tanh(y / c)).
    routers: readers that decide where tokens go, or what a recurrence keeps; stages on linears leave them alone if not
        told otherwise.
    recurrent: what some blocks have in place of the attention, a recurrence with a state for a cache.
    dropout: the config's key for dropout on what a branch adds, None where the family has none or its modules do it.
    returns_tuple: the stock blocks return a tuple that starts with the stream.
    first_width_last: the stock model gives the head the stream in the width that it had before the first block.
    stock: how a sliced model is a stock one; None where the stock class has no room for it.
    not_exact: why a model with this config cannot be rotated exactly, None where it can.
    refused: why nothing can be done to a model with this config, None where something can.
    """

    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    blocks: str = "model.layers"
    branches: tuple[BranchTable, ...]
    others: Mapping[int, tuple[BranchTable, ...]] = field(default_factory=dict)
    attention: str = "self_attn"
    recurrent: str | None = None
    final_norm: str | None = "model.norm"
    head: str = "lm_head"
    project_in: str | None = None
    project_out: str | None = None
    head_bias: bool = False
    norm: Literal["layer", "rms", "rms_plus_one"] = "rms"
    norm_gain: bool = True
    norm_offset: bool = True
    norm_eps: str | float = "rms_norm_eps"
    multiplier: str | None = None
    logits: Mapping[str, str] = field(default_factory=dict)
    routers: tuple[str, ...] = ()
    dropout: str | None = None
    returns_tuple: bool = False
    first_width_last: bool = False
    stock: StockShape | None = None
    not_exact: Callable[[Any], str | None] = lambda config: None
    refused: Callable[[Any], str | None] = lambda config: None

    @property
    def body(self) -> str:
        """The model without its head. (Llama 4's `base_model` is not it.)"""
        return self.blocks.partition(".")[0]

    def branches_of(self, block: int) -> tuple[BranchTable, ...]:
        return self.others.get(block, self.branches)

    @property
    def embedding_parts(self) -> tuple[str, ...]:
        """Modules with weights before the first block."""
        return tuple(part for part in (*self.embeddings, self.project_in) if part)

    @property
    def head_parts(self) -> tuple[str, ...]:
        """Modules with weights after the last block."""
        return tuple(part for part in (self.final_norm, self.project_out, self.head) if part)

    @property
    def last_reader(self) -> str:
        """The linear after the last block that reads the stream."""
        return self.project_out or self.head

    @property
    def has_post_norms(self) -> bool:
        return any(branch.post_norm for branch in self.branches)

    def dense_units(self, config: Any) -> dict[str, int]:
        """Count the units of each kind in a block of the dense model."""
        return {units.kind: units.number(config) for branch in self.branches for units in branch.units}

    def epsilon(self, config: Any) -> float:
        return getattr(config, self.norm_eps) if isinstance(self.norm_eps, str) else self.norm_eps

    def scale(self, config: Any) -> float:
        """Factor on everything that a branch writes."""
        return float(getattr(config, self.multiplier)) if self.multiplier else 1.0

    def structure(self) -> dict[str, Any]:
        """The names alone, as plain data: what a checkpoint of our own class has in its config.json."""
        named = ("embeddings", "blocks", "attention", "final_norm", "head", "head_bias", "dropout", "returns_tuple")
        names: dict[str, Any] = {name: getattr(self, name) for name in (*named, "multiplier", "logits")}
        names["branches"] = [table.structure() for table in self.branches]
        if self.recurrent:
            names["recurrent"] = self.recurrent
        if self.others:
            names["others"] = {number: [table.structure() for table in each] for number, each in self.others.items()}
        plain: dict[str, Any] = json.loads(json.dumps(names))  # tuples become lists, numbers of blocks strings
        return plain

    def part_of(self, name: str) -> str:
        """The part of a block that a linear belongs to: `attention`, `mlp` or `router`."""
        if name in self.routers:
            return "router"
        return "attention" if name.split(".")[0] in (self.attention, self.recurrent) else "mlp"

    def units(self, kind: str) -> list[Units]:
        return [units for branch in self.branches for units in branch.units if units.kind == kind]


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(config: Any) -> Family:
    """Find the family of a model by its config: its module's `family(config)`, or FAMILY.

    Raises UnsupportedModel where there is none, or where nothing can be done to the model, with the reason. That it
    cannot be rotated is no such reason: `check_exact` is for recipes that would.
    """
    model_type = config.model_type
    if model_type == "compress":
        raise UnsupportedModel(
            "This is a compressed model already. Start from the dense one, with all stages in one recipe: compress run."
        )
    if reason := REFUSED.get(model_type):
        raise UnsupportedModel(f"{model_type} is not supported: {reason}")
    if model_type not in names():
        raise UnsupportedModel(f"The model type {model_type!r} is not supported. Supported: {', '.join(names())}.")
    module = importlib.import_module(f"compress.families.{model_type}")
    family: Family = module.family(config) if hasattr(module, "family") else module.FAMILY
    if reason := family.refused(config):
        raise UnsupportedModel(f"This {model_type} model is not supported: {reason}")
    return family


def check_exact(config: Any, family: Family) -> None:
    """Raises UnsupportedModel where the stream of a model cannot be rotated exactly, with the reason and a remedy."""
    if reason := family.not_exact(config):
        raise UnsupportedModel(
            f"This {config.model_type} model cannot be sliced exactly: {reason} Use compress lord or compress slim, "
            "which leave its stream as it is."
        )


REFUSED = {
    "gemma3": "its config is that of text and images together. Compress the language model alone: load it with "
    "Gemma3ForCausalLM.from_pretrained, write it with save_pretrained (model type gemma3_text), and start from that.",
    "qwen3_5": "its config is that of text and images together. Compress the language model alone: load it with "
    "Qwen3_5ForCausalLM.from_pretrained, write it with save_pretrained (model type qwen3_5_text), and start from that.",
    "gpt2": "its linear layers are Conv1D modules, whose weights lie the other way round. gpt_bigcode has the same "
    "blocks in plain linears.",
}
