"""Our own architecture, for what no class of transformers can hold.

That is a stream that has another basis after each branch, as in SliceGPT, or that belongs to a family whose class ties
the heads' size to the hidden one (OPT); and linears that are factorized, or stored in few bits in our own way.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from compress.architectures.architecture import ONE_WIDTH, Architecture, ModelSpec, rank_step, usual_step
from compress.architectures.stock import Stock
from compress.calibration.weights import Layout
from compress.own_model.configuration_compress import CompressConfig

CLASS = "CompressForCausalLM"
BY_BACKEND = ("llama", "mistral", "qwen2", "qwen3")  # the model_types that vLLM's Transformers backend has run as ours
DECI_LM = "DeciLMForCausalLM"  # of engines: a Llama whose MLPs have a width each
AUTO_MAP = {
    "AutoConfig": "configuration_compress.CompressConfig",
    "AutoModel": "modeling_compress.CompressModel",
    "AutoModelForCausalLM": f"modeling_compress.{CLASS}",
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Own(Architecture):
    """Our own class: sliced with bases of its own, factorized, or stored in few bits.

    inside: the stock architecture whose linears are changed; None where the stream is sliced in a form of our own.
    free_widths: its MLPs may have a width in each block.
    shortcuts: the points of that stream have bases of their own.
    class_name: what config.json calls it: ours, or with free widths alone `DECI_LM`, the same model of other programs.
    """

    inside: Stock | None = None
    shortcuts: bool = True
    free_widths: bool = False
    class_name: str = CLASS

    is_stock: ClassVar = False

    def __post_init__(self) -> None:
        if self.inside is not None and self.inside.dense is not self.dense:  # blocks have been left out
            object.__setattr__(self, "inside", replace(self.inside, dense=self.dense, family=self.family))

    @property
    def zero_biases(self) -> tuple[str, ...]:
        return () if self.inside is None else self.inside.zero_biases

    def base_config(self, spec: ModelSpec, dtype: torch.dtype) -> CompressConfig:
        neurons = spec.units.get("neurons")
        widths = list(neurons) if isinstance(neurons, tuple) else [neurons] * spec.num_blocks
        if self.inside is not None:
            text_config = self.inside.base_config(widest(spec), dtype)
        else:  # the dense model's with another MLP width
            text_config = copy.deepcopy(self.dense)
            # The embeddings and the head lie in different bases, so what was tied no longer is.
            text_config.tie_word_embeddings = False
            text_config.name_or_path = ""  # a path of the machine it was made on
            for units in self.family.units("neurons"):
                setattr(text_config, units.count, max(neurons) if isinstance(neurons, tuple) else neurons)
        config = CompressConfig(
            text_config=text_config,
            structure=self.family.structure(),
            slicing=self._slicing(spec) if self.inside is None else None,
            mlp_widths=widths if self.free_widths else None,
            factors={path: {"rank": f.rank, "form": f.form, "bias": f.has_bias} for path, f in spec.factors.items()},
            storage={path: stored.entry() for path, stored in spec.storage.items() if stored.form == "compact"},
            architectures=[self.class_name],
            auto_map=dict(AUTO_MAP),
            # Not every config has them all: CodeGen's has no pad_token_id.
            **{name: getattr(text_config, name, None) for name in TOKENS},
        )
        config.dtype = dtype
        return config

    def _slicing(self, spec: ModelSpec) -> dict[str, Any]:
        neurons = spec.units.get("neurons")
        return {
            "stream_widths": list(spec.stream_widths),
            "shortcuts": self.shortcuts,
            "mlp_widths": list(neurons) if isinstance(neurons, tuple) else None,
            "norm_width": self.dense.hidden_size,
            "norm_eps": self.family.epsilon(self.dense),
            "reader_bias": self.family.norm == "layer" and self.family.norm_offset,
        }

    def shortened(self, config: CompressConfig, num_blocks: int) -> CompressConfig:
        config.text_config = super().shortened(config.text_config, num_blocks)
        if config.mlp_widths is not None:
            config.mlp_widths = config.mlp_widths[:num_blocks]
        if config.slicing is not None:
            # Blocks alike, up to the last point, which has the head's width.
            widths, points = config.slicing["stream_widths"], num_blocks * len(self.family.branches)
            config.slicing["stream_widths"] = widths[:1] * points + widths[-1:]
        return config

    def layout(self, dtype: torch.dtype) -> Layout:
        # The names of experts' linears are ours, in files too.
        return Layout() if self.inside is None else replace(self.inside.layout(dtype), model_type="")

    def steps(self) -> Mapping[str, int]:
        if self.inside is not None:
            return self.inside.steps()
        # With shortcuts as the paper's code has it; without, as finely as for a stock shape.
        hidden = 8 if self.shortcuts else usual_step(self.dense.hidden_size, 1, at_least=16)
        neurons = self.family.dense_units(self.dense).get("neurons", self.dense.hidden_size)
        steps = {"hidden": hidden, "neurons": usual_step(neurons, 1, at_least=64)}
        return {**steps, "kv_groups": 1, "rank": rank_step(self.dense)}

    def not_for_vllm(self, spec: ModelSpec) -> str | None:
        if self.inside is None and spec.stream_widths[-1] != spec.dense_width:
            return "its heads take a stream of the dense width"
        if self.dense.model_type not in BY_BACKEND:
            return f"of our architecture it is known to run only {', '.join(BY_BACKEND)}"
        return None

    def problems(self, spec: ModelSpec) -> list[str]:
        if self.inside is not None:
            return self.inside.problems(widest(spec) if self.free_widths else spec)
        if not self.shortcuts and len(set(spec.stream_widths)) > 1:
            return [ONE_WIDTH]
        if self.family.first_width_last and spec.stream_widths[0] != spec.stream_widths[-1]:
            first, last = spec.stream_widths[0], spec.stream_widths[-1]
            return [
                f"The stock code of {self.dense.model_type} gives the head a stream as wide as the embeddings', here "
                f"{last} and {first}. Give one ratio for all blocks, and use --set slice.slice_head=true."
            ]
        if isinstance(spec.units.get("neurons"), tuple) and any(branch.experts for branch in self.family.branches):
            return ["Experts have as many neurons in every block. Give one number for all blocks."]
        if spec.units.get("kv_groups", 0) != self.family.dense_units(self.dense).get("kv_groups", 0):
            return ["KV groups can be deleted only where the model keeps a stock shape."]
        return []


def widest(spec: ModelSpec) -> ModelSpec:
    """The same with as many neurons in each block as in the widest."""
    units = {kind: max(count) if isinstance(count, tuple) else count for kind, count in spec.units.items()}
    return replace(spec, units=units)


def as_own(architecture: Architecture) -> Own:
    if isinstance(architecture, Own):
        return replace(architecture, class_name=CLASS)
    assert isinstance(architecture, Stock)
    return Own(architecture.dense, architecture.family, architecture)
