"""Quantize the embeddings' table and the head as a GGUF file of the type that `slim` writes has them.

A tied matrix is stored once. Rows are rounded by themselves, each group of a row with its best scale.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from compress.architectures.architecture import ModelSpec
from compress.architectures.gguf_types import AUTO, misfits, resolve
from compress.calibration.sites import Table
from compress.errors import report
from compress.models.storage import Storage
from compress.numerics.block_grid import fit_blocks
from compress.numerics.block_types import TYPES
from compress.stages._stage import StageConfig


class QuantizeEmbeddings(StageConfig):
    """
    types: of each table, by its path; settled when the model is known.
    """

    site: ClassVar = Table
    after: ClassVar = ("slim",)
    stage: Literal["quantize_embeddings"] = "quantize_embeddings"
    types: Mapping[str, str] = Field(default_factory=dict)

    def decided(self, choice: Mapping[str, Any]) -> "QuantizeEmbeddings":
        return self.model_copy(update={"types": choice["tables"]}) if "tables" in choice else self

    def plan(self, spec: ModelSpec) -> tuple["QuantizeEmbeddings", ModelSpec]:
        if spec.gguf_type is None or "types" in spec.undecided:
            return self, spec  # of a recipe that is refused, or has a budget to be spent
        if spec.gguf_type == AUTO:
            report(misfits(self.types, dict(spec.tables)))
        types = self.types if spec.gguf_type == AUTO else resolve(spec.gguf_type, spec.config(), spec.tables)
        storage = {path: Storage(form="gguf", bits=None, block_type=name) for path, name in types.items()}
        return self.model_copy(update={"types": types}), replace(spec, storage={**spec.storage, **storage})

    def apply(self, table: Table) -> None:
        if table.path in self.types:
            weight = table.weight.float()
            grid = fit_blocks(weight, TYPES[self.types[table.path]])
            table.blocks, table.values = grid.encoded(weight), grid.dequantized(weight)
