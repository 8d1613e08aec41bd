"""Activations of the calibration windows: the stream of the compressed prefix, and that of the dense model.

Some windows, evenly spread, are held out: they walk along and count in the bases, but nothing is fitted on them.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compress.calibration.cache import ActivationCache, Interner, cache_bytes
from compress.calibration.processes import ALONE, Processes
from compress.models.branch import Branch
from compress.models.decoder import Arguments, Decoder


@dataclass(frozen=True)
class Batch:
    index: int
    ids: Int64[Tensor, "windows tokens"]
    held_out: bool


def split_windows(windows: Int64[Tensor, "windows tokens"], batch_size: int, held_out: int) -> list[Batch]:
    """Split windows into batches in order; `held_out` of them, evenly spread, make separate batches at the end."""
    apart = torch.zeros(len(windows), dtype=torch.bool)
    apart[[(2 * i + 1) * len(windows) // (2 * held_out) for i in range(held_out)]] = True
    tagged = [(ids, False) for ids in windows[~apart].split(batch_size)]
    tagged += [(ids, True) for ids in windows[apart].split(batch_size) if held_out]
    return [Batch(index, ids, is_held_out) for index, (ids, is_held_out) in enumerate(tagged)]


def spread(windows: Int64[Tensor, "windows tokens"], count: int) -> Int64[Tensor, "count tokens"]:
    """Select `count` windows, evenly spread; all where there are no more."""
    count = min(count, len(windows))
    return windows[[index * len(windows) // count for index in range(count)]]


def own_batches(batches: list[Batch], processes: Processes) -> list[Batch]:
    """This process's share of the batches, renumbered."""
    return [replace(batch, index=index) for index, batch in enumerate(processes.share(batches))]


@dataclass(frozen=True)
class CacheFolder:
    """Create caches: on the device where they fit, in memory up to `memory` bytes each, else in files."""

    decoder: Decoder
    scratch: Path

    def new(self, name: str, batches: list[Batch], memory: int, *, copies: int = 1) -> ActivationCache:
        decoder = self.decoder
        shapes = [(len(batch.ids), batch.ids.shape[1]) for batch in batches]
        needed = sum(cache_bytes(*shape, decoder.dense_width, decoder.dtype) for shape in shapes)
        on_device = decoder.device.type == "cuda" and self._device_holds(needed * copies)
        return ActivationCache(
            shapes,
            decoder.dense_width,
            decoder.dtype,
            device=decoder.device if on_device else torch.device("cpu"),
            file=scratch_file(self.scratch, name) if needed > memory and not on_device else None,
        )

    def _device_holds(self, needed: int) -> bool:
        free: int = torch.cuda.mem_get_info(self.decoder.device)[0]
        return needed < free // 3


def scratch_file(folder: Path, name: str) -> Path:
    """Create a new, unique file."""
    handle, path = tempfile.mkstemp(prefix=f"activations-{name}-", dir=folder)
    os.close(handle)
    return Path(path)


class Streams:
    """
    compressed: in the present basis, (windows, tokens, d) a batch. dense: (windows, tokens, D), None where no stage
    compares with it. before_post_norm: what the norm behind the present branch is given in the dense model; None where
    nobody asks. arguments: what each block is called with besides the stream, by batch.
    batches: this process's share of those that all `processes` know.
    """

    def __init__(
        self,
        decoder: Decoder,
        batches: list[Batch],
        caches: CacheFolder,
        *,
        dense: bool,
        before_post_norms: bool = False,
        memory: int,
        processes: Processes = ALONE,
    ) -> None:
        self.decoder = decoder
        self.processes = processes
        self.batches = batches = own_batches(batches, processes)
        copies = 1 + dense + before_post_norms
        options: dict[str, int] = {"memory": memory // copies, "copies": max(copies, 2)}
        self.compressed = caches.new("stream", batches, **options)
        self.dense = caches.new("dense", batches, **options) if dense else None
        self.before_post_norm = caches.new("before", batches, **options) if before_post_norms else None
        self.arguments: list[list[Arguments]] = []
        self.memory = memory

    def have_room_for(self, width: int) -> bool:
        """Whether activations of that width, of all batches, fit beside the streams in the memory for caches.

        A GPU's memory must have three times as much free.
        """
        device, tokens = self.decoder.device, sum(batch.ids.numel() for batch in self.batches)
        needed = tokens * width * self.decoder.dtype.itemsize
        if device.type == "cuda":
            return 3 * needed < torch.cuda.mem_get_info(device)[0]
        caches = (self.compressed, self.dense, self.before_post_norm)
        return needed + sum(cache.bytes_in_memory for cache in caches if cache is not None) <= self.memory

    def embed(self) -> None:
        """Start both streams from the embeddings, which must be loaded."""
        for batch, stream in zip(self.batches, self._record(), strict=True):
            self.compressed.put(batch.index, stream)
            if self.dense is not None:
                self.dense.put(batch.index, stream.clone())

    def embed_again(self) -> None:
        """Start the compressed stream from embeddings that have changed since."""
        for batch, stream in zip(self.batches, self._record(), strict=True):
            self.compressed.put(batch.index, stream)

    def record_arguments(self) -> None:
        """Record the arguments that blocks are called with; the embeddings must be loaded."""
        for _ in self._record():
            pass

    def _record(self) -> Iterator[Tensor]:
        intern, self.arguments = Interner(), []
        for batch in self.batches:
            stream, arguments = self.decoder.embed(batch.ids)
            self.arguments.append(intern(arguments))
            yield stream

    def now(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return a batch of the compressed stream and of the dense one, on the device."""
        device = self.decoder.device
        dense = None if self.dense is None else self.dense.get(batch.index, device)
        return self.compressed.get(batch.index, device), dense

    def update(self, branch: Branch, stream: Tensor, batch: Batch, block: int) -> Tensor:
        """Run a branch of a block on a batch; return what it adds to the stream."""
        if branch.run is None:
            raise ValueError(f"{branch.name} cannot be run.")
        update: Tensor = branch.run(stream, self.arguments[batch.index][block])
        return update

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.{i}": cache.stored(i).cpu() for name, cache in self._caches() for i in range(len(cache))}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, cache in self._caches():
            for i in range(len(cache)):
                # A copy: tensors of a file lie unaligned, and products of matrices round differently there.
                cache.put(i, state[f"{name}.{i}"].clone())

    def release(self) -> None:
        """Free the activations."""
        for cache in (self.compressed, self.dense, self.before_post_norm):
            if cache is not None:
                cache.release()

    def _caches(self) -> list[tuple[str, ActivationCache]]:
        named = [("stream", self.compressed), ("dense", self.dense)]
        return [(name, cache) for name, cache in named if cache is not None]


def rows(stream: Float[Tensor, "*tokens d"]) -> Float[Tensor, "_ d"]:
    return stream.reshape(-1, stream.shape[-1])
