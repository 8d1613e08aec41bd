"""The walk over a decoder: every weight is read once, every branch runs once, finished parts come out one by one.

The windows' hidden states pass through the *compressed* prefix, so each statistic sees the error of what was compressed
before it. A branch's output is taken in the dense basis, its statistics decide the next basis, and both the weights
and the activations are carried over into it; nothing is run a second time. The reference runs each block twice.

Shapes: stream (windows, tokens, d) in the present basis, (windows, tokens, D) in the dense one, decode (d, D),
encode (D, d).
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compress.errors import NumericalError
from compress.models.branch import Branch, read_through, shortcut, write_through
from compress.models.decoder import Arguments, Decoder
from compress.models.modeling_sliced import shortcut_name
from compress.streaming.cache import ActivationCache, cache_bytes
from compress.streaming.interning import Interner
from compress.streaming.memory import return_large_blocks
from compress.streaming.sites import Stage, StreamPoint, stream_points
from compress.streaming.stopwatch import Stopwatch
from compress.streaming.weights import LazyWeights


@dataclass(frozen=True, kw_only=True)
class WalkSettings:
    """
    output_dtype: of the written weights; computing is in the decoder's dtype.
    batch_size: windows at a time.
    cache_memory: bytes of activations to hold in memory; past it they go to a file under `scratch`.
    """

    output_dtype: torch.dtype
    batch_size: int
    seed: int
    cache_memory: int
    scratch: Path


@dataclass
class FinishedPart:
    """Embeddings, a block or the head, compressed: tensors by their names in the checkpoint, in the output dtype."""

    index: int
    name: str
    tensors: dict[str, Tensor]
    points: list[dict[str, Any]]


class Walk:
    """Walks `decoder` once with calibration `windows`, applying `stages` at their sites.

    `parts()` yields finished parts; between two of them `state()` is all that the rest of the walk depends on, and
    `restore(state, next_part)` on a fresh walk continues as if there had been no break, to the bit.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: LazyWeights,
        windows: Int64[Tensor, "windows tokens"],
        probe: Int64[Tensor, "1 probe_tokens"],
        stages: Sequence[Stage],
        settings: WalkSettings,
    ) -> None:
        self.decoder = decoder
        self.weights = weights
        self.batches = windows.split(settings.batch_size)
        self.probe_ids = probe
        self.points = stream_points(
            decoder.dense_width,
            num_blocks=len(decoder.blocks),
            branch_names=[branch["name"] for branch in decoder.structure["branches"]],
            seed=settings.seed,
        )
        self.stages = stages
        self.settings = settings
        self.clock = Stopwatch(decoder.device)
        budget = settings.cache_memory // num_streams(stages)
        self.stream = self._new_cache(windows, "stream", budget)
        self.dense_stream = self._new_cache(windows, "dense", budget) if num_streams(stages) == 2 else None
        self.arguments: list[list[Arguments]] = []
        self.probe_arguments: list[Arguments] = []
        self.probe: Tensor | None = None
        self.decode: Tensor | None = None
        self.next_part = 0

    @property
    def num_parts(self) -> int:
        return len(self.decoder.blocks) + 2

    @torch.no_grad()
    def parts(self) -> Iterator[FinishedPart]:
        return_large_blocks()
        while self.next_part < self.num_parts:
            part = self._walk_part(self.next_part)
            self.next_part += 1
            yield part

    def state(self) -> dict[str, Tensor]:
        tensors = {f"{name}.{i}": cache.stored(i).cpu() for name, cache in self._caches() for i in range(len(cache))}
        optional = {"decode": self.decode, "probe": self.probe}
        return tensors | {name: tensor.cpu() for name, tensor in optional.items() if tensor is not None}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], next_part: int) -> None:
        self._record_arguments()
        device = self.decoder.device
        for name, cache in self._caches():
            for i in range(len(cache)):
                # A copy: tensors of a file lie unaligned, and products of matrices round differently there.
                cache.put(i, state[f"{name}.{i}"].clone())
        self.decode = state["decode"].clone().to(device) if "decode" in state else None
        self.probe = state["probe"].clone().to(device)
        self.next_part = next_part

    def _walk_part(self, index: int) -> FinishedPart:
        if index == 0:
            return self._walk_embeddings()
        if index == self.num_parts - 1:
            return self._walk_head()
        return self._walk_block(index - 1)

    def _walk_embeddings(self) -> FinishedPart:
        decoder, branch = self.decoder, self.decoder.embedding_branch()
        self._record_arguments(then_empty=False)
        self._at_branch(branch)
        point = self.points[0]
        with self.clock("forward"):
            for i, batch in enumerate(self.batches):
                embedded, _ = decoder.embed(batch)
                self.stream.put(i, embedded)
                if self.dense_stream is not None:
                    self.dense_stream.put(i, embedded)
        self._decide(point)
        self._change_basis(branch, point)
        tables: dict[str, Tensor] = {f"{name}.weight": table.weight for name, table in branch.writers.items()}
        part = self._finish(0, "embeddings", tables, [point])
        self.probe, _ = decoder.embed(self.probe_ids)
        for table in branch.writers.values():
            decoder.empty(table)
        return part

    def _walk_block(self, index: int) -> FinishedPart:
        decoder, block = self.decoder, self.decoder.blocks[index]
        prefix = decoder.block_prefix(index)
        with self.clock("read"):
            tensors = self.weights.read(decoder.block_names(index))
            decoder.fill(block, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
        branches = decoder.block_branches(index)
        first = 1 + index * len(branches)
        points = self.points[first : first + len(branches)]
        for branch, point, table in zip(branches, points, decoder.structure["branches"], strict=True):
            self._at_branch(branch)
            self._run_branch(branch, index)
            self._decide(point)
            weight = self._change_basis(branch, point)
            if weight is not None:
                setattr(block, shortcut_name(table), shortcut(weight, decoder.dtype))
        tensors = {prefix + name: parameter for name, parameter in block.named_parameters()}
        part = self._finish(index + 1, f"block {index}", tensors, points)
        if self.probe is not None:
            self.probe = block(self.probe, **self.probe_arguments[index])
        decoder.empty(block)
        return part

    def _walk_head(self) -> FinishedPart:
        decoder, head = self.decoder, self.decoder.head_branch()
        with self.clock("read"):
            tensors = self._read_head()
            names = (decoder.family.final_norm, decoder.family.head)
            for name in names:
                decoder.fill_root(tensors, part=name)
        self._at_branch(head)
        if self.decode is not None:
            read_through(head, self.decode)
        owners = {name: decoder.model.get_submodule(name) for name in names}
        named = {f"{name}.{inner}": p for name, owner in owners.items() for inner, p in owner.named_parameters()}
        part = self._finish(self.num_parts - 1, "head", named, [])
        if self.probe is not None:
            self.probe = decoder.logits(self.probe)
        return part

    def _read_head(self) -> dict[str, Tensor]:
        """The final norm and the head; a tied head is the first embedding table under its own name."""
        decoder = self.decoder
        names = decoder.head_names()
        head_weight = f"{decoder.family.head}.weight"
        if self.weights.resolve(head_weight) is not None:
            return self.weights.read(names)
        table = decoder.embedding_names()[0]
        tensors = self.weights.read([name for name in names if name != head_weight])
        return tensors | {head_weight: self.weights.read([table])[table]}

    def _at_branch(self, branch: Branch) -> None:
        for stage in self.stages:
            if stage.site is Branch:
                stage.apply(branch)

    def _run_branch(self, branch: Branch, block: int) -> None:
        """Advance the dense stream through the branch as it is, then the compressed one through it in its basis.

        Both come out in the dense basis: the writers have not been given one yet.
        """
        if branch.run is None:
            raise ValueError(f"{branch.name} cannot be run.")
        device, dtype = self.decoder.device, self.decoder.dtype
        with self.clock("forward"):
            if self.dense_stream is not None:
                for i in range(len(self.dense_stream)):
                    dense = self.dense_stream.get(i, device)
                    self.dense_stream.put(i, dense + branch.run(dense, self.arguments[i][block]))
            if self.decode is not None:
                read_through(branch, self.decode)
            for i in range(len(self.stream)):
                stream = self.stream.get(i, device)
                passed = stream if self.decode is None else stream @ self.decode.to(dtype)
                self.stream.put(i, passed + branch.run(stream, self.arguments[i][block]))

    def _decide(self, point: StreamPoint) -> None:
        """Gather the statistics that stages need at a point of the stream, and ask the stages."""
        stages = [stage for stage in self.stages if stage.site is StreamPoint]
        needs = dict.fromkeys(need for stage in stages for need in stage.needs)
        device, eps = self.decoder.device, self.decoder.family.epsilon(self.decoder.config)
        gathered = {need: need.accumulator(point.dense_width, eps, device) for need in needs}
        with self.clock("statistics"):
            for i in range(len(self.stream)):
                stream = self.stream.get(i, device)
                dense = None if self.dense_stream is None else self.dense_stream.get(i, device)
                for accumulator in gathered.values():
                    accumulator.add(stream, dense)
        point.statistics = {need: accumulator.value() for need, accumulator in gathered.items()}
        with self.clock("eigensolve"):
            for stage in stages:
                stage.apply(point)

    def _change_basis(self, branch: Branch, point: StreamPoint) -> Float[Tensor, "d_in d_out"] | None:
        """Carry the branch's writers and the cached stream into the point's basis; the shortcut's weight, if any."""
        encode = point.encode()
        if encode is None:
            return None
        with self.clock("rotate"):
            write_through(branch, encode)
            narrow = encode.to(self.decoder.dtype)
            for i in range(len(self.stream)):
                self.stream.put(i, self.stream.get(i, self.decoder.device) @ narrow)
            weight = encode if self.decode is None else self.decode @ encode
            self.decode = encode.T.contiguous()
        return weight

    def _finish(self, index: int, name: str, tensors: Mapping[str, Tensor], points: list[StreamPoint]) -> FinishedPart:
        """Round a part's weights to the output dtype, in the module too: the probe sees what will be read back."""
        rounded = {key: tensor.to(self.settings.output_dtype).cpu().contiguous() for key, tensor in tensors.items()}
        for key, tensor in rounded.items():
            if not torch.isfinite(tensor).all():
                raise NumericalError(
                    f"The compressed weight {key!r} has a NaN or Inf in {self.settings.output_dtype}. "
                    "Try --dtype bfloat16 or float32."
                )
            tensors[key].copy_(tensor)
        return FinishedPart(index, name, rounded, [point.close() for point in points])

    def _record_arguments(self, *, then_empty: bool = True) -> None:
        """Fill the embeddings and note what each block is called with, for every batch and for the probe."""
        decoder = self.decoder
        tensors = self.weights.read(decoder.embedding_names())
        for table in decoder.family.embeddings:
            decoder.fill_root(tensors, part=table)
        intern = Interner()
        self.arguments = [intern(decoder.embed(batch)[1]) for batch in self.batches]
        self.probe_arguments = decoder.embed(self.probe_ids)[1]
        if then_empty:
            for table in decoder.family.embeddings:
                decoder.empty(decoder.model.get_submodule(table))

    def _caches(self) -> list[tuple[str, ActivationCache]]:
        named = [("stream", self.stream), ("dense", self.dense_stream)]
        return [(name, cache) for name, cache in named if cache is not None]

    def _new_cache(self, windows: Tensor, name: str, budget: int) -> ActivationCache:
        decoder, settings = self.decoder, self.settings
        num_windows, seq_len = windows.shape
        needed = cache_bytes(num_windows, seq_len, decoder.dense_width, decoder.dtype)
        fits_device = decoder.device.type == "cuda" and needed < torch.cuda.mem_get_info(decoder.device)[0] // 3
        return ActivationCache(
            [(len(batch), seq_len) for batch in self.batches],
            decoder.dense_width,
            decoder.dtype,
            device=decoder.device if fits_device else torch.device("cpu"),
            file=scratch_file(settings.scratch, name) if needed > budget and not fits_device else None,
        )


def scratch_file(folder: Path, name: str) -> Path:
    """A new file that is nobody else's, whatever lies in the folder."""
    handle, path = tempfile.mkstemp(prefix=f"activations-{name}-", dir=folder)
    os.close(handle)
    return Path(path)


def num_streams(stages: Iterable[Stage]) -> int:
    """1, the compressed stream, or 2 where a stage compares with the dense one."""
    return 2 if any(need.dense for stage in stages for need in stage.needs) else 1
