"""Norm conversion: every norm becomes an RMSNorm without gain; its gain and offset go into the linears that read it.

LayerNorm also subtracts the mean over the stream's coordinates: that goes into what writes the stream. See
numerics/functional.py for the formula. The function is preserved exactly; epsilon is the model's own.
"""

from typing import ClassVar, Literal

from torch import Tensor, nn

from compress.models.branch import Branch, Writer, set_bias, set_weight
from compress.numerics.functional import center_rows, fold_gain, fold_offset
from compress.own_model.modeling_compress import GainlessRMSNorm
from compress.stages._stage import StageConfig


class FoldNorms(StageConfig):
    site: ClassVar = Branch
    reshapes: ClassVar = True
    stage: Literal["fold_norms"] = "fold_norms"

    def apply(self, branch: Branch) -> None:
        if branch.norm_kind == "layer":
            for writer in branch.writers.values():
                center_writer(writer)
        for group in branch.reader_groups():
            gain, offset = gain_and_offset(group.norm, branch.norm_kind)
            for linear in group.readers.values():
                fold_into(linear, gain, offset)
            group.replace_norm(GainlessRMSNorm(branch.dense_width, branch.norm_eps))


def gain_and_offset(norm: nn.Module, kind: str) -> tuple[Tensor | None, Tensor | None]:
    """The norm's diag(a) and b in float64, None where it has none (LayerNorm without affine parameters)."""
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    gain = None if weight is None else weight.double() + (1.0 if kind == "rms_plus_one" else 0.0)
    return gain, None if bias is None else bias.double()


def fold_into(linear: nn.Linear, gain: Tensor | None, offset: Tensor | None) -> None:
    weight = linear.weight.double()
    if offset is not None:
        set_bias(linear, fold_offset(weight, None if linear.bias is None else linear.bias.double(), offset))
    if gain is not None:
        set_weight(linear, fold_gain(weight, gain))


def center_writer(writer: Writer) -> None:
    weight = writer.weight.double()
    if isinstance(writer, nn.Embedding):
        set_weight(writer, center_rows(weight.T).T)
        return
    set_weight(writer, center_rows(weight))
    if writer.bias is not None:
        set_bias(writer, writer.bias.double() - writer.bias.double().mean())
