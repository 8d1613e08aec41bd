"""Write the result as a class of transformers, which any engine loads: the dense model's own, or a narrower one.

With one basis for the whole stream and RMSNorm(x) = x / sqrt(sum(x^2) / D + eps) at its dense width D, a hidden size of
d is the stock class's own with norm weights sqrt(D / d) and epsilon eps D / d. What a norm weight loses by rounding to
16 bits is made up for in the linears after it.

LayerNorm stays LayerNorm (Phi, StarCoder2): the kept directions are laid into the vectors of R^d whose coordinates sum
to zero, where LayerNorm subtracts nothing. That costs one channel; a head that has no bias for what the final norm's
offset was costs another, whose norm weight is 0 and norm bias 1. Norms of such a model have no offset but that.

Norms without a gain, with an epsilon of their own (OLMo), stay so: the stream is scaled by sqrt(d / D) instead.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compress.architectures.architecture import ONE_WIDTH, Architecture, ModelSpec, rank_step, usual_step
from compress.calibration.weights import Layout
from compress.families import Family, StockShape
from compress.models.branch import Branch, ReaderGroup, set_weight
from compress.models.factors import WrittenForm, in_form
from compress.numerics.frames import Lift, zero_mean_basis

GROUPED = 8  # numbers in 16 bytes, to which torch's grouped products want rows of experts' weights aligned


@dataclass(frozen=True)
class Stock(Architecture):
    """A stock class. narrows: stream and units may be narrower than the dense model's; otherwise every shape stays."""

    narrows: bool = False

    is_stock: ClassVar = True

    @property
    def class_name(self) -> str:
        name: str = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]
        return name

    @property
    def zero_biases(self) -> tuple[str, ...]:
        return self.rules.zero_biases if self.narrows else ()

    @property
    def model_type(self) -> str:
        own: str = self.dense.model_type
        return self.rules.written_as or own if self.narrows else own

    @property
    def has_experts(self) -> bool:
        return any(branch.experts for branch in self.family.branches)

    @property
    def rules(self) -> StockShape:
        assert self.family.stock is not None
        return self.family.stock

    def base_config(self, spec: ModelSpec, dtype: torch.dtype) -> Any:
        config = self._narrowed(spec) if self.narrows else self._with_units(spec)
        config.name_or_path = ""  # a path of the machine it was made on
        config.architectures = [self.class_name]
        config.dtype = dtype
        return config

    def _with_units(self, spec: ModelSpec) -> Any:
        """The dense config but for how many units a block has."""
        config = copy.deepcopy(self.dense)
        for units in (units for branch in self.family.branches for units in branch.units):
            setattr(config, units.count, spec.units[units.kind])
        if spec.units.get("kv_groups") != spec.dense_units.get("kv_groups"):
            config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            config.num_attention_heads = self.num_heads(spec)
        return config

    def _narrowed(self, spec: ModelSpec) -> Any:
        dense, width = self.dense, spec.stream_widths[0]
        changes: dict[str, Any] = {
            "model_type": self.model_type,
            "hidden_size": width,
            "head_dim": getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads,
            "num_attention_heads": self.num_heads(spec),
            "tie_word_embeddings": False,
            **self.rules.adds,
        }
        if isinstance(self.family.norm_eps, str):
            changes[self.family.norm_eps] = self.family.epsilon(dense) * dense.hidden_size / width
        for branch in self.family.branches:
            changes |= {units.count: spec.units[units.kind] for units in branch.units}
        # Built anew, so that the config class sees the final values together; what it has no key for, it does not get.
        data = dense.to_dict()
        if self.rules.written_as:
            known = AutoConfig.for_model(self.model_type).to_dict().keys()
            data = {key: value for key, value in data.items() if key in known}
        return AutoConfig.for_model(**data | changes)

    def num_heads(self, spec: ModelSpec) -> int:
        heads: int = self.dense.num_attention_heads
        groups = spec.units.get("kv_groups")
        return heads // self.dense.num_key_value_heads * groups if isinstance(groups, int) else heads

    def layout(self, dtype: torch.dtype) -> Layout:
        if not self.narrows:
            return Layout(model_type=self.model_type, ties_head=self.dense.tie_word_embeddings)
        return NarrowLayout(model_type=self.model_type, family=self.family, rules=self.rules, dtype=dtype)

    def steps(self) -> Mapping[str, int]:
        grouped, steps = GROUPED if self.has_experts else 1, {"kv_groups": 1, "rank": rank_step(self.dense)}
        if neurons := self.family.dense_units(self.dense).get("neurons"):
            steps["neurons"] = usual_step(neurons, grouped, at_least=64)
        if self.narrows:
            heads = self.dense.num_attention_heads if self.rules.heads_divide_width else 1
            steps["hidden"] = usual_step(self.dense.hidden_size, math.lcm(heads, grouped), at_least=16)
        return steps

    def problems(self, spec: ModelSpec) -> list[str]:
        if any(isinstance(count, tuple) for count in spec.units.values()):
            return [f"{self.class_name} has as many of each unit in every block. Give one number for all blocks."]
        if not self.narrows:
            return []
        if len(set(spec.stream_widths)) > 1:
            return [ONE_WIDTH]
        width, heads = spec.stream_widths[0], self.num_heads(spec)
        neurons = spec.units.get("neurons")
        if self.has_experts and isinstance(neurons, int) and (width % GROUPED or neurons % GROUPED):
            return [
                f"transformers multiplies experts in groups, which takes multiples of {GROUPED}: not a hidden size of "
                f"{width} with {neurons} neurons. Use --round-to {GROUPED}."
            ]
        if self.rules.heads_divide_width and width % heads:
            return [
                f"A hidden size of {width} is no multiple of the {heads} attention heads, as {self.class_name} "
                f"asks for. Use --round-to {heads}."
            ]
        if self.layout(torch.float32).directions(width) < 1:
            return [f"A hidden size of {width} leaves no direction of the stream. Slice less."]
        return []


@dataclass(frozen=True, kw_only=True)
class NarrowLayout(Layout):
    """Norms with a gain of sqrt(D / d), readers and writers that go with it. dtype: of the written weights."""

    family: Family
    rules: StockShape
    dtype: torch.dtype

    def directions(self, width: int) -> int:
        return width - (self.family.norm == "layer") - self.rules.constant_channel

    def form(self, branch: Branch, name: str) -> WrittenForm:
        width = self.stream_width(branch)
        columns, root = self.lift(width), (branch.dense_width / width) ** 0.5
        if name in branch.writers:
            has_bias = name in self.rules.zero_biases
            return WrittenForm(outputs=Lift(columns, self._stream_scale(root)), has_bias=has_bias)
        # Where outputs pass a norm, its epsilon grows as the stream's does, and what it is given by as much.
        is_normed = name in dict(self.rules.normed_readers)
        gain = self._norm_weight(branch, width) + self._norm_offset(branch)
        return WrittenForm(Lift(columns, gain / root), Lift(scale=root if is_normed else 1.0))

    def settle(self, branch: Branch) -> None:
        width = self.stream_width(branch)
        ratio = branch.dense_width / width
        lift = Lift(self.lift(width), self._stream_scale(ratio**0.5))
        linears = [name for name, writer in branch.writers.items() if isinstance(writer, nn.Linear)]
        forms = {name: self.form(branch, name) for name in (*branch.readers, *linears)}
        for name, form in forms.items():
            stored = branch.written(name)
            branch.replace_linear(name, in_form(branch.linear(name), form) if stored is None else stored)
        for table in branch.writers.values():
            if isinstance(table, nn.Embedding):
                weight = lift.up(table.weight.double())
                # Gemma multiplies embeddings by the root of the hidden size, which is another one now.
                if isinstance(embed_scale := getattr(table, "embed_scale", None), Tensor):
                    weight = weight * ratio**0.5
                    table.embed_scale = embed_scale / ratio**0.5
                set_weight(table, weight)
        for group in branch.reader_groups():
            self._settle_norm(branch, group, width)
        for name, norm_name in self.rules.normed_readers:
            if name in branch.readers:
                assert branch.owner is not None
                norm: Any = branch.owner.get_submodule(norm_name)
                norm.variance_epsilon = branch.norm_eps * ratio

    def stream_width(self, branch: Branch) -> int:
        """The written hidden size, from the directions that a branch reads or writes."""
        if branch.readers:
            directions = branch.in_features(next(iter(branch.readers)))
        else:
            directions = next(iter(branch.writers.values())).weight.shape[1]
        return directions - self.directions(0)

    def lift(self, width: int) -> Float64[Tensor, "width directions"] | None:
        """Orthonormal columns that sum to zero, and leave the last channel free where it is the constant one."""
        if self.family.norm != "layer":
            return None
        basis = zero_mean_basis(width - self.rules.constant_channel)
        return torch.cat([basis, basis.new_zeros(1, basis.shape[1])]) if self.rules.constant_channel else basis

    def _stream_scale(self, root: float) -> float:
        """Scale of the stream, where norms have no gain to take it."""
        return 1.0 if self.family.norm_gain else 1 / root

    @staticmethod
    def _norm_offset(branch: Branch) -> float:
        return 1.0 if branch.norm_kind == "rms_plus_one" else 0.0

    def _norm_weight(self, branch: Branch, width: int) -> float:
        """The gain sqrt(D / d) as the output dtype has it; the readers take up what rounding changed."""
        if not self.family.norm_gain:
            return 1.0
        weight = (branch.dense_width / width) ** 0.5 - self._norm_offset(branch)
        return float(torch.tensor(weight, dtype=torch.float64).to(self.dtype))

    def _settle_norm(self, branch: Branch, group: ReaderGroup, width: int) -> None:
        norm_class: Any = branch.norm_class
        if not self.family.norm_gain:
            group.replace_norm(norm_class(width))
            return
        weight = torch.full((width,), self._norm_weight(branch, width), dtype=torch.float64)
        norm = norm_class(width, eps=branch.norm_eps * branch.dense_width / width)
        bias = torch.zeros_like(weight)
        if self.rules.constant_channel and not branch.writers:
            weight[-1], bias[-1] = 0.0, 1.0
            # The head's bias turns into weights for the channel that is always 1.
            for linear in branch.readers.values():
                if linear.bias is not None:
                    columns = [linear.weight.double()[:, :-1], linear.bias.double()[:, None]]
                    linear.register_parameter("bias", None)
                    set_weight(linear, torch.cat(columns, dim=1))
        norm.weight = branch.parameter(weight)
        if self.family.norm == "layer" and self.family.norm_offset:
            norm.bias = branch.parameter(bias)
        group.replace_norm(norm)
