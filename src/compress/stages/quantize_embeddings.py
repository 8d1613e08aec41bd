"""Quantize the embeddings' table and the head to types of llama.cpp.

A tied matrix is stored once. Rows are rounded by themselves, each group of a row with its best scale.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from compress.architectures.architecture import ModelSpec
from compress.architectures.gguf_types import FileType, resolve
from compress.calibration.sites import Table
from compress.models.storage import Storage
from compress.numerics.block_grid import fit_blocks
from compress.numerics.block_types import TYPES
from compress.stages._stage import StageConfig


class QuantizeEmbeddings(StageConfig):
    """
    gguf_type: of the file, such as Q4_K_M, perhaps with types by tensor: Q4_K_M,token_embd=Q6_K.
    types: of each table, by its path; settled when the model is known.
    """

    site: ClassVar = Table
    stage: Literal["quantize_embeddings"] = "quantize_embeddings"
    gguf_type: str = "Q4_K_M"
    types: Mapping[str, str] = Field(default_factory=dict)

    @field_validator("gguf_type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        FileType.parse(value)
        return value

    def plan(self, spec: ModelSpec) -> tuple["QuantizeEmbeddings", ModelSpec]:
        spec.require_decided("Storage goes by widths that are known beforehand. Give slice a ratio.")
        types = resolve(self.gguf_type, spec.config(), spec.tables)
        storage = {path: Storage(form="gguf", bits=None, block_type=name) for path, name in types.items()}
        settled = self.model_copy(update={"types": types})
        return settled, replace(spec, storage={**spec.storage, **storage})

    def apply(self, table: Table) -> None:
        if table.path in self.types:
            grid = fit_blocks(table.weight.float(), TYPES[self.types[table.path]])
            table.blocks, table.values = grid.encoded(table.weight.float()), grid.dequantized(table.weight.float())
