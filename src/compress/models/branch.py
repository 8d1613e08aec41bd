"""A residual branch with its weights at hand: what reads the stream, what writes it, and the norm between.

Embeddings are a branch that only writes, the head one that only reads, so a decoder is a chain of branches and every
change of the stream's basis is two verbs: `write_through` the branch before it, `read_through` the branch after.

Weights are (d_out, d_in); embedding tables are (vocabulary, stream). Arithmetic is float64, weights keep their dtype.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

Writer = nn.Linear | nn.Embedding


@dataclass
class Branch:
    """
    name: as a user should read it in an error, "block 3 mlp".
    norm_owner, norm_name: where the norm hangs, so that it can be replaced; None where the branch has none.
    run: from the stream (batch, tokens, d) and the block's keyword arguments to what the branch adds to it.
    """

    name: str
    readers: Mapping[str, nn.Linear]
    writers: Mapping[str, Writer]
    norm_kind: str
    norm_eps: float
    dense_width: int
    norm_owner: nn.Module | None = None
    norm_name: str = ""
    run: Callable[..., Tensor] | None = None

    @property
    def norm(self) -> nn.Module | None:
        return getattr(self.norm_owner, self.norm_name) if self.norm_owner is not None else None

    def replace_norm(self, norm: nn.Module) -> None:
        if self.norm_owner is None:
            raise ValueError(f"{self.name} has no norm to replace.")
        setattr(self.norm_owner, self.norm_name, norm)


def read_through(branch: Branch, decode: Float[Tensor, "d D"]) -> None:
    """Let the readers take the stream in the basis whose rows are `decode`: W <- W decode^T."""
    for linear in branch.readers.values():
        set_weight(linear, linear.weight.double() @ decode.double().T)


def write_through(branch: Branch, encode: Float[Tensor, "D d"]) -> None:
    """Let the writers write in the basis of `encode`'s columns: W <- encode^T W, b <- encode^T b, E <- E encode."""
    encode = encode.double()
    for writer in branch.writers.values():
        weight = writer.weight.double()
        if isinstance(writer, nn.Embedding):
            set_weight(writer, weight @ encode)
            continue
        set_weight(writer, encode.T @ weight)
        if writer.bias is not None:
            set_bias(writer, writer.bias.double() @ encode)


def set_weight(module: Writer, weight: Float[Tensor, "rows columns"]) -> None:
    """Put a new weight into a linear or an embedding table, in the module's own dtype, with its sizes kept true."""
    module.weight = nn.Parameter(weight.to(module.weight.dtype).contiguous(), requires_grad=False)
    if isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    else:
        module.out_features, module.in_features = weight.shape


def set_bias(linear: nn.Linear, bias: Float[Tensor, "d_out"]) -> None:
    linear.bias = nn.Parameter(bias.to(linear.weight.dtype).contiguous(), requires_grad=False)


def shortcut(weight: Float[Tensor, "d_in d_out"], dtype: torch.dtype) -> nn.Linear:
    """The change of basis x S as a linear layer, so that it can be quantised and adapted like any other."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False)
    linear.weight = nn.Parameter(weight.T.to(dtype).contiguous(), requires_grad=False)
    return linear
