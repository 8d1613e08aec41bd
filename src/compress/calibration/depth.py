"""Models with fewer blocks: what leaving some out does, and the dense stream past those that are left out.

Which blocks can go is measured on the dense model, nothing refitted: how alike a block's input and output are says
which are worth trying (ShortGPT, arXiv 2403.03853, section 3.1), the divergence of the model without them which to
take. The refit then brings the stream of what is left back to the dense one, which walks past the dropped blocks.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from compress.calibration.processes import ALONE, Processes
from compress.calibration.statistics import rows
from compress.calibration.streams import LOGITS_AT_ONCE, Batch, Streams, embedded, own_batches
from compress.calibration.weights import PartLoader
from compress.models.decoder import Arguments
from compress.numerics.functional import kl_divergence


@dataclass
class DroppedBlocks:
    """The blocks of the dense model that the walked model lacks, run where the dense stream passes them.

    loader: of the dense model. kept: the numbers there of the walked model's blocks.
    arguments: what the dense model's blocks are called with, by batch.
    """

    loader: PartLoader
    kept: Sequence[int]
    arguments: list[list[Arguments]] = field(default_factory=list)

    def after(self, block: int) -> range:
        """The numbers of the blocks left out after a walked block; those before the first are after -1."""
        numbers = (-1, *self.kept, len(self.loader.decoder.blocks))
        return range(numbers[block + 1] + 1, numbers[block + 2])

    @torch.no_grad()
    def advance(self, streams: Streams, block: int) -> None:
        """Take the dense stream, if there is one, past the blocks left out after a walked block."""
        if streams.dense is None or not self.after(block):
            return
        if not self.arguments:
            with self.loader.embeddings():
                self.arguments = [arguments for _, arguments in embedded(self.loader.decoder, streams.batches)]
        decoder = self.loader.decoder
        for number in self.after(block):
            with self.loader.block(number):
                for batch in streams.batches:
                    dense = streams.dense.get(batch.index, decoder.device)
                    streams.dense.put(batch.index, decoder.run_block(number, dense, self.arguments[batch.index]))


class Depth:
    """The blocks of the dense model, seen by calibration windows that pass through them.

    wanted: how many are to be left out at most. enough: whether those that are chosen so far do. begin: called with the
    name of each pass that is begun. processes: each passes its share of the windows.
    dense: the dense model's last stream, by batch; `similarities` sets it, `measure` needs it.
    dropped: the blocks to leave out, in the order in which they were chosen; set by a stage. divergences: what the
    model diverges by with each of them gone too, nothing refitted, in nats.
    """

    def __init__(
        self,
        loader: PartLoader,
        batches: list[Batch],
        wanted: int,
        begin: Callable[[str], None] = lambda _pass: None,
        processes: Processes = ALONE,
        enough: Callable[["Depth"], bool] = lambda _depth: False,
    ) -> None:
        self.loader, self.wanted, self.begin, self.processes = loader, wanted, begin, processes
        self.enough = enough
        self.batches = own_batches(batches, processes)
        with torch.no_grad(), loader.embeddings():
            self.embedded = list(embedded(loader.decoder, self.batches))
        self.dense: list[Tensor] = []
        self.dropped: tuple[int, ...] = ()
        self.divergences: tuple[float, ...] = ()

    @property
    def num_blocks(self) -> int:
        return len(self.loader.decoder.blocks)

    def similarities(self) -> list[float]:
        """Measure the mean cosine between the input of each block and its output."""
        self.begin("similarities")
        found = torch.zeros(self.num_blocks, dtype=torch.float64, device=self.loader.decoder.device)

        def compare(number: int, before: Tensor, after: Tensor) -> None:
            found[number] += torch.cosine_similarity(before.float(), after.float(), -1).sum()

        self.dense = [last for (last,) in self._pass([()], compare)]
        self.processes.add_up(found)
        return (found / self._tokens).tolist()

    def measure(self, choices: Sequence[Collection[int]]) -> list[float]:
        """Measure the divergence from the dense model, in nats a token, of the model without each choice of blocks."""
        self.begin(f"without {len(choices[0])}")
        streams, decoder = self._pass(choices), self.loader.decoder
        total, logits_of = torch.zeros(len(choices), dtype=torch.float64, device=decoder.device), decoder.logits
        with torch.no_grad(), self.loader.head():
            for mine in zip(self.dense, streams, strict=True):
                chunks = (rows(stream).split(LOGITS_AT_ONCE) for stream in (mine[0], *mine[1]))
                for dense, *others in zip(*chunks, strict=True):
                    logits = logits_of(dense)
                    for place, other in enumerate(others):
                        total[place] += kl_divergence(logits, logits_of(other)).sum()
        self.processes.add_up(total)
        return (total / self._tokens).tolist()

    @property
    def _tokens(self) -> int:
        return self.processes.total(sum(batch.ids.numel() for batch in self.batches))

    @torch.no_grad()
    def _pass(
        self, choices: Sequence[Collection[int]], seen: Callable[[int, Tensor, Tensor], None] | None = None
    ) -> list[list[Tensor]]:
        """Run the model without each choice of blocks; return the last streams, by batch and choice.

        Choices share a stream up to the first block that they do not share. seen: given every block's number, and
        its input and output in the first of these.
        """
        decoder = self.loader.decoder
        streams = [[stream] * len(choices) for stream, _ in self.embedded]
        for number in range(self.num_blocks):
            with self.loader.block(number):
                for mine, (_, arguments) in zip(streams, self.embedded, strict=True):
                    distinct = {id(x): x for x, without in zip(mine, choices, strict=True) if number not in without}
                    run = partial(decoder.run_block, number, arguments=arguments)
                    moved = {key: run(x) for key, x in distinct.items()}
                    if seen is not None:
                        seen(number, mine[0], moved[id(mine[0])])
                    mine[:] = [
                        x if number in without else moved[id(x)] for x, without in zip(mine, choices, strict=True)
                    ]
        return streams
