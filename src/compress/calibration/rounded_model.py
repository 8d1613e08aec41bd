"""The dense model on a few windows with matrices rounded to llama.cpp's types: what types together cost, measured.

Scales are fitted fast and nothing is swept; instead errors are made as small as a sweep will leave them
(`roundings.py`), for to first order only their size counts (HIGGS, arXiv 2411.17525). A part is in memory at a time.
The streams between the blocks of the best types so far are kept: a trial begins where its types differ from these.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.calibration.processes import Processes
from compress.calibration.streams import ActivationCache, Batch, CacheFolder, Streams, mean_divergence
from compress.calibration.weights import PartLoader
from compress.numerics.block_grid import BlockGrid, fit_blocks
from compress.numerics.block_types import TYPES

FEW = 3  # scales that are tried for each end of a grid
AT_ONCE = 2**22  # weights
Types = Mapping[str, str]


class RoundedModel:
    """
    roundings: as `RoundingObserver` finds them. memory: bytes of activations to hold in memory.
    types, inputs: the best so far, and what each block and the head are given by them. tried: the same of the last
        trial.
    """

    def __init__(
        self,
        loader: PartLoader,
        batches: list[Batch],
        caches: CacheFolder,
        roundings: Mapping[str, Tensor],
        *,
        memory: int,
        processes: Processes,
    ) -> None:
        self.loader, self.decoder, self.roundings = loader, loader.decoder, roundings
        self.caches, self.scratch = caches, caches.scratch
        self.copies = 2 * len(self.decoder.blocks) + 4
        self.memory = memory // self.copies
        self.streams = Streams(self.decoder, batches, caches, dense=True, memory=2 * self.memory, processes=processes)
        self.types: Types = {}
        self.inputs: list[ActivationCache] = []
        with torch.no_grad():
            self.tried: tuple[Types, list[ActivationCache]] = {}, self._passed({}, [])
        self.keep()
        self.streams.dense = self.inputs[-1]

    def keep(self) -> None:
        """Take the last trial as the best."""
        self.types, self.inputs = self.tried

    @torch.no_grad()
    def divergence(self, types: Types) -> float:
        """The mean divergence of the next token from the dense model's, in nats, with matrices of these types."""
        inputs = self._passed(types, self.inputs[: self._same(types)])
        self.tried = types, inputs
        for batch in self.streams.batches:
            self.streams.compressed.put(batch.index, inputs[-1].stored(batch.index))
        decoder, family = self.decoder, self.decoder.family
        with self.loader.head():
            head = decoder.head_branch()
            (reader,) = head.readers.values()
            weight, bias = reader.weight, reader.bias
            path = family.embeddings[0] if decoder.config.tie_word_embeddings else family.head
            if path in types:
                decoder.fill({f"{family.head}.weight": self._rounded(path, types[path], weight)})
            found = mean_divergence(head, weight, bias, self.streams)
        assert found is not None
        return found

    def _same(self, types: Types) -> int:
        """How many of the inputs are as they were with the best types."""
        changed = {path for path in types.keys() | self.types.keys() if types.get(path) != self.types.get(path)}
        if changed & {*self.decoder.family.embeddings}:
            return 0
        blocks = range(len(self.decoder.blocks))
        prefixes = (self.decoder.block_prefix(block) for block in blocks)
        first = (place for place, prefix in enumerate(prefixes) if any(path.startswith(prefix) for path in changed))
        return 1 + next(first, len(blocks))

    def _passed(self, types: Types, inputs: list[ActivationCache]) -> list[ActivationCache]:
        """The inputs of all blocks and the head, of which the first are there."""
        decoder, batches = self.decoder, self.streams.batches
        if not inputs:
            with self.loader.embeddings():
                self._round(types, decoder.family.embeddings[:1])
                inputs = [self._new_cache()]
                for batch, x in zip(batches, self.streams.record_arguments(), strict=True):
                    inputs[0].put(batch.index, x)
        for block in range(len(inputs) - 1, len(decoder.blocks)):
            after = self._new_cache()
            with self.loader.block(block):
                prefix = decoder.block_prefix(block)
                self._round(types, [path for path in types if path.startswith(prefix)])
                branches = decoder.block_branches(block)
                for batch in batches:
                    x = inputs[-1].get(batch.index, decoder.device)
                    for branch in branches:
                        x = x + self.streams.update(branch, x, batch, block)
                    after.put(batch.index, x)
            inputs = [*inputs, after]
        return inputs

    def _new_cache(self) -> ActivationCache:
        return self.caches.new("trial", self.streams.batches, self.memory, copies=self.copies)

    def _round(self, types: Types, paths: "list[str] | tuple[str, ...]") -> None:
        for path in paths:
            if path in types:
                weight = self.decoder.model.get_submodule(path).get_parameter("weight")
                self.decoder.fill({f"{path}.weight": self._rounded(path, types[path], weight)})

    def _rounded(self, path: str, name: str, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """W with as much of a type's error as a sweep leaves."""
        file = self.scratch / f"grid-{path}-{name}-{self.streams.processes.rank}.safetensors"
        if file.exists():
            grid = read_grid(file, name, W)
        else:
            variance = self.roundings.get(f"variance {path}")
            grid = fit_blocks(W, TYPES[name], None if variance is None else variance.to(W.device), trials=FEW)
            write_grid(file, grid)
        left, found = float(self.roundings[f"left {path}"]), torch.empty_like(W)
        for start in range(0, len(W), step := max(1, AT_ONCE // W.shape[1])):
            some = W[start : start + step]
            values = grid.rows(start, start + step).dequantized(some).to(W.dtype)
            found[start : start + step] = some.lerp(values, left)
        return found


def write_grid(file: Path, grid: BlockGrid) -> None:
    """In the precision that blocks have."""
    dtypes = {"d": torch.float16, "low": torch.float16, "sc": torch.int8, "mn": torch.int8}
    parts = zip(dtypes.items(), grid.parts, strict=True)
    save_file({name: part.to(dtype).contiguous() for (name, dtype), part in parts if part is not None}, file)


def read_grid(file: Path, name: str, W: Tensor) -> BlockGrid:
    parts = {key: part.to(W.device, W.dtype) for key, part in load_file(file).items()}
    return BlockGrid.of(TYPES[name], *(parts.get(key) for key in ("d", "low", "sc", "mn")))  # type: ignore[arg-type]
