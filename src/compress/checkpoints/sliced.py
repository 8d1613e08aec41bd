"""A sliced model in our own architecture: every point of the stream with a width of its own, shortcuts between bases.

For models that no stock class has room for: a rotation a layer, as in SliceGPT, or a family whose class ties the heads'
size to the hidden one (OPT).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.checkpoints.targets import ONE_WIDTH, Shape, dense_units, rank_step, shortened, special_tokens, usual_step
from compress.families import Family
from compress.models.branch import Branch
from compress.models.configuration_sliced import SlicedConfig
from compress.models.modeling_sliced import SlicedForCausalLM
from compress.models.written import WrittenForm
from compress.streaming.layout import Layout


@dataclass(frozen=True)
class SlicedTarget:
    """
    dense: the config of the dense model. shortcuts: the points have bases of their own.
    """

    dense: Any
    family: Family
    shortcuts: bool = True

    @property
    def architecture(self) -> str:
        return "SlicedForCausalLM"

    @property
    def is_stock(self) -> bool:
        return False

    @property
    def carried(self) -> tuple[str, ...]:
        return ("configuration_sliced", "modeling_sliced", "modeling_experts")

    @property
    def zero_biases(self) -> tuple[str, ...]:
        return ()

    def config(self, shape: Shape, dtype: torch.dtype) -> SlicedConfig:
        config, family = self.dense, self.family
        text_config = copy.deepcopy(config)
        # The embeddings and the head lie in different bases, so what was tied no longer is.
        text_config.tie_word_embeddings = False
        text_config.name_or_path = ""  # a path of the machine it was made on
        neurons = shape.units.get("neurons")
        for units in family.units("neurons"):
            setattr(text_config, units.count, max(neurons) if isinstance(neurons, tuple) else neurons)
        sliced = SlicedConfig(
            text_config=text_config,
            structure=family.structure(),
            stream_widths=list(shape.widths),
            shortcuts=self.shortcuts,
            mlp_widths=list(neurons) if isinstance(neurons, tuple) else None,
            norm_width=config.hidden_size,
            norm_eps=family.epsilon(config),
            reader_bias=family.norm == "layer" and family.norm_offset,
            architectures=[self.architecture],
            auto_map={
                "AutoConfig": "configuration_sliced.SlicedConfig",
                "AutoModelForCausalLM": "modeling_sliced.SlicedForCausalLM",
            },
            **special_tokens(config),
        )
        sliced.dtype = dtype
        return sliced

    def model(self, shape: Shape, *, num_blocks: int | None = None) -> PreTrainedModel:
        config = self.config(shape, torch.float32)
        if num_blocks is not None:
            config.text_config = shortened(config.text_config, num_blocks)
            # Blocks alike, up to the last point, which has the head's width.
            points = num_blocks * len(self.family.branches)
            config.stream_widths = [shape.widths[0]] * points + [shape.widths[-1]]
        with torch.device("meta"):
            return SlicedForCausalLM(config)

    def layout(self, dtype: torch.dtype) -> Layout:
        return SlicedLayout()

    def steps(self) -> Mapping[str, int]:
        units = dense_units(self.dense, self.family)
        # With shortcuts as the paper's code has it; without, as finely as for a stock shape.
        hidden = 8 if self.shortcuts else usual_step(self.dense.hidden_size, 1, at_least=16)
        neurons = usual_step(units["neurons"], 1, at_least=64)
        return {"hidden": hidden, "neurons": neurons, "kv_groups": 1, "rank": rank_step(self.dense)}

    def faults(self, shape: Shape) -> list[str]:
        if not self.shortcuts and len(set(shape.widths)) > 1:
            return [ONE_WIDTH]
        if self.family.first_width_last and shape.widths[0] != shape.widths[-1]:
            return [
                f"The stock code of {self.dense.model_type} gives the head a stream as wide as the embeddings', here "
                f"{shape.widths[-1]} and {shape.widths[0]}. Give one ratio for all blocks, and use --slice-head."
            ]
        if isinstance(shape.units.get("neurons"), tuple) and any(branch.experts for branch in self.family.branches):
            return ["Experts have as many neurons in every block. Give one number for all blocks."]
        if shape.units.get("kv_groups", 0) != dense_units(self.dense, self.family).get("kv_groups", 0):
            return ["KV groups can be deleted only where the model keeps a stock shape."]
        return []


class SlicedLayout:
    """The architecture has the parts as they come out of the walk."""

    @property
    def ties_head(self) -> bool:
        return False

    def directions(self, width: int) -> int:
        return width

    def form(self, branch: Branch, name: str) -> WrittenForm:
        return WrittenForm()

    def settle(self, branch: Branch) -> None:
        pass

    def written(self, name: str) -> str:
        return name

    def file_name(self, name: str) -> str:
        return name

    def in_adapter(self, name: str) -> str | None:
        return None
