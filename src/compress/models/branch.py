"""A residual branch with its weights loaded: the linears that read the stream, those that write it, and the norm.

Embeddings are a branch that only writes, the head one that only reads, so a decoder is a chain of branches and every
change of the stream's basis is two verbs: `write_through` the branch before it, `read_through` the branch after.

Weights are (d_out, d_in); embedding tables are (vocabulary, stream). Arithmetic is float64, weights keep their dtype.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from compress.families import Units
from compress.models.factors import AnyLinear, Written, dense_module, frozen, input_side, with_outputs
from compress.own_model.modeling_compress import SparseMLP, replace

Writer = nn.Linear | nn.Embedding


@dataclass(frozen=True)
class ReaderGroup:
    """The readers after one norm of a branch, which is `norm_name` below `owner`; None where there is no norm."""

    owner: nn.Module
    norm_name: str | None
    readers: Mapping[str, nn.Linear]

    @property
    def norm(self) -> nn.Module:
        return nn.Identity() if self.norm_name is None else self.owner.get_submodule(self.norm_name)

    def replace_norm(self, norm: nn.Module) -> None:
        replace(self.owner, self.norm_name, norm)


@dataclass
class Branch:
    """A residual branch of a block: attention, MLP, or both in parallel.

    name: as a user should read it in an error, "block 3 mlp".
    owner: the module that its parts are named below. norms: its norms there, each with the readers after it.
    shortcut_name: where the owner has the stream's change of basis beside the branch, if it needs one.
    units: kinds of parts that can be deleted whole, and how many the dense branch has of each.
    scale: what all that it writes is multiplied by on the way to the stream.
    post_norm: the name of the norm after it, and whether that is of what it writes (`update`) or of the `stream`.
    experts: its parts that have only some of the tokens each. sparse: the module that they are of.
    run: from the stream (batch, tokens, d) and the block's keyword arguments to what the branch adds to it.
    """

    name: str
    owner: nn.Module
    readers: Mapping[str, nn.Linear]
    writers: Mapping[str, Writer]
    norm_kind: str
    norm_eps: float
    dense_width: int
    norms: Mapping[str | None, tuple[str, ...]] = field(default_factory=dict)
    shortcut_name: str = ""
    units: Mapping[str, tuple[Units, int]] = field(default_factory=dict)
    scale: float = 1.0
    post_norm: str | None = None
    post_norm_of: str = "update"
    experts: tuple["Branch", ...] = ()
    sparse: SparseMLP | None = None
    run: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        self.norm_class = type(self.norm)

    @property
    def norm(self) -> nn.Module | None:
        """The first norm; once norms are folded, all norms of a branch are equal."""
        return next((group.norm for group in self.reader_groups()), None)

    def reader_groups(self) -> list[ReaderGroup]:
        """Group the readers by the norm they read through."""
        return [
            ReaderGroup(self.owner, norm, {name: self.readers[name] for name in names})
            for norm, names in self.norms.items()
        ]

    def sharing(self) -> list[tuple[str, ...]]:
        """Group readers, then writers, by shared inputs; experts come last of each."""
        apart = {name for expert in self.experts for name in expert.readers}
        readers = [tuple(name for name in names if name not in apart) for names in self.norms.values()]
        readers += [tuple(expert.readers) for expert in self.experts]
        return readers + [(name,) for name in self.writers]

    def linear(self, name: str) -> AnyLinear:
        """A reader or writer as it is now, factorized or not."""
        module = self.owner.get_submodule(name)
        assert isinstance(module, AnyLinear)
        return module

    def in_features(self, name: str) -> int:
        """Number of inputs of a reader or writer, in whatever form it is."""
        width: Any = self.owner.get_submodule(name).in_features
        return int(width)

    def written(self, name: str) -> nn.Module | None:
        """A reader or writer that is already in its written form; None for others."""
        module = self.owner.get_submodule(name)
        if isinstance(module, Written):
            return module.inner
        return None if isinstance(module, AnyLinear) else module

    def replace_linear(self, name: str, module: nn.Module) -> None:
        replace(self.owner, name, module)

    def write(self, x: Float[Tensor, "*tokens n"]) -> Float[Tensor, "*tokens d"]:
        """Apply the branch's only writer to its input x; for branches without a norm after it."""
        (writer,) = self.writers
        written: Tensor = self.owner.get_submodule(writer)(x)
        return self.scale * written

    def parameter(self, values: Tensor) -> nn.Parameter:
        """Make a parameter with the device and dtype of the branch's weights."""
        weight = next(iter((*self.readers.values(), *self.writers.values()))).weight
        return frozen(values.to(weight.device), weight.dtype)

    @property
    def shortcut(self) -> nn.Linear | None:
        return getattr(self.owner, self.shortcut_name, None) if self.shortcut_name else None

    def set_shortcut(self, weight: Float[Tensor, "d_in d_out"], dtype: torch.dtype) -> None:
        """Set the shortcut, as a linear layer so that it can be fitted, quantized and adapted like any other."""
        setattr(self.owner, self.shortcut_name, dense_module(weight.T, None, dtype))

    def carried(self, stream: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The stream that bypasses the branch."""
        return stream if self.shortcut is None else self.shortcut(stream)


@contextmanager
def captured_inputs(modules: Iterable[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Capture the latest input of each module, by index, for as long as the context is open."""
    found: dict[int, Tensor] = {}

    def note(place: int, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[place] = inputs[0]

    handles = [module.register_forward_pre_hook(partial(note, place)) for place, module in enumerate(modules)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Reached(Exception):
    """Raised when the module whose input is wanted is about to run."""


def input_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Capture a module's input when `run` is called, without running the module or anything after it."""

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise Reached(inputs[0])

    handle = module.register_forward_pre_hook(stop)
    try:
        run()
    except Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise RuntimeError("The module whose input is wanted was not run.")


def read_through(branch: Branch, decode: Float[Tensor, "d D"]) -> None:
    """Let the readers take the stream in the basis whose rows are `decode`: W <- W decode^T."""
    for name in branch.readers:
        linear = input_side(branch.linear(name))
        set_weight(linear, linear.weight.double() @ decode.double().T)


def write_through(branch: Branch, encode: Float[Tensor, "D d"]) -> None:
    """Let the writers write in the basis of `encode`'s columns: W <- encode^T W, b <- encode^T b, E <- E encode."""
    encode = encode.double()
    for name, writer in branch.writers.items():
        if isinstance(writer, nn.Embedding):
            set_weight(writer, writer.weight.double() @ encode)
        elif isinstance(linear := branch.linear(name), nn.Linear):
            set_weight(linear, encode.T @ linear.weight.double())
            if linear.bias is not None:
                set_bias(linear, linear.bias.double() @ encode)
        else:
            branch.replace_linear(name, with_outputs(linear, lambda of_outputs: encode.T @ of_outputs))


def set_weight(module: Writer, weight: Float[Tensor, "rows columns"]) -> None:
    """Put a new weight into a linear or an embedding table, in the module's own dtype, with its sizes kept true."""
    module.weight = frozen(weight, module.weight.dtype)
    if isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    else:
        module.out_features, module.in_features = weight.shape


def set_bias(linear: nn.Linear, bias: Float[Tensor, "d_out"]) -> None:
    linear.bias = frozen(bias, linear.weight.dtype)
