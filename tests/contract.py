"""What every family can be asked for: the rows and the columns of docs/families.md, and what the code plans for each.

A row is a family, or a kind of its models that is built otherwise; its model is tiny. A column is a method as the
command line would put it together. What cannot be done is refused by the plan, before a weight is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tiny
from compress import families
from compress.checkpoints.gguf.llama import check_llama
from compress.errors import UnsupportedModel
from compress.job import Job
from compress.models.hub import find_model
from compress.plan import Plan, make_plan
from compress.recipe import Recipe, anchored, lowrank, parse_recipe, slicegpt, slim

NUM_BLOCKS = 2
CALIBRATION = {"samples": 8, "seq_len": 16}
QUARTER = {"ratio": 0.25}


@dataclass(frozen=True)
class Row:
    """
    changes: of the tiny config of the family. what: tells it from the family's other rows.
    """

    model_type: str
    what: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model_type}, {self.what}" if self.what else self.model_type

    @property
    def config(self) -> Any:
        return tiny.tiny_config(self.model_type, num_hidden_layers=NUM_BLOCKS, **self.changes)


OTHERWISE = [
    Row("falcon", "40B: a norm each", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Row("falcon", "11B: new, one norm", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    Row("falcon", "RW: sequential, alibi", {"parallel_attn": False, "alibi": True, "bias": True, "multi_query": False}),
    Row("mistral", "no window", {"sliding_window": None}),
    Row("gpt_neox", "sequential", {"use_parallel_residual": False}),
    Row("opt", "350M: norms behind", tiny.OPT_350M),
    Row("phi", "norms of queries and keys", {"qk_layernorm": True}),
    Row("cohere", "norms of queries and keys", {"use_qk_norm": True}),
    Row("stablelm", "parallel", {"use_parallel_residual": True}),
    Row("starcoder2", "no biases", {"use_bias": False}),
]
ROWS = sorted([*(Row(name) for name in families.names()), *OTHERWISE], key=lambda row: row.name)
REFUSED = [Row(name) for name in sorted(families.REFUSED)]


@dataclass(frozen=True)
class Method:
    """
    command: how a user asks for it. stages: of its recipe, on a tiny model.
    """

    command: str
    stages: Sequence[dict[str, Any]]

    def recipe(self, source: str = "text.txt") -> Recipe:
        calibration = {"source": source, **CALIBRATION}
        return parse_recipe({"method": "contract", "stages": list(self.stages), "calibration": calibration})


ONE_BASIS = anchored(QUARTER, units={"neurons": QUARTER}, round_to=1)
FOUR_BITS = {"bits": 4, "group": "channel"}
METHODS = {
    "slicegpt": Method(
        "compress slice --method slicegpt", slicegpt(QUARTER, signal="normed", round_to=1, slice_head=True)
    ),
    "per layer": Method("compress slice --rotation per-layer", anchored(QUARTER, rotation="per-layer", round_to=1)),
    "one basis": Method("compress slice", ONE_BASIS),
    "lord": Method(
        "compress lord", lowrank("anchored", {"rank_frac": 0.5}, gradient_weight=0.5, allocation="fisher", multiple=1)
    ),
    "lord, the paper's": Method("compress lord --method lord", lowrank("lord", {"rank_frac": 0.5}, multiple=1)),
    "materialized": Method(
        "compress lord --materialize", lowrank("anchored", {"rank_frac": 0.5}, form="dense", multiple=1)
    ),
    "slim, packed": Method("compress slim", slim(prune=None, quantize=FOUR_BITS, adapt=None, refit=True)),
    "slim, the paper's": Method(
        "compress slim --method slim",
        slim(
            prune={"method": "wanda"},
            quantize={"method": "slim", "group": "tensor"},
            adapt={"method": "slim", "rank": 4},
            refit=False,
            form="compact",
        ),
    ),
    "slim, compact": Method(
        "compress slim --compact",
        slim(prune={"iterations": 5}, quantize=FOUR_BITS, adapt={"rank": 4}, refit=True, form="compact"),
    ),
}


def family_of(row: Row) -> families.Family:
    return families.find(row.config)


def planned(config: Any, recipe: Recipe) -> Plan:
    """Raises UnsupportedModel or UsageError where the model cannot be treated so."""
    options: dict[str, Any] = {"dtype": torch.float32, "computing": torch.float32, "cache_memory": 2**30}
    return make_plan(recipe, config, families.find(config), **options)


@dataclass(frozen=True)
class Cell:
    """
    kind: `stock`, the model_type that is written, or `refused`. why: for what is refused, or not stock after all.
    """

    kind: str
    why: str = ""


def cell(row: Row, method: Method) -> Cell:
    """What the code plans for a row's model, without a weight."""
    config = row.config
    try:
        plan = planned(config, method.recipe())
    except UnsupportedModel as error:
        return Cell("refused", str(error))
    written = plan.target.config(plan.shape, torch.float32).model_type
    why = " ".join(note for note in plan.notes if "our architecture" in note)
    return Cell("stock" if written == config.model_type else written, why)


def gguf_cell(row: Row) -> Cell:
    """Of the narrower model, or of the one with factors multiplied out: whatever is stock."""
    config = row.config
    names = ["materialized"] if families.find(config).not_exact(config) else ["one basis"]
    plan = planned(config, METHODS[names[0]].recipe())
    try:
        check_llama(plan.target.config(plan.shape, torch.float32))
    except UnsupportedModel as error:
        return Cell("refused", str(error))
    return Cell("written")


def job_of(row: Row, method: Method, folder: Path, out: Path, *, resume: bool = False) -> Job:
    """folder: where `write_inputs` has put the row's model and the text."""
    recipe = method.recipe(str(folder / "text.txt"))
    model = find_model(str(folder / row.name.replace(":", "")))
    return Job(model=model, recipe=recipe, out=out, command=method.command, resume=resume)


def write_inputs(folder: Path, rows: Sequence[Row], dtype: torch.dtype = torch.float32) -> None:
    tiny.write_text(folder / "text.txt", lines=60)
    for row in rows:
        options: dict[str, Any] = {"num_hidden_layers": NUM_BLOCKS, **row.changes}
        name = row.name.replace(":", "")
        tiny.write_model(folder / name, row.model_type, dtype=dtype, shard_size="1GB", **options)
