"""A model with factorised linears: our own architecture around the one that it would have without."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.checkpoints.targets import Shape, special_tokens
from compress.checkpoints.wrapped import INNER, WrappedLayout, WrappedTarget
from compress.models.configuration_lowrank import LowRankConfig
from compress.models.configuration_lowrank_sliced import LowRankSlicedConfig
from compress.models.modeling_lowrank import LowRankForCausalLM
from compress.models.modeling_lowrank_sliced import LowRankSlicedForCausalLM
from compress.streaming.layout import Layout


@dataclass(frozen=True)
class LowRankTarget(WrappedTarget):
    @property
    def architecture(self) -> str:
        return "LowRankForCausalLM" if self.base.is_stock else "LowRankSlicedForCausalLM"

    @property
    def is_stock(self) -> bool:
        return False

    @property
    def carried(self) -> tuple[str, ...]:
        own = ("configuration_lowrank", "modeling_lowrank")
        experts = ("modeling_experts",)
        beside = ("configuration_lowrank_sliced", "modeling_lowrank_sliced")
        return (*own, *experts) if self.base.is_stock else (*own, *beside, *self.base.carried)

    def config(self, shape: Shape, dtype: torch.dtype) -> Any:
        base = self.base.config(shape, dtype)
        config_class: type[LowRankConfig] = LowRankConfig if self.base.is_stock else LowRankSlicedConfig
        suffix = "lowrank" if self.base.is_stock else "lowrank_sliced"
        entries = {path: {"rank": f.rank, "form": f.form, "bias": f.has_bias} for path, f in shape.factors.items()}
        config = config_class(
            text_config=base,
            factors=entries,
            architectures=[self.architecture],
            auto_map={
                "AutoConfig": f"configuration_{suffix}.{config_class.__name__}",
                "AutoModelForCausalLM": f"modeling_{suffix}.{self.architecture}",
            },
            **special_tokens(base),
        )
        config.dtype = dtype
        return config

    def model(self, shape: Shape, *, num_blocks: int | None = None) -> PreTrainedModel:
        config = self.config(shape, torch.float32)
        model_class = LowRankForCausalLM if self.base.is_stock else LowRankSlicedForCausalLM
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config)
        model.tie_weights()
        return model

    def layout(self, dtype: torch.dtype) -> Layout:
        return WrappedLayout(self.base.layout(dtype), INNER)
