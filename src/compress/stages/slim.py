"""Quantization, sparsity and a low-rank adapter for what they lose: W becomes S + B A.

`numerics/decomposition.py` has the formulas. Each of the three may be left out. SLiM (arXiv 2410.09615) is
`prune: wanda`, `quantize: slim` for a whole matrix and `adapt: slim`. Ours is `admm`, `gptq` and `whitened` in some
rounds, with `refit` before it: what is decomposed is then the weight that turns the compressed prefix's activations
into the dense model's, and the adapter is the reduced-rank regression of what is still missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.architectures import gguf_types, packed_types
from compress.architectures.architecture import ModelSpec
from compress.architectures.gguf_types import AUTO, check_named, resolve
from compress.architectures.own import as_own
from compress.calibration.linears import LinearShape, LinearSite, lost
from compress.calibration.observers import LinearFilter
from compress.calibration.sites import Requirements
from compress.calibration.survey import SurveyNeed
from compress.errors import report
from compress.models.factors import fill
from compress.models.packing import lacks_cpu_kernel, stored_linear
from compress.models.storage import Storage
from compress.models.tensor_files import fused_piece
from compress.numerics.block_types import TYPES
from compress.numerics.decomposition import (
    Adapting,
    Decomposed,
    Decomposition,
    Pruning,
    Rounding,
    decompose_together,
)
from compress.numerics.grids import SIDE, QuantizationArgs
from compress.own_model.modeling_compress import AdaptedLinear
from compress.stages._slim_parts import USUAL_GROUP, Adapt, Prune, Quantize
from compress.stages._stage import StageConfig, is_target, unmatched


class Slim(StageConfig):
    """Quantization, sparsity and a low-rank adapter for what they lose: W becomes S + B A.

    target: which linears: `all`, `attention`, `mlp`, or patterns of names below a block such as `*.down_proj`.
    polish: rounds of coordinate descent after a sweep.
    center: a linear with a bias keeps the mean of its outputs by it, so that only what varies about it counts.
    input_activations: what each token's inputs are rounded to when the model runs.
    form: `packed`, for engines, `compact`, in as few bits as we can, `gguf`, in llama.cpp's types, or `dense`, merged
        again at the old size.
    dtype: of scales; settled when the model is known.
    """

    site: ClassVar = LinearSite
    in_written_form: ClassVar = True
    stage: Literal["slim"] = "slim"
    form: Literal["packed", "compact", "gguf", "dense"] = "packed"
    target: tuple[str, ...] = ("all",)
    prune: Prune | None = None
    quantize: Quantize | None = None
    adapt: Adapt | None = None
    polish: Annotated[int, Field(ge=0)] = 0
    center: bool = False
    input_activations: Literal["fp8", "int8"] | None = None
    dtype: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Slim":
        form, prune, adapt, inputs, given = self.form, self.prune, self.adapt, self.input_activations, self.quantize
        quantize, gguf, compact = given or Quantize(), form == "gguf", form == "compact"
        fits = given is not None and quantize.scale_dtype is None and (quantize.type == "float") == (inputs == "fp8")
        unfit, unpacked = inputs is not None and not fits, inputs is not None and form != "packed"
        beside = prune is not None or adapt is not None or inputs is not None
        shares = prune is not None and not prune.parsed.is_grouped
        coded = adapt is not None and adapt.num_bits is not None
        typed = quantize.gguf_type is None and (quantize.engine is not None or quantize.types is not None)
        rules = {
            "slim needs prune or quantize; give it one": prune is None and given is None,
            "form gguf and quantize.gguf_type go together; give both or neither": gguf == (quantize.gguf_type is None),
            "a GGUF file has no room for pruning, adapters or rounded inputs; leave them out": gguf and beside,
            "types of integers are for packed form without pruning, adapters or rounded inputs; leave these out": typed
            and (beside or form != "packed"),
            f"input_activations {inputs} goes with packed form, not {form}; leave it out or take packed": unpacked,
            f"input_activations {inputs} does not fit the weights; it is int8 beside integers, fp8 beside fp8": unfit,
            "compact form holds integers, not fp8, nvfp4 or mxfp4; take integers or packed form": compact
            and quantize.type == "float",
            "compact form holds symmetric grids; leave asymmetric out or take packed form": compact
            and not quantize.symmetric,
            "compact form holds patterns such as 2:4, no shares; prune 2:4 or take packed form": compact and shares,
            "important_inputs has no room in packed form; take compact form, or dense": form == "packed"
            and quantize.important_inputs,
            "adapters in few bits are for compact form; leave their num_bits out or take compact": coded
            and not compact,
        }
        if broken := [rule for rule, is_broken in rules.items() if is_broken]:
            raise ValueError("; ".join(broken))
        return self

    @property
    def opens(self) -> str | None:
        return "types" if self.quantize is not None and self.quantize.is_open else None

    def decided(self, choice: Mapping[str, Any]) -> "Slim":
        if self.quantize is None or "types" not in choice:
            return self
        return self.model_copy(update={"quantize": self.quantize.model_copy(update={"types": choice["types"]})})

    @property
    def requires(self) -> Requirements:
        if self.opens is None:
            return Requirements(inputs="single_pass")
        need = SurveyNeed.LINEARS | SurveyNeed.GRADIENT | SurveyNeed.TYPES
        watch = LinearFilter(partial(is_target, self.target), 0.0, lambda has_bias: self.center and has_bias)
        return Requirements(inputs="single_pass", survey=need, watch=watch)

    @property
    def has_types(self) -> bool:
        """Whether each linear has a type of its own."""
        return self.quantize is not None and self.quantize.types is not None

    def targets(self, linear: LinearShape) -> bool:
        return not (self.has_types and self.type_of(linear) is None) and is_target(
            self.target, linear.name, linear.part
        )

    def type_of(self, linear: LinearShape) -> str | None:
        """The type that it has of its own."""
        types = (self.quantize and self.quantize.types) or {}
        if linear.path in types or (self.quantize and self.quantize.gguf_type):
            return types.get(linear.path)
        fitting = (name for pattern, name in types.items() if is_target((pattern,), linear.name, linear.part))
        return next(iter([*fitting][::-1]), None)

    def candidates(self, inputs: int) -> tuple[str, ...]:
        """The types among which that of a matrix is found whose rows have so many weights."""
        engine = self.quantize and self.quantize.engine
        return packed_types.candidates(engine, inputs) if engine else gguf_types.candidates(inputs)

    def plan(self, spec: ModelSpec) -> tuple["Slim", ModelSpec]:
        known = replace(spec, undecided=spec.undecided - {"blocks"}) if self.opens else spec
        known.require_decided("Storage goes by widths that are known beforehand. Give slice a ratio.")
        linears = spec.written_linears
        report(self.problems(linears))
        settled = self.settled(linears, spec)
        report(settled.unfit(spec))
        stored = [linear for linear in linears if settled.targets(linear) and self.form != "dense"]
        storage = {linear.path: settled.storage(linear) for linear in stored} if not self.opens else {}
        if self.opens:
            undecided = spec.undecided | {"types"}
            return settled, replace(spec, gguf_type=AUTO if self.form == "gguf" else None, undecided=undecided)
        if self.form == "compact":
            spec = replace(spec, architecture=as_own(spec.architecture))
        notes = [*spec.notes, *storage_notes(replace(spec, storage=storage))]
        if self.prune is not None and self.prune.parsed.is_grouped:
            notes.append(
                f"No engine runs {self.prune.pattern} faster any more: take `compress quantize` instead, unless you "
                "have kernels for it."
            )
        left = {linear.name: linear.n for linear in linears if self.targets(linear) and linear.path not in storage}
        if self.form == "gguf" and left:
            what = "llama.cpp's types take inputs in blocks of 32, so some linears stay in the model's dtype"
            notes.append(f"{what}: {some(left)}.")
        gguf_type = None if self.quantize is None else self.quantize.gguf_type
        return settled, replace(spec, storage=storage, notes=tuple(notes), gguf_type=gguf_type)

    def settled(self, linears: Sequence[LinearShape], spec: ModelSpec) -> "Slim":
        """With what goes by the model's linears and the dtype that is written said."""
        changes: dict[str, Any] = {"dtype": str(spec.dtype).removeprefix("torch.")}
        if self.quantize is not None and self.quantize.gguf_type == AUTO:
            check_named(spec.config())
        elif self.quantize is not None and self.quantize.gguf_type is not None:
            rows = [(linear.path, linear.n) for linear in linears if self.targets(linear)]
            tensors = resolve(self.quantize.gguf_type, spec.config(), rows)
            changes["quantize"] = self.quantize.model_copy(update={"types": tensors})
        elif self.quantize is not None and self.quantize.types is not None:
            types = {linear.path: str(self.type_of(linear)) for linear in linears if self.targets(linear)}
            changes["quantize"] = self.quantize.model_copy(update={"types": types})
        elif self.quantize is not None and self.quantize.engine is not None:
            pass  # types are to be found
        elif self.quantize is not None and self.quantize.strategy is None:
            divides = all(linear.n % USUAL_GROUP == 0 for linear in linears if self.targets(linear))
            usual = {"strategy": "group", "group_size": USUAL_GROUP} if divides else {"strategy": "channel"}
            changes["quantize"] = self.quantize.model_copy(update=usual)
        return self.model_copy(update=changes)

    def problems(self, linears: Sequence[LinearShape]) -> list[str]:
        """What does not fit a model with these linears in its blocks."""
        problems, targets = unmatched(self.target, linears), [linear for linear in linears if self.targets(linear)]
        if self.prune is not None and self.prune.parsed.is_grouped:
            group = self.prune.parsed.group
            problems += uneven(
                targets, group, f"{self.prune.pattern} takes", "Leave it out with --target, or prune 50%"
            )
        if self.quantize is not None and self.quantize.strategy == "block":
            problems += uneven(targets, SIDE, "A block takes", "Leave it out with --target, or take --group channel")
        if self.quantize is not None and self.form == "packed":
            remedy = "Take another --group, or channel"
            if self.quantize.scale_dtype is not None:
                remedy = "Leave it out with --target, or take other --bits"
            groups = dict[int, list[LinearShape]]()
            for linear in targets:
                if (size := self.quantize_of(linear).group_size) is not None:
                    groups.setdefault(size, []).append(linear)
            for size, found in groups.items():
                problems += uneven(found, size, "A scale takes", remedy)
            patterns = (self.quantize.types or {}).keys() - {linear.path for linear in linears}
            problems += unmatched(sorted(patterns), linears)[:3]
        if self.quantize is not None and self.quantize.gguf_type == AUTO:
            inputs = {linear.path: linear.n for linear in linears}
            problems += gguf_types.misfits(self.quantize.types or {}, inputs)
        if self.form == "packed" and any(fused_piece(linear.path) for linear in linears):
            problems.append(
                "A model with experts cannot be packed: transformers fuses them while it loads, looks for the packed "
                "parts of all, and has no linears for an adapter. Store it with --compact, or merge it with "
                "--materialize."
            )
        return problems

    def unfit(self, spec: ModelSpec) -> list[str]:
        """What of the types that are given, or to be found, engines do not run."""
        quantize = self.quantize
        if quantize is None or quantize.gguf_type is not None or not (quantize.engine or quantize.types):
            return []
        return packed_types.misfits(quantize.engine, quantize.types or {}, spec)

    def quantize_of(self, linear: LinearShape) -> Quantize:
        """What is said of quantization, with the bits and the group of the linear's own type."""
        quantize, name = self.quantize or Quantize(), self.type_of(linear)
        if name is None or quantize.gguf_type is not None:
            return quantize
        kind = QuantizationArgs.of_name(name)
        return quantize.model_copy(update=kind.model_dump(include={"num_bits", "strategy", "group_size"}))

    def storage(self, linear: LinearShape) -> Storage:
        quantize, adapt = self.quantize and self.quantize_of(linear), self.adapt
        if quantize is not None and quantize.gguf_type is not None:
            return Storage(form="gguf", block_type=self.type_of(linear))
        return Storage(
            form="compact" if self.form == "compact" else "packed",
            weights=None if quantize is None else quantize.args,
            pattern=None if self.prune is None else self.prune.parsed,
            rank=0 if adapt is None else adapt.rank_of(linear),
            adapter=None if adapt is None else adapt.args,
            input_activations=self.input_activations,
            important_inputs=quantize is not None and quantize.important_inputs,
        )

    def decomposition(self, linear: LinearShape) -> Decomposition:
        prune, quantize, adapt = self.prune, self.quantize and self.quantize_of(linear), self.adapt
        pruning = rounding = adapting = None
        if prune is not None:
            pruning = Pruning(method=prune.method, pattern=prune.parsed, iterations=prune.iterations)
        if quantize is not None:
            rounding = Rounding(
                args=quantize.args,
                steps="mse" if quantize.method == "gptq" else quantize.method,
                sweeps=quantize.method == "gptq",
                actorder=quantize.actorder == "weight",
                important_inputs=quantize.important_inputs,
                stored=quantize.scale_dtype or (None if self.dtype is None else getattr(torch, self.dtype)),
                blocks=TYPES[str(self.type_of(linear))] if quantize.gguf_type else None,
            )
        if adapt is not None:
            adapting = Adapting(method=adapt.method, rank=adapt.rank_of(linear), rounds=adapt.rounds)
        return Decomposition(prune=pruning, quantize=rounding, adapt=adapting, polish=self.polish)

    def apply(self, site: LinearSite) -> None:
        self.apply_together([site])

    def apply_together(self, sites: Sequence[LinearSite]) -> None:
        sites = [site for site in sites if self.targets(site.shape)]
        products = [site.product for site in sites]
        for parts in zip_longest(*(site.linears() for site in sites)):
            alike = dict[tuple[int, bool], list[LinearSite]]()  # by their inputs, and by whether these are centered
            for part in [part for part in parts if part is not None]:
                alike.setdefault((id(part.inputs), self.centers(part)), []).append(part)
            for group in alike.values():
                self.store(group)
        for site, product in zip(sites, products, strict=True):
            site.notes["lost"] = lost(product, site.product, site.inputs, centered=self.centers(site))

    def centers(self, site: LinearSite) -> bool:
        return self.center and site.shape.has_bias

    def store(self, sites: Sequence[LinearSite]) -> None:
        first, hows = sites[0], [self.decomposition(site.shape) for site in sites]
        decomposed = decompose_together(
            [site.weight for site in sites],
            first.inputs,
            hows,
            centered=self.centers(first),
            dtype=first.dtype,
            names=[site.name for site in sites],
        )
        for site, how, found in zip(sites, hows, decomposed, strict=True):
            site.notes |= {"adapter_rank": how.adapt.rank} if how.adapt else {}
            if self.quantize is not None:
                site.notes["bits"] = self.type_of(site.shape) or self.quantize.precision
            site.notes |= {"pattern": self.prune.pattern} if self.prune else {}
            bias = site.bias if found.shift is None or site.bias is None else site.bias + found.shift
            site.replace(self.module(site, found, bias))

    def module(self, site: LinearSite, found: Decomposed, bias: Tensor | None) -> nn.Linear | AdaptedLinear:
        if self.form == "dense":
            with torch.device("meta"):
                merged = nn.Linear(site.shape.n, site.shape.m, bias=bias is not None)
            fill(merged, found.product, bias, site.dtype)
            return merged
        A, B = (None, None) if found.adapter is None else (found.adapter.A, found.adapter.B)
        storage = self.storage(site.shape)
        return stored_linear(storage, found.S, found.grid, found.mask, A, B, bias, site.dtype)


def uneven(linears: Sequence[LinearShape], group: int, what: str, remedy: str) -> list[str]:
    """That there are linears whose inputs come in no whole groups."""
    found = {linear.name: linear.n for linear in linears if linear.n % group}
    return [f"{what} inputs in groups of {group}, but {some(found)}. {remedy}."] if found else []


def some(inputs: Mapping[str, int]) -> str:
    return ", ".join(f"{name} has {n}" for name, n in list(inputs.items())[:3])


def storage_notes(spec: ModelSpec) -> list[str]:
    """Say what packed linears ask of the engines that load them."""
    first = next(iter(spec.storage.values()), None)
    if first is None or first.form != "packed":
        return []
    reason = packed_types.not_for_vllm(spec)
    notes = [] if reason is None else [f"vLLM cannot serve this: {reason}. transformers and compress.load run it."]
    lacking = [*filter(None, map(lacks_cpu_kernel, dict.fromkeys(spec.storage.values())))]
    if reason is None and lacking:
        what = " or ".join(dict.fromkeys(lacking))
        notes.append(f"vLLM runs this on GPUs; its build for CPUs has no kernel for {what}.")
    if first.weights is not None and first.weights.precision == "mxfp4":
        notes.append("vLLM runs MXFP4 weights in bfloat16 alone; on Blackwell GPUs it may round inputs to MXFP4 too.")
    if first.pattern is not None and first.weights is not None:
        notes.append(
            "Packed for engines, pruned weights are stored as zeros, in as many bytes as unpruned ones. --compact "
            "stores them small; unpruned is better at these bytes."
        )
    return notes
