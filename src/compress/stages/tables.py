"""The embeddings' table and the head in few bits.

A GGUF file stores both in the types that llama-quantize gives them. A folder in packed form stores them as
compressed-tensors does linears: a head that is no table of embeddings in bits of its own, which transformers and vLLM
load; the table in the linears' bits, which transformers reads where it unpacks all weights while it loads them, and
vLLM where the table is not the head too. A tied matrix is stored once.

A head by itself is swept by the second moment of what it is given. Each row of a table is rounded by itself, so that
how often its token comes makes no difference to its codes.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.architectures.architecture import ModelSpec
from compress.architectures.gguf_types import AUTO, misfits, resolve
from compress.calibration.sites import Table
from compress.errors import report
from compress.models.packing import packed_tensors, unpacks_while_loading
from compress.models.storage import Storage
from compress.numerics.block_grid import BlockGrid, fit_blocks
from compress.numerics.block_types import TYPES
from compress.numerics.decomposition import Decomposition, Rounding, decompose_together
from compress.numerics.grids import QuantizationArgs
from compress.numerics.steps import make_grid
from compress.stages._stage import USUAL_GROUP, StageConfig

Bits = Annotated[int, Field(ge=2, le=8)]
POLISH = 3  # rounds after a sweep, as linears have
ROWS = 8192  # at a time: a head has many more than any linear, and they do not depend on one another


class QuantizeEmbeddings(StageConfig):
    """Quantize the embeddings' table and the head: in a GGUF file by its type, in packed form in the bits asked for.

    A tied matrix is stored once. A head by itself is swept (GPTQ) by its own inputs; rows of a table are rounded by
    themselves, each group of a row with its best scale.

    head_bits: of a head that is no table of embeddings, in packed form. embedding_bits: of the table, as linears have.
    types: of each table in a GGUF file, by its path; settled when the model is known.
    weights: how each table is quantized in packed form, by its path. dtype: of scales; both settled when the model is
        known.
    """

    site: ClassVar = Table
    after: ClassVar = ("slim",)
    stage: Literal["quantize_embeddings"] = "quantize_embeddings"
    head_bits: Bits | None = None
    embedding_bits: Bits | None = None
    types: Mapping[str, str] = Field(default_factory=dict)
    weights: Mapping[str, QuantizationArgs] = Field(default_factory=dict)
    dtype: str | None = None

    def decided(self, choice: Mapping[str, Any]) -> "QuantizeEmbeddings":
        return self.model_copy(update={"types": choice["tables"]}) if "tables" in choice else self

    def plan(self, spec: ModelSpec) -> tuple["QuantizeEmbeddings", ModelSpec]:
        if not spec.is_gguf:
            return self.in_packed_form(spec) if spec.storage or "types" in spec.undecided else (self, spec)
        if "types" in spec.undecided:
            return self, spec  # whose types are found with those of linears
        if self.asked:
            what = "head_bits and embedding_bits are for packed form; in a GGUF file tables go by its type"
            report([f"{what}, --type Q4_K_M,output=Q6_K,token_embd=Q5_K. Leave them out."])
        if spec.gguf_type == AUTO:
            report(misfits(self.types, dict(spec.tables)))
        types = self.types if spec.gguf_type == AUTO else resolve(str(spec.gguf_type), spec.config(), spec.tables)
        storage = {path: Storage(form="gguf", block_type=name) for path, name in types.items()}
        return self.model_copy(update={"types": types}), replace(spec, storage={**spec.storage, **storage})

    def in_packed_form(self, spec: ModelSpec) -> tuple["QuantizeEmbeddings", ModelSpec]:
        """With scales for what linears have them for; for 128 inputs where linears have types of their own."""
        schemes, widths = {storage.scheme for storage in spec.storage.values()}, dict(spec.tables)
        report(self.problems(spec, schemes))
        alike = next(iter(schemes)) if len(schemes) == 1 else None
        like = (alike and alike.weights) or QuantizationArgs(group_size=USUAL_GROUP)
        family, size = spec.architecture.family, like.group_size
        asked = {family.embeddings[0]: self.embedding_bits, family.head: self.head_bits}
        bits = {path: number for path, number in asked.items() if number is not None}
        if size is not None and any(widths[path] % size for path in bits):
            size = None
        found = {
            path: QuantizationArgs(num_bits=number, group_size=size, symmetric=like.symmetric)
            for path, number in bits.items()
        }
        changes = {"weights": self.weights or found}  # once they are settled, they stay
        settled = self.model_copy(update=changes | {"dtype": str(spec.dtype).removeprefix("torch.")})
        spec = replace(spec, storage={**spec.storage, **{path: settled.storage(path) for path in bits}})
        notes = [] if spec.tables_not_for_vllm is None else [f"vLLM cannot serve this: {spec.tables_not_for_vllm}."]
        return settled, replace(spec, notes=(*spec.notes, *notes))

    def problems(self, spec: ModelSpec, schemes: Collection[Storage | None]) -> list[str]:
        """What does not go with the model, or with linears that are stored so; none of them where that is open."""
        family, widths, problems = spec.architecture.family, dict(spec.tables), list[str]()
        if not self.asked:
            return ["In packed form quantize_embeddings is told the bits: give head_bits, embedding_bits or both."]
        if others := [each for each in schemes if each is None or each.weights is None or each.weights.type == "float"]:
            what = "are floats" if others[0] else "are not quantized"
            return [f"head_bits and embedding_bits go with linears of 2 to 8 bits, and these {what}. Leave them out."]
        if self.head_bits is not None and family.head not in widths:
            problems.append(
                "head_bits has no effect: the head is the embeddings' table. In packed form give embedding_bits, which "
                "stores both once, for transformers; or write a GGUF file (--type)."
            )
        model_type = spec.architecture.dense.model_type
        unpacks = any(scheme and unpacks_while_loading(scheme, model_type) for scheme in schemes)
        if self.embedding_bits is None and not unpacks:
            return problems
        said = "transformers unpacks all that is stored so by the linears' scheme"
        like, n = next(iter(schemes)) if len(schemes) == 1 else None, widths[family.embeddings[0]]
        if like is None:
            problems.append(f"{said}, and here they have several. Leave embedding_bits out.")
        elif like.weights is not None and self.asked != {bits := like.weights.num_bits}:
            problems.append(f"{said}. Give head_bits and embedding_bits the linears' {bits}, or leave them out.")
        elif like.input_activations is not None or not divides(n, like.weights):
            problems.append(f"{said}, which does not fit embeddings of {n}. Take --group channel without --inputs.")
        return problems

    @property
    def asked(self) -> set[int]:
        """The bits that are asked for."""
        return {number for number in (self.head_bits, self.embedding_bits) if number is not None}

    def storage(self, path: str) -> Storage:
        return Storage("packed", self.weights[path])

    def apply(self, table: Table) -> None:
        if table.path not in self.types and table.path not in self.weights:
            return
        parts = [self.rounded(table, rows) for rows in table.weight.float().split(ROWS)]
        stored, values = [tensors for tensors, _ in parts], [each for _, each in parts]
        table.values = torch.cat(values)
        table.stored = {name: torch.cat([tensors[name] for tensors in stored]) for name in stored[0]}
        if "weight_shape" in table.stored:
            table.stored["weight_shape"] = torch.tensor(table.weight.shape)

    def rounded(self, table: Table, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Rows of a table: the tensors that are stored, and the weights that they stand for."""
        how = self.rounding(table.path)
        if table.inputs is not None:
            swept = Decomposition(quantize=how, polish=POLISH)
            (found,) = decompose_together([rows.double()], table.inputs, [swept], dtype=rows.dtype, names=[table.path])
            rows, grid = found.S, found.grid
        elif how.blocks is not None:
            grid = fit_blocks(rows, how.blocks)
        else:
            grid = make_grid(rows, how.args, method=how.steps, stored=how.stored)
        if isinstance(grid, BlockGrid):
            return {"qweight": grid.encoded(rows)}, grid.dequantized(rows)
        assert grid is not None
        assert how.stored is not None
        return packed_tensors(self.storage(table.path), rows, grid, how.stored), grid.nearest(rows).float()

    def rounding(self, path: str) -> Rounding:
        return Rounding(
            args=self.weights.get(path, QuantizationArgs()),
            steps="mse",
            sweeps=True,
            actorder=path in self.types,
            stored=None if self.dtype is None else getattr(torch, self.dtype),
            blocks=TYPES[self.types[path]] if path in self.types else None,
        )


def divides(n: int, args: QuantizationArgs | None) -> bool:
    """Whether rows of n have whole groups; a tensor's or a block's scale is no row's."""
    if args is None or args.strategy == "channel":
        return True
    return args.group_size is not None and n % args.group_size == 0
