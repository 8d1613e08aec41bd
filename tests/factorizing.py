"""Runs that factorize, of tiny models; what the tests of the stage, of its runs and of its plans share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import oracles
import tiny
from compress import families, pipeline
from compress.planning.plan import Plan
from compress.planning.prepare import Job
from compress.stages._stage import StageConfig
from compress.stages.factorize import Factorize
from recipes import anchored
from runs import tensors_of, unproved

RANK = 9
FORMS = ("factors", "pivot", "dense")
HALF = {"rank_frac": 0.5}
Stages = Sequence[StageConfig | dict[str, Any]]


def run_unproved(job: Job) -> tuple[Plan, pipeline.output.Result]:
    """What was planned and what came out, and that the tensors are those of the planned architecture."""
    plan = pipeline.plan_only(job)
    with unproved():
        result = pipeline.run(job)
    file_name = plan.spec.architecture.layout(torch.float32).file_name
    expected = {file_name(name): tensor.shape for name, tensor in plan.spec.model().state_dict().items()}
    tensors = tensors_of(job.out)
    if plan.spec.architecture.dense.tie_word_embeddings and "lm_head.weight" not in " ".join(tensors):
        expected = {name: shape for name, shape in expected.items() if not name.endswith("lm_head.weight")}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    return plan, result


def slicing(model_type: str, rotation: str, *, width: int, keep: int | None = None, refit: bool = True) -> Stages:
    units = {"neurons": {"keep": keep}} if keep else None
    round_to = 1 if model_type in ("phi", "gpt_neox", "opt") else 4
    return anchored({"width": width}, rotation=rotation, units=units, round_to=round_to, refit=refit)


class Whole(Factorize):
    """Makes factors that are no smaller, too."""

    def is_smaller(self, linear: Any, rank: int) -> bool:
        return True


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    prefix = families.find(model.config).blocks
    return {
        f"{prefix}.{name}": module
        for name, module in model.get_submodule(prefix).named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(tiny.ROUTERS)
    }


def reports(result: oracles.Walked) -> dict[str, dict[str, Any]]:
    """What is said of the linears, by path."""
    entries = [entry for part in result.parts for entry in part.groups if "linear" in entry]
    return {entry["linear"]: entry for entry in entries if not entry["linear"].endswith(tiny.ROUTERS)}


def same_function(a: Tensor, b: Tensor, share: float) -> None:
    assert oracles.largest_difference(a, b) < share * float(b.abs().max())
