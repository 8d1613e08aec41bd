"""Linears in their written form while the walk's activations are still in another.

A checkpoint may have the stream in other coordinates than the walk, or its norms with another gain. Most linears are
brought into that form when nothing more is done to them. One that is stored in few bits has to be in it before.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from compress.models.factors import AnyLinear, input_side, with_outputs
from compress.numerics.lift import Lift


@dataclass(frozen=True)
class WrittenForm:
    """
    inputs, outputs: maps from the walk's to the checkpoint's.
    has_bias: it has a bias there, of zeros where it had none.
    """

    inputs: Lift = field(default_factory=Lift)
    outputs: Lift = field(default_factory=Lift)
    has_bias: bool = False

    @property
    def is_identity(self) -> bool:
        return self.inputs.is_identity and self.outputs.is_identity and not self.has_bias


class Written(nn.Module):
    """Run a linear in its written form on the walk's inputs and outputs."""

    def __init__(self, inner: nn.Module, form: WrittenForm, in_features: int) -> None:
        super().__init__()
        self.inner = inner
        self.form = form
        self.in_features = in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.form.outputs.down(self.inner(self.form.inputs.up(x)))


def in_form(module: AnyLinear, form: WrittenForm) -> AnyLinear:
    """Convert a linear, low-rank or not, to the checkpoint's inputs and outputs; in place where outputs stay."""
    if form.is_identity:
        return module
    if not form.outputs.is_identity:
        module = with_outputs(module, form.outputs.rows)
    side = input_side(module)
    if not form.inputs.is_identity:
        weight = form.inputs.functional(side.weight.double())
        side.weight = nn.Parameter(weight.to(side.weight.dtype).contiguous(), requires_grad=False)
        module.in_features = side.in_features = weight.shape[1]
    if form.has_bias and isinstance(module, nn.Linear) and module.bias is None:  # factors say themselves if they have
        module.bias = nn.Parameter(side.weight.new_zeros(len(side.weight)), requires_grad=False)
    return module
