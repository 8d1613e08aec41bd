"""Activations of the calibration windows: the stream of the compressed prefix, and that of the dense model.

The last windows are held out: they walk along and count in the bases, but nothing is fitted on them.

The activations are the largest thing in memory beside a block: windows x tokens x width numbers. Within the budget they
stay in memory (the device's or the host's); past it they lie in a memory-mapped file, one slot a batch, and the system
pages.
"""

import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress.calibration.processes import ALONE, Processes
from compress.calibration.statistics import rows
from compress.errors import NumericalError
from compress.models.branch import Branch
from compress.models.decoder import Arguments, Decoder
from compress.numerics.functional import kl_divergence

Ids = Int64[Tensor, "windows tokens"]
Activations = Float[Tensor, "windows tokens width"]

# Tokens whose logits are held at a time: a row of them is as wide as the vocabulary.
LOGITS_AT_ONCE = 256


@dataclass(frozen=True)
class Batch:
    index: int
    ids: Ids
    held_out: bool


def split_windows(windows: Ids, batch_size: int, held_out: int) -> list[Batch]:
    """Split windows into batches in order, the last `held_out` of them apart.

    Windows of a text file follow one another: what stands between two that are fitted on would be half known.
    """
    fitted = windows[: len(windows) - held_out]
    tagged = [(ids, False) for ids in fitted.split(batch_size)]
    tagged += [(ids, True) for ids in windows[len(fitted) :].split(batch_size) if held_out]
    return [Batch(index, ids, is_held_out) for index, (ids, is_held_out) in enumerate(tagged)]


def spread(windows: Ids, count: int) -> Int64[Tensor, "count tokens"]:
    """Select `count` windows, evenly spread; all where there are no more."""
    count = min(count, len(windows))
    return windows[[index * len(windows) // count for index in range(count)]]


def own_batches(batches: list[Batch], processes: Processes) -> list[Batch]:
    return [replace(batch, index=index) for index, batch in enumerate(processes.share(batches))]


class ActivationCache:
    """One tensor (windows, tokens, width) a batch, replaced in place as the walk goes on.

    A batch's width may change, up to `max_width`; how many windows and tokens it has may not. Batches are kept on
    `device`, or in `file` if one is given. Raises OSError where the disk is full.
    """

    def __init__(
        self,
        batch_shapes: list[tuple[int, int]],
        max_width: int,
        dtype: torch.dtype,
        *,
        device: torch.device,
        file: Path | None = None,
    ) -> None:
        self.batches: list[Tensor | None] = [None] * len(batch_shapes)
        self.device = device
        self.slots: list[Tensor] | None = None
        if file is not None:
            sizes = [windows * tokens * max_width for windows, tokens in batch_shapes]
            with file.open("wb") as opened:
                if hasattr(os, "posix_fallocate"):  # writing to a mapped file on a full disk would kill the process
                    os.posix_fallocate(opened.fileno(), 0, sum(sizes) * dtype.itemsize)
                else:
                    opened.truncate(sum(sizes) * dtype.itemsize)
            storage = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=dtype)
            # Unlinked while open: the space goes back when the process ends, however it ends.
            file.unlink()
            self.slots = list(storage.split(sizes))

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def bytes_in_memory(self) -> int:
        return 0 if self.slots is not None else sum(batch.nbytes for batch in self.batches if batch is not None)

    def stored(self, index: int) -> Activations:
        batch = self.batches[index]
        if batch is None:
            raise LookupError(f"batch {index} was never put into the cache")
        return batch

    def get(self, index: int, device: torch.device) -> Activations:
        return self.stored(index).to(device)

    def release(self) -> None:
        self.batches, self.slots = [None] * len(self.batches), None

    def put(self, index: int, activations: Activations) -> None:
        if self.slots is None:
            self.batches[index] = activations.to(self.device)
        else:
            slot = self.slots[index][: activations.numel()].view(activations.shape)
            self.batches[index] = slot.copy_(activations)


def cache_bytes(num_windows: int, seq_len: int, width: int, dtype: torch.dtype) -> int:
    return math.prod((num_windows, seq_len, width, dtype.itemsize))


@dataclass(frozen=True)
class CacheFolder:
    """Create caches: on the device where they fit, in memory up to `memory` bytes each, else in files."""

    decoder: Decoder
    scratch: Path

    def new(self, name: str, batches: list[Batch], memory: int, *, copies: int = 1) -> ActivationCache:
        decoder, device, file = self.decoder, self.decoder.device, None
        shapes = [(len(batch.ids), batch.ids.shape[1]) for batch in batches]
        needed = sum(cache_bytes(*shape, decoder.dense_width, decoder.dtype) for shape in shapes)
        if device.type != "cuda" or 3 * needed * copies >= torch.cuda.mem_get_info(device)[0]:
            device = torch.device("cpu")
            if needed > memory:
                handle, path = tempfile.mkstemp(prefix=f"activations-{name}-", dir=self.scratch)
                os.close(handle)
                file = Path(path)
        return ActivationCache(shapes, decoder.dense_width, decoder.dtype, device=device, file=file)


class Interner:
    """Hold equal tensors once: blocks and batches are mostly called with the same positions and masks.

    Call it with nested lists, tuples and dicts; it gives them back with equal tensors replaced by the first seen.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)

    def __call__(self, value: Any) -> Any:
        return tree_map_only(Tensor, self._first, value)

    def _first(self, tensor: Tensor) -> Tensor:
        known = self._seen[tensor.shape, tensor.dtype]
        first = next((seen for seen in known if seen is tensor or torch.equal(seen, tensor)), None)
        if first is None:
            known.append(tensor)
        return tensor if first is None else first


def embedded(decoder: Decoder, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, list[Arguments]]]:
    """Yield by batch the embeddings, which must be loaded, and the arguments that the blocks are called with."""
    intern = Interner()
    for batch in batches:
        stream, arguments = decoder.embed(batch.ids)
        yield stream, intern(arguments)


class Streams:
    """The calibration windows' activations at the point that the walk has come to.

    compressed: in the present basis, (windows, tokens, d) a batch. dense: (windows, tokens, D), None where no stage
    compares with it. before_post_norm: what the norm after the present branch is given in the dense model; None where
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
        self.batches = own_batches(batches, processes)
        copies = 1 + dense + before_post_norms
        names = ["stream", *(["dense"] if dense else []), *(["before"] if before_post_norms else [])]
        self.caches = {name: caches.new(name, self.batches, memory // copies, copies=max(copies, 2)) for name in names}
        self.compressed = self.caches["stream"]
        self.dense, self.before_post_norm = self.caches.get("dense"), self.caches.get("before")
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
        return needed + sum(cache.bytes_in_memory for cache in self.caches.values()) <= self.memory

    def embed(self, *, dense: bool = True) -> None:
        """Start the streams, or the compressed one alone, from the embeddings, which must be loaded."""
        for batch, stream in zip(self.batches, self.record_arguments(), strict=True):
            self.compressed.put(batch.index, stream)
            if self.dense is not None and dense:
                self.dense.put(batch.index, stream.clone())

    def record_arguments(self) -> Iterator[Tensor]:
        """Record the arguments that blocks are called with, yielding embeddings; these must be loaded."""
        self.arguments = []
        for stream, arguments in embedded(self.decoder, self.batches):
            self.arguments.append(arguments)
            yield stream

    def now(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return a batch of the compressed stream and of the dense one, on the device."""
        device = self.decoder.device
        dense = None if self.dense is None else self.dense.get(batch.index, device)
        return self.compressed.get(batch.index, device), dense

    def both(self, *, held_out: bool = False) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Yield all batches, or those held out, of the compressed stream and of the dense one, which must be there."""
        for batch in self.batches:
            if batch.held_out or not held_out:
                stream, dense = self.now(batch)
                assert dense is not None
                yield batch, stream, dense
                del stream, dense

    def update(self, branch: Branch, stream: Tensor, batch: Batch, block: int) -> Tensor:
        """Run a branch of a block on a batch; return what it adds to the stream."""
        if branch.run is None:
            raise ValueError(f"{branch.name} cannot be run.")
        update: Tensor = branch.run(stream, self.arguments[batch.index][block])
        return update

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{i}": cache.stored(i).cpu()
            for name, cache in self.caches.items()
            if cache is not self.before_post_norm
            for i in range(len(cache))
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name in self.caches.keys() - {"before"}:
            for i in range(len(self.batches)):
                # A copy: tensors of a file lie unaligned, and products of matrices round differently there.
                self.caches[name].put(i, state[f"{name}.{i}"].clone())

    def release(self) -> None:
        for cache in self.caches.values():
            cache.release()


def mean_divergence(head: Branch, weight: Tensor, bias: Tensor | None, streams: Streams) -> float | None:
    """Return KL(dense || compressed) of the next token in nats, averaged over held-out tokens; None without any.

    weight, bias: of the head's reader in the dense model.
    """
    if streams.dense is None:
        return None
    total, tokens = torch.zeros((), dtype=torch.float64, device=streams.decoder.device), 0
    (name,) = head.readers
    reader = head.owner.get_submodule(name)
    assert head.norm is not None
    logits_of = streams.decoder.logits_of
    for _, *both in streams.both(held_out=True):
        for z, x in zip(*(rows(stream).split(LOGITS_AT_ONCE) for stream in both), strict=True):
            dense = logits_of(nn.functional.linear(head.norm(x), weight, bias))
            total += kl_divergence(dense, logits_of(reader(head.norm(z)))).sum()
            tokens += len(x)
    streams.processes.add_up(total)
    tokens, divergence = streams.processes.total(tokens), float(total)
    if not math.isfinite(divergence):
        raise NumericalError("There is a NaN or Inf in the logits on held-out windows. Check the weights of the head.")
    return divergence / tokens if tokens else None
