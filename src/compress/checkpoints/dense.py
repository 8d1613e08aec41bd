"""The dense model's own architecture: what linears are taken out of and put into, at their old shapes."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compress.checkpoints.targets import Shape, rank_step, shortened
from compress.models.branch import Branch
from compress.models.expert_names import file_name
from compress.models.loading import empty_model
from compress.models.modeling_experts import unfuse_experts
from compress.models.written import WrittenForm
from compress.streaming.layout import Layout


@dataclass(frozen=True)
class DenseTarget:
    """
    dense: the config of the dense model.
    """

    dense: Any

    @property
    def architecture(self) -> str:
        name: str = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.dense.model_type]
        return name

    @property
    def is_stock(self) -> bool:
        return True

    @property
    def carried(self) -> tuple[str, ...]:
        return ()

    @property
    def zero_biases(self) -> tuple[str, ...]:
        return ()

    def config(self, shape: Shape, dtype: torch.dtype) -> Any:
        config = copy.deepcopy(self.dense)
        config.name_or_path = ""  # a path of the machine it was made on
        config.architectures = [self.architecture]
        config.dtype = dtype
        return config

    def model(self, shape: Shape, *, num_blocks: int | None = None) -> PreTrainedModel:
        config = self.config(shape, torch.float32)
        model = unfuse_experts(empty_model(config if num_blocks is None else shortened(config, num_blocks)))
        model.tie_weights()
        return model

    def layout(self, dtype: torch.dtype) -> Layout:
        return DenseLayout(self.dense.tie_word_embeddings, self.dense.model_type)

    def steps(self) -> Mapping[str, int]:
        return {"rank": rank_step(self.dense)}

    def faults(self, shape: Shape) -> list[str]:
        return []


@dataclass(frozen=True)
class DenseLayout:
    ties_head: bool
    model_type: str

    def directions(self, width: int) -> int:
        return width

    def form(self, branch: Branch, name: str) -> WrittenForm:
        return WrittenForm()

    def settle(self, branch: Branch) -> None:
        pass

    def written(self, name: str) -> str:
        return name

    def file_name(self, name: str) -> str:
        return file_name(name, self.model_type)

    def in_adapter(self, name: str) -> str | None:
        return None
