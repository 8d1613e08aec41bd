"""What every family can be asked for: the rows and the columns of docs/families.md, and what the code plans for each.

A row is a family, or a kind of its models that is built otherwise; its model is tiny. A column is a method as the
command line would put it together. What cannot be done is refused by the plan, before a weight is read.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import oracles
import tiny
from compress import families, pipeline
from compress.checkpoints.gguf.model import check_writable
from compress.errors import UnsupportedModel, UsageError
from compress.models.hub import find_model
from compress.planning.memory import Room
from compress.planning.plan import Plan, make_plan
from compress.planning.prepare import Job
from compress.recipe import Recipe, parse_recipe
from recipes import anchored, lowrank, slicegpt, slim

NUM_BLOCKS = 2
CALIBRATION = {"samples": 6, "seq_len": 12}
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
    Row("deepseek_v3", "a dense block", {"first_k_dense_replace": 1}),
    Row("granitemoehybrid", "Mamba in some blocks", tiny.HYBRID),
    Row("mistral", "no window", {"sliding_window": None}),
    Row("gpt_neox", "sequential", {"use_parallel_residual": False}),
    Row("opt", "350M: norms behind", tiny.OPT_350M),
    Row("phi", "norms of queries and keys", {"qk_layernorm": True}),
    Row("cohere", "norms of queries and keys", {"use_qk_norm": True}),
    Row("qwen3_moe", "experts in some blocks", {"mlp_only_layers": [0], "intermediate_size": 40}),
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
FOUR_BITS = {"num_bits": 4, "strategy": "channel"}
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
            quantize={"method": "slim", "strategy": "tensor"},
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
    number = torch.float32
    return make_plan(recipe, config, families.find(config), dtype=number, computing=number, room=Room(1, 2**30))


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
    except (UnsupportedModel, UsageError) as error:
        return Cell("refused", str(error))
    written = plan.spec.config(torch.float32).model_type
    why = " ".join(note for note in plan.notes if "our architecture" in note)
    return Cell("stock" if written == config.model_type else written, why)


def gguf_cell(row: Row) -> Cell:
    """Of the narrower model, or where it cannot be narrower, of the one with factors multiplied out."""
    config = row.config
    method = "materialized" if cell(row, METHODS["one basis"]).kind == "refused" else "one basis"
    plan = planned(config, METHODS[method].recipe())
    try:
        check_writable(plan.spec.config(torch.float32))
    except UnsupportedModel as error:
        return Cell("refused", str(error))
    return Cell("written")


# ---- the table of docs/families.md ----

COLUMNS = {
    "per layer": "slice --rotation per-layer",
    "one basis": "slice",
    "lord": "lord",
    "materialized": "lord --materialize",
    "slim, packed": "slim",
    "slim, compact": "slim --compact",
}


def cells(row: Row, columns: Iterable[str] = COLUMNS) -> list[Cell]:
    """The row of the table: rotation, some columns, GGUF."""
    reason = family_of(row).not_exact(row.config)
    rotation = Cell("refused", f"Not exact: {reason}") if reason else Cell("exact")
    return [rotation, *(cell(row, METHODS[name]) for name in columns), gguf_cell(row)]


def reason(found: Cell, row: Row) -> str:
    """Why, in words that are not of this row alone."""
    if "GGUF" in found.why:
        return "GGUF " + found.why.partition(". GGUF ")[2].partition(" Leave GGUF out")[0]
    words = found.why.removeprefix("The result is written in our architecture: ").removeprefix("Not exact: ")
    words = words.partition("exactly: ")[2] or words
    words = words.partition(" Use compress lord")[0].replace(f"{row.model_type} ties", "it ties")
    return words[0].upper() + words[1:]


def cell_text(found: Cell, row: Row, notes: list[str]) -> str:
    """`notes` grows by what is said for the first time."""
    words = "no" if found.kind == "refused" else found.kind
    if words == "compress":
        words = f"`{words}`"
    elif words not in ("no", "exact", "stock", "written"):
        words = f"stock `{words}`"
    if not found.why:
        return words
    if reason(found, row) not in notes:
        notes.append(reason(found, row))
    return f"{words} ({notes.index(reason(found, row)) + 1})"


# ---- runs ----


def written_kind(out: Path, model_type: str) -> str:
    """`stock`, or the model_type that a checkpoint has instead of the dense model's."""
    written: str = json.loads((out / "config.json").read_text(encoding="utf-8"))["model_type"]
    return "stock" if written == model_type else written


def job_of(row: Row, method: Method, folder: Path, out: Path, *, resume: bool = False) -> Job:
    """folder: where `write_inputs` has put the row's model and the text."""
    recipe = method.recipe(str(folder / "text.txt"))
    model = find_model(str(folder / row.name.replace(":", "")))
    return Job(model=model, recipe=recipe, out=out, command=method.command, resume=resume)


def write_inputs(folder: Path, rows: Sequence[Row], dtype: torch.dtype = torch.float32) -> None:
    tiny.write_text(folder / "text.txt", lines=60)
    for row in rows:
        blocks = NUM_BLOCKS if family_of(row).others else 1  # one of each kind
        options: dict[str, Any] = {"num_hidden_layers": blocks, **row.changes}
        name = row.name.replace(":", "")
        tiny.write_model(folder / name, row.model_type, dtype=dtype, shard_size="1GB", **options)


class Noted:
    """In the place of the proof: notes what is to be proved, the probe's tokens and the walk's logits for them."""

    probe: tuple[Tensor, Tensor]

    def __call__(self, folder: Path, ids: Tensor, logits: Tensor, *, memory: int) -> float:
        self.probe = ids, logits
        return 0.0


@dataclass(frozen=True)
class Written:
    out: Path
    result: pipeline.output.Result
    probe: tuple[Tensor, Tensor]

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / name).read_text(encoding="utf-8"))
        return found


def write(row: Row, method: Method, inputs: Path, out: Path) -> Written:
    return run_noted(job_of(row, method, inputs, out))


def run_noted(job: Job) -> Written:
    """A whole run, unproved."""
    noted = Noted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify", noted)
        result = pipeline.run(job)
    return Written(job.out, result, noted.probe)


PROBE = Path(__file__).with_name("stock_probe.py")
PROMPT = oracles.random_ids(2, 6, seed=4).clamp_min(3)
# Stock norms compute in float32; scales and adapters of what is packed are of the model's dtype.
CLOSE = 1e-5


@dataclass(frozen=True)
class Looked:
    """What a process without our code computes from checkpoints, and what it says of them."""

    logits: Mapping[str, Tensor]
    models: Mapping[str, Any]

    def agrees(self, name: str, made: Written) -> None:
        """Whole, the walk's logits, and the same text with a cache as without."""
        found = self.models[name]
        assert not found["info"].keys() & {"missing_keys", "unexpected_keys", "mismatched_keys"}
        assert found["module"].startswith(
            "transformers.models." if made.result.metadata.loads_without_our_code else "transformers_modules."
        )
        assert self.difference(name, made) < CLOSE
        assert found["cached"] == found["greedy"]

    def difference(self, name: str, made: Written) -> float:
        """Of the walk's logits and those there, the largest, of the largest logit."""
        expected = made.probe[1]
        return oracles.largest_difference(self.logits[f"{name}/probe"], expected) / float(expected.abs().max())


def look_at(written: Mapping[str, Any], root: Path) -> Looked:
    """One clean process for all of them."""
    request = {
        name: {
            "folder": str(made.out),
            "trust": "auto_map" in made.read("config.json"),
            "unpack": made.read("compress.json")["unpacks_while_loading"],
            "float64_experts": made.read("config.json")["model_type"] in tiny.SPARSE,
            "ids": {"probe": made.probe[0].tolist()},
            "prompt": PROMPT.tolist(),
        }
        for name, made in written.items()
    }
    (root / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-I", str(PROBE), str(root / "request.json"), str(root / "answers")]
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((root / "answers" / "found.json").read_text(encoding="utf-8"))
    assert found["ours"] == []
    return Looked(load_file(root / "answers" / "logits.safetensors"), found["models"])
