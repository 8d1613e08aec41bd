"""Runs under a budget, each done once; what the tests of widths and of ranks share."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from compress import families, pipeline
from compress.errors import UsageError
from compress.models.hub import find_model
from compress.planning.memory import Room
from compress.planning.plan import Plan, make_plan
from compress.planning.prepare import Job
from compress.recipe import Recipe
from runs import tensors_of


@dataclass
class Made:
    """
    order: the model_type, its number of blocks and the recipe. job: that made it. plan: of that job, before choices are
    made.
    """

    order: Any
    job: Job
    plan: Plan
    result: pipeline.output.Result

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.job.out / "compress.json").read_text(encoding="utf-8"))
        return facts

    @property
    def tensors(self) -> dict[str, Tensor]:
        return tensors_of(self.job.out)

    @property
    def dense(self) -> dict[str, Tensor]:
        return tensors_of(self.job.out.with_name("dense"))

    def beside(self, name: str) -> Job:
        """The same job once more."""
        return replace(self.job, out=self.job.out.with_name(name))


def maker(root: pytest.TempPathFactory) -> Callable[[Any], Made]:
    finished: dict[str, Made] = {}

    def make(order: Any) -> Made:
        if str(order) not in finished:
            folder: Path = root.mktemp("order")
            tiny.write_model(folder / "dense", order.model_type, dtype=torch.float32, num_hidden_layers=order.blocks)
            recipe = order.recipe(str(tiny.write_text(folder / "text.txt", lines=60)))
            job = Job(model=find_model(str(folder / "dense")), recipe=recipe, out=folder / "out", command="compress")
            plan = pipeline.plan_only(job)
            finished[str(order)] = Made(order, job, plan, pipeline.run(job))
        return finished[str(order)]

    return make


def planned(config: Any, recipe: Recipe, dtype: torch.dtype = torch.float16) -> Plan:
    family = families.find(config)
    return make_plan(recipe, config, family, dtype=dtype, computing=torch.float32, room=Room(1, 2**30))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as error:
        call()
    return str(error.value)
