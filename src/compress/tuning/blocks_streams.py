"""Both models' streams between two blocks, and what a block of the compressed one is to come to.

The compressed model's stream is that of its tuned prefix; the dense model's is the target. What reads through a
LayerNorm does not see the stream's mean, so it is not compared. A sliced model's stream lies in coordinates of its own,
of which its checkpoint says nothing: these are found by regression (`Coordinates`).

Shapes: stream (windows, tokens, d), dense stream (windows, tokens, D).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from compress.models.decoder import Arguments, Decoder
from compress.numerics.ridge import ridge
from compress.streaming.cache import ActivationCache
from compress.streaming.groups import EquationSums
from compress.streaming.interning import Interner
from compress.streaming.processes import ALONE
from compress.streaming.streams import Batch, rows
from compress.tuning.blocks import Student

# So little that only directions are held back in which the compressed stream has no energy to speak of.
DAMPING = 1e-6
# The embeddings' relative error up to which two streams have the same coordinates: that of rounding to 8 bits.
SAME = 1e-2


@dataclass
class Stream:
    """Windows on their way through a model. arguments: what each block is called with besides, by batch and block."""

    batches: Sequence[Batch]
    cache: ActivationCache
    device: torch.device
    arguments: list[list[Arguments]] = field(default_factory=list)

    @torch.no_grad()
    def embed(self, model: Decoder | Student) -> None:
        """The model's embeddings must be filled."""
        intern = Interner()
        for batch in self.batches:
            stream, arguments = model.embed(batch.ids)
            self.cache.put(batch.index, stream)
            self.arguments.append(intern(arguments))

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int) -> None:
        for batch in self.batches:
            self.cache.put(batch.index, self.through(block, index, batch))

    def through(self, block: nn.Module, index: int, batch: Batch) -> Float[Tensor, "windows tokens d"]:
        """A batch behind a block, the cache as it was."""
        found = block(self.now(batch), **self.arguments[batch.index][index])
        stream: Tensor = found[0] if isinstance(found, tuple) else found
        return stream

    def now(self, batch: Batch) -> Float[Tensor, "windows tokens d"]:
        return self.cache.get(batch.index, self.device)


@dataclass(frozen=True)
class Coordinates:
    """Of the compressed stream, seen from the dense one.

    decode: s D is the compressed stream s in the dense model's; None where s is in them already.
    """

    is_layer_norm: bool
    eps: float
    decode: Float64[Tensor, "d D"] | None = None

    def error(self, stream: Float[Tensor, "*tokens d"], dense: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens"]:
        """The squared distance of each token's stream from the dense one, over the latter's square."""
        wide = stream if self.decode is None else stream @ self.decode.to(stream.dtype)
        squares = (self.seen(wide) - self.seen(dense)).square().mean(-1)
        return squares * self.weights(dense)[..., 0]

    def weights(self, dense: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens 1"]:
        """One over what the next norm divides by."""
        return 1 / (self.seen(dense).square().mean(-1, keepdim=True) + self.eps)

    def seen(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens D"]:
        """What readers see of a stream of the dense model's coordinates."""
        return x - x.mean(-1, keepdim=True) if self.is_layer_norm else x


def are_shared(own: Coordinates, stream: Tensor, dense: Tensor) -> bool:
    """Whether two streams behind the embeddings, which a method changes by rounding at most, have the same ones."""
    return stream.shape == dense.shape and float(own.error(stream, dense).mean()) < SAME**2


def fitted(own: Coordinates, pairs: Iterable[tuple[Tensor, Tensor]], *, name: str) -> Coordinates:
    """The coordinates in which a compressed stream is nearest to the dense one.

        D = argmin sum of ||s D - x||^2 / mean(x^2)

    pairs: of (s, x), batch by batch. name: in an error, of what gives s.
    """
    sums: EquationSums | None = None
    for stream, dense in pairs:
        x = own.seen(rows(dense).double())
        sums = sums or EquationSums(stream.shape[-1], dense.shape[-1], stream.device)
        sums.add(rows(stream), x, weights=own.weights(x))
    assert sums is not None
    equations = sums.fit(ALONE)
    decode = ridge(equations, torch.zeros_like(equations.B), DAMPING, name=name)
    return replace(own, decode=decode)
