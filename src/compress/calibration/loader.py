"""Load parts of a decoder from a checkpoint for as long as they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from compress.calibration.weights import LazyWeights
from compress.models.decoder import Decoder


class PartLoader:
    """Load weights for the duration of a `with loader.block(3): ...`."""

    def __init__(self, decoder: Decoder, weights: LazyWeights) -> None:
        self.decoder = decoder
        self.weights = weights

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        decoder = self.decoder
        for part in decoder.family.embedding_parts:
            decoder.fill(self.weights.read([f"{part}.weight"]))
        yield
        for part in decoder.family.embedding_parts:
            decoder.empty(decoder.model.get_submodule(part))

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        decoder = self.decoder
        for name in decoder.block_names(index):  # one at a time: they are held as stored and as computed with
            decoder.fill(self.weights.read([name]))
        yield
        decoder.empty(decoder.blocks[index])

    @contextmanager
    def head(self) -> Iterator[None]:
        decoder = self.decoder
        decoder.fill(self._head_tensors())
        yield
        for part in decoder.family.head_parts:
            decoder.empty(decoder.model.get_submodule(part))

    def _head_tensors(self) -> dict[str, Tensor]:
        """Tensors of the final norm and the head; a tied head is the first embedding table under its own name."""
        names = self.decoder.head_names()
        head_weight = f"{self.decoder.family.head}.weight"
        if self.weights.resolve(head_weight) is not None:
            return self.weights.read(names)
        table = self.decoder.embedding_names()[0]
        tensors = self.weights.read([name for name in names if name != head_weight])
        return tensors | {head_weight: self.weights.read([table])[table]}
