"""Low-rank decomposition: a linear becomes the product of two thin ones.

    anchored   ours: what `refit` made of the linear, which turns the compressed prefix's activations into the dense
               model's, is cut to its rank so that the outputs lose least, an error measured by the loss's gradient:
               with `refit` before it this is reduced-rank regression of the dense outputs on the compressed inputs
    lord       LoRD (arXiv 2309.14021): principal components of the outputs, centered, with a bias
    svd-llm    SVD-LLM's whitening (arXiv 2403.07378), asvd: ASVD's scaling (2312.05821), svd: the weight alone

All but the first go by what the dense model gives each linear, as their papers do; `inputs` says otherwise.

How many directions each linear keeps: `rank_frac` of its full rank min(m, n), `rank` of them, or what the recipe's
budget comes to. A linear whose factors would not be smaller stays as it is.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.architectures.architecture import ModelSpec
from compress.architectures.own import as_own
from compress.calibration.linears import FactorShape, LinearShape, LinearSite
from compress.calibration.observers import LinearFilter
from compress.calibration.sites import Requirements
from compress.calibration.survey import SurveyNeed
from compress.errors import report
from compress.models.factors import Form, factor_module, multiplied_out
from compress.numerics.lowrank import Factors, asvd, gradient_metric, svd, svd_llm, weighted
from compress.stages._stage import StageConfig, is_target, unmatched

Method = Literal["anchored", "lord", "svd-llm", "asvd", "svd"]
CENTERED = ("anchored", "lord")
# Of m + n: below this rank, what pivot form saves is less than what putting its outputs in order takes (measured on a
# CPU, benchmarks/lowrank_speed.py --forms).
PIVOT_FROM = 1 / 8
ALLOCATIONS = ("energy", "mixed", "fisher")


class Factorize(StageConfig):
    """Low-rank decomposition: a linear becomes the product of two thin ones.

    target: which linears: `all`, `attention`, `mlp`, or patterns of names below a block such as `*.down_proj`.
    rank_frac, rank: of every linear; with neither, the budget decides. ranks: of each by its name below the causal LM;
        what has none there stays dense.
    allocation: `uniform`: one share for all, of the rank, or of the parameters under a budget; `energy`: the lost
        shares of the outputs' variance add up to the least; `fisher`: the loss suffers least, by the gradient of a
        backward pass; `mixed`: half-way between; `auto`: the best of these three by trial. With rank_frac or rank, all
        but `uniform` spread what that would take.
    multiple: ranks are rounded down to a multiple; by default what suits the width.
    form: `factors`, `pivot` (the same function in fewer numbers), `auto`: pivot where it is no slower, or `dense`:
        multiplied out again, for a stock model of the old size. forms: of each linear that has a rank in `ranks`.
    gradient_weight: how much errors count by the loss's gradient; 0: not at all.
    bias: whether a linear without one gets the bias that keeps the mean of its outputs; by default for `lord` alone.
    inputs: what `InputMoments` are of; by default the compressed prefix's for `anchored`, the dense model's for others.
    """

    site: ClassVar = LinearSite
    rules: ClassVar = ("rank_frac", "rank", "ranks")
    stage: Literal["factorize"] = "factorize"
    method: Method = "anchored"
    target: tuple[str, ...] = ("all",)
    rank_frac: Annotated[float, Field(gt=0, le=1)] | None = None
    rank: Annotated[int, Field(ge=1)] | None = None
    ranks: Mapping[str, Annotated[int, Field(ge=1)]] | None = None
    allocation: Literal["auto", "uniform", "energy", "mixed", "fisher"] = "uniform"
    multiple: Annotated[int, Field(ge=1)] | None = None
    form: Literal["auto", "factors", "pivot", "dense"] = "auto"
    forms: Mapping[str, Form] | None = None
    gradient_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: bool | None = None
    inputs: Literal["compressed", "dense"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Factorize":
        if self.gradient_weight and self.method != "anchored":
            raise ValueError(f"gradient_weight is of method anchored, not of {self.method}")
        if self.bias and self.method not in CENTERED:
            raise ValueError(f"{self.method} adds no bias")
        if self.bias and self.form == "dense":
            raise ValueError("form dense writes a stock model, which has no room for added biases; leave bias out")
        if self.allocation == "auto" and self.dense_inputs:
            raise ValueError(f"allocation auto compares by trial, which {self.method} cannot: name an allocation")
        return self

    @property
    def dense_inputs(self) -> bool:
        return self.inputs == "dense" if self.inputs else self.method != "anchored"

    @property
    def requires(self) -> Requirements:
        by_loss = bool(self.gradient_weight) or (self.open_ranks and self.allocation in ("auto", "mixed", "fisher"))
        survey = SurveyNeed.NONE
        if by_loss or (self.open_ranks and self.allocation != "uniform"):
            survey = SurveyNeed.LINEARS | (SurveyNeed.GRADIENT if by_loss else SurveyNeed.NONE)
        watch = LinearFilter(partial(is_target, self.target), self.gradient_weight, self.centers) if survey else None
        return Requirements(survey=survey, watch=watch, inputs="dense" if self.dense_inputs else "sequential")

    @property
    def open_ranks(self) -> bool:
        """Whether ranks are to be found from the survey or under a budget."""
        return self.ranks is None and not (self.told and self.allocation == "uniform")

    @property
    def writes_factors(self) -> bool:
        """Whether it leaves linears in factors, and does not multiply them out."""
        return self.form != "dense"

    @property
    def opens(self) -> str | None:
        return None if self.told else "ranks"

    @property
    def allocations(self) -> tuple[str, ...]:
        """The ways to allocate ranks to the linears that are to be compared."""
        return ALLOCATIONS if self.allocation == "auto" else (self.allocation,)

    @property
    def step(self) -> int:
        return self.multiple or 1

    def decided(self, choice: Mapping[str, Any]) -> "Factorize":
        if not self.open_ranks:
            return self
        found = {"ranks": choice["ranks"], "forms": choice.get("forms")}
        return self.model_copy(update={**found, "rank_frac": None, "rank": None})

    def plan(self, spec: ModelSpec) -> tuple["Factorize", ModelSpec]:
        spec.require_decided("Ranks go by widths that are known beforehand. Give slice and prune_units a ratio.")
        stage = self if self.multiple else self.model_copy(update={"multiple": spec.architecture.steps()["rank"]})
        linears = spec.linears
        report(stage.problems(linears, spec.factors))
        if stage.writes_factors:
            spec = replace(spec, architecture=as_own(spec.architecture))
        if stage.open_ranks:
            return stage, replace(spec, undecided=spec.undecided | {"ranks"})
        planned = stage.planned_factors(linears)
        ranks = {path: factors.rank for path, factors in planned.items()}
        forms = {path: factors.form for path, factors in planned.items()}
        settled = stage.model_copy(update={"ranks": ranks, "forms": forms, "rank_frac": None, "rank": None})
        dense = Counter(linear.name for linear in linears if stage.targets(linear) and linear.path not in planned)
        if dense:
            names = ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in dense.items())
            note = f"Factors of this rank would be no smaller, so these stay dense: {names}."
            spec = replace(spec, notes=(*spec.notes, note))
        return settled, replace(spec, factors={**spec.factors, **(planned if stage.writes_factors else {})})

    def problems(self, linears: Sequence[LinearShape], factorized: Mapping[str, FactorShape]) -> list[str]:
        """What does not fit a model with these linears in its blocks, some of them factorized before."""
        problems = unmatched(self.target, linears)
        twice = [linear.name for linear in linears if self.targets(linear) and linear.path in factorized]
        problems += [f"Two stages would factorize {name}. Give each its own target." for name in twice[:1]]
        if self.open_ranks and factorized:
            problems.append("Ranks can be left open for one factorizing stage, and then it has to be the only one.")
        if self.opens and not self.writes_factors:
            problems.append(
                "Multiplied out, the model keeps its size: a budget cannot be kept. Give --rank-frac or --rank."
            )
        ranks, full = self.ranks or {}, {linear.path: linear.full_rank for linear in linears}
        unknown = sorted(set(ranks) - set(full))
        problems += [f"factorize gives a rank to {unknown[0]}, which the model has not."] if unknown else []
        above = [path for path, rank in ranks.items() if rank > full.get(path, rank)]
        problems += [
            f"factorize gives {path} a rank of {ranks[path]}, its full one is {full[path]}." for path in above[:1]
        ]
        if not problems and not self.opens and self.ranks is None and not self.uniform_factors(linears):
            problems.append("No linear would be smaller in factors of these ranks. Keep less, or choose --form pivot.")
        return problems

    def planned_factors(self, linears: Sequence[LinearShape]) -> dict[str, FactorShape]:
        ranks = ((linear, self.rank_of(linear)) for linear in linears)
        return {linear.path: self.factor_shape(linear, rank) for linear, rank in ranks if rank is not None}

    def uniform_factors(self, linears: Sequence[LinearShape]) -> dict[str, FactorShape]:
        """What it would make of the linears, by path, without looking at the model."""
        return self.model_copy(update={"allocation": "uniform"}).planned_factors(linears)

    def targets(self, linear: LinearShape) -> bool:
        return is_target(self.target, linear.name, linear.part)

    def rank_ladder(self, linear: LinearShape) -> list[int]:
        """The ranks that it can give a linear to make it smaller, increasing; none where it leaves it alone."""
        if not self.targets(linear):
            return []
        ladder, least = list[int](), linear.m * linear.n
        for rank in reversed(range(self.step, linear.full_rank + 1, self.step)):
            # In factors a rank may take more than a higher one in pivot form.
            if (stored := self.factor_shape(linear, rank).stored(linear)) < least:
                ladder, least = [rank, *ladder], stored
        return ladder

    def rank_of(self, linear: LinearShape) -> int | None:
        """None for a linear that stays dense. The rule is the same before and in the walk."""
        if not self.targets(linear):
            return None
        if self.ranks is not None:
            return self.ranks.get(linear.path)
        share = int((self.rank_frac or 0) * linear.full_rank)
        rank = share if self.rank is None else min(self.rank, linear.full_rank)
        rank = max(rank - rank % self.step, min(rank, self.step))
        return rank if rank and self.is_smaller(linear, rank) else None

    def is_smaller(self, linear: LinearShape, rank: int) -> bool:
        return self.factor_shape(linear, rank).stored(linear) < linear.m * linear.n

    def factor_shape(self, linear: LinearShape, rank: int) -> FactorShape:
        wide = rank >= PIVOT_FROM * (linear.m + linear.n)
        form: Form = "factors" if self.form == "factors" or (self.form == "auto" and not wide) else "pivot"
        form = (self.forms or {}).get(linear.path, form)
        return FactorShape(rank, form, has_bias=linear.has_bias or self.adds_bias)

    @property
    def adds_bias(self) -> bool:
        """A stock model has no room for biases that its linears have not."""
        wanted = self.method == "lord" if self.bias is None else self.bias
        return wanted and self.form != "dense"

    def centers(self, *, has_bias: bool) -> bool:
        """Whether the outputs' mean is kept by a bias, so that only what varies about it counts."""
        return self.method in CENTERED and (has_bias or self.adds_bias)

    def apply(self, site: LinearSite) -> None:
        rank = self.rank_of(site.shape)
        if rank is None:
            return
        factors, form = self.factors(site, rank), self.factor_shape(site.shape, rank).form
        lost = site.lost(factors.product, centered=self.centers(has_bias=site.shape.has_bias))
        site.notes |= {"rank": rank, "full_rank": site.shape.full_rank, "form": form, "lost": lost}
        thin = factor_module(factors, form, site.dtype)
        site.replace(multiplied_out(thin) if self.form == "dense" else thin)

    def factors(self, site: LinearSite, rank: int) -> Factors:
        W, bias, inputs = site.weight, site.bias, site.inputs
        centered = self.centers(has_bias=bias is not None)
        if self.method == "svd":
            return replace(svd(W, rank), bias=bias)
        if self.method == "asvd":
            return replace(asvd(W, inputs.mean_abs, rank), bias=bias)
        if self.method == "svd-llm":
            return replace(svd_llm(W, inputs.second, rank, name=site.name), bias=bias)
        metric = None
        if self.method != "lord" and self.gradient_weight and (gradient := site.gradient) is not None:
            metric = gradient_metric(gradient, self.gradient_weight, name=site.name)
        return weighted(W, bias, inputs, rank, metric, name=site.name, centered=centered)
