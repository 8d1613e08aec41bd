"""Walk over a decoder: read every weight once, yield finished parts one by one.

Part after part is read, taken through its stages (`branch_pass.py` says in which order), rounded, yielded and
emptied. A short probe passes through the rounded weights: its logits are what the written checkpoint must give.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from compress.calibration.branch_pass import BranchPass
from compress.calibration.depth import DroppedBlocks
from compress.calibration.processes import ALONE, Processes
from compress.calibration.rewriting import Report
from compress.calibration.sites import (
    Stage,
    StreamPoint,
    WholeModel,
    keeps_before_post_norms,
    num_streams,
    stream_points,
)
from compress.calibration.streams import CacheFolder, Streams, split_windows
from compress.calibration.survey import Survey
from compress.calibration.weights import Layout, LazyWeights, PartLoader
from compress.errors import NumericalError
from compress.models.decoder import Arguments, Decoder
from compress.models.soundness import check_sound
from compress.models.storage import inputs_as_they_are, num_parameters
from compress.numerics.frames import Frame
from compress.progress import Stopwatch, return_free_memory


@dataclass(frozen=True, kw_only=True)
class WalkSettings:
    """What a walk is told besides model, text and stages.

    layout: the form that parts are written in. output_dtype: of the written weights; computing is in the decoder's.
    batch_size: windows at a time. held_out: how many of the last windows nothing is fitted on at first.
    probe_tokens: how many tokens of the first window pass through the finished model.
    cache_memory: bytes of activations to hold in memory; past it they go to a file under `scratch`.
    dropped: blocks of the dense model that the decoder lacks.
    """

    layout: Layout
    output_dtype: torch.dtype
    batch_size: int
    held_out: int
    probe_tokens: int
    seed: int
    cache_memory: int
    scratch: Path
    dropped: DroppedBlocks | None = None


@dataclass
class FinishedPart:
    """Embeddings, a block or the head, compressed: tensors by their names in the checkpoint, in the output dtype.

    adapter: the tensors that belong into an adapter beside it. parameters: how many numbers both store.
    points, groups: reports on the stream and on groups of linears.
    divergence: with the head, how far the compressed model's next-token distribution is from the dense one's: the
        Kullback-Leibler divergence in nats, its mean over held-out tokens; None where nothing is held out.
    """

    index: int
    name: str
    tensors: dict[str, Tensor]
    adapter: dict[str, Tensor]
    parameters: int
    points: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    divergence: float | None = None


class Walk:
    """Walk `decoder` once with calibration `windows`, applying `stages` at their sites.

    `parts()` yields finished parts; between two of them `state()` is all that the rest of the walk depends on, and
    `restore(state, next_part)` on a fresh walk continues as if there had been no break, to the bit.

    survey: of the dense model, where a stage works on the whole model.
    processes: all walk in step, each with its share of the windows; their parts are equal, their states are their own.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: LazyWeights,
        windows: Int64[Tensor, "windows tokens"],
        stages: Sequence[Stage],
        settings: WalkSettings,
        survey: Survey | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.decoder = decoder
        self.loader = PartLoader(decoder, weights)
        self.probe_ids = windows[:1, : settings.probe_tokens]
        self.settings = settings
        self.points = stream_points(
            decoder.dense_width,
            num_blocks=len(decoder.blocks),
            branch_names=[branch["name"] for branch in decoder.structure["branches"]],
            seed=settings.seed,
        )
        self.clock = Stopwatch(decoder.device)
        with self.clock("solve"):
            frame = shared_frame(stages, survey, layer_norm=decoder.family.norm == "layer")
            processes.follow(*(frame.tensors if frame is not None else ()))
        self.streams = Streams(
            decoder,
            split_windows(windows, settings.batch_size, settings.held_out),
            CacheFolder(decoder, settings.scratch),
            dense=num_streams(stages) == 2,
            before_post_norms=keeps_before_post_norms(stages, decoder.family),
            memory=settings.cache_memory,
            processes=processes,
        )
        self.branch_pass = BranchPass(
            decoder, self.streams, stages, settings.layout, self.clock, survey, frame, settings.dropped
        )
        self.probe_arguments: list[Arguments] = []
        self.probe: Tensor | None = None
        self.next_part = 0

    @property
    def num_parts(self) -> int:
        return len(self.decoder.blocks) + 2

    @torch.no_grad()
    def parts(self, begin: Callable[[str], None] = lambda name: None) -> Iterator[FinishedPart]:
        """Walk on, and hand out each part as it is finished. begin: called with the name of each part that is begun."""
        while self.next_part < self.num_parts:
            block = self.next_part - 1
            begin({-1: "embeddings", len(self.decoder.blocks): "head"}.get(block, f"block {block}"))
            if block == -1:
                part = self._walk_embeddings()
            else:
                part = self._walk_head() if block == len(self.decoder.blocks) else self._walk_block(block)
            self.next_part += 1
            yield part
            del part
            return_free_memory()

    def state(self) -> dict[str, Tensor]:
        optional = {"decode": self.branch_pass.decode, "probe": self.probe}
        return self.streams.state() | {name: tensor.cpu() for name, tensor in optional.items() if tensor is not None}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], next_part: int) -> None:
        with self.loader.embeddings():
            for _ in self.streams.record_arguments():
                pass
            _, self.probe_arguments = self.decoder.embed(self.probe_ids)
        self.streams.restore(state)
        device = self.decoder.device
        self.branch_pass.decode = state["decode"].clone().to(device) if "decode" in state else None
        self.probe = state["probe"].clone().to(device)
        self.next_part = next_part

    def _walk_embeddings(self) -> FinishedPart:
        branch, point = self.decoder.embedding_branch(), self.points[0]
        with self._loaded(self.loader.embeddings()):
            _, self.probe_arguments = self.decoder.embed(self.probe_ids)
            self.branch_pass.embed(branch, point)
            tables = self._tensors_of(self.decoder.family.embedding_parts)
            part = self._finish(0, "embeddings", tables, points=[point])
            self.probe, _ = self.decoder.embed(self.probe_ids)
        return part

    def _walk_block(self, index: int) -> FinishedPart:
        decoder, block = self.decoder, self.decoder.blocks[index]
        with self._loaded(self.loader.block(index)):
            branches = decoder.block_branches(index)
            first = 1 + index * len(branches)
            points, groups = self.points[first : first + len(branches)], list[Report]()
            for branch, point in zip(branches, points, strict=True):
                groups += self.branch_pass.through(branch, point, index)
            tensors = self._tensors_of([decoder.block_prefix(index).removesuffix(".")])
            part = self._finish(index + 1, f"block {index}", tensors, points=points, groups=groups)
            part.parameters = num_parameters(block)
            if self.probe is not None:
                with inputs_as_they_are(block):
                    self.probe = block(self.probe, **self.probe_arguments[index])
                check_sound(self.probe, f"the stream after block {index}, its weights in {self.settings.output_dtype}")
        return part

    def _walk_head(self) -> FinishedPart:
        decoder, branch = self.decoder, self.decoder.head_branch()
        with self._loaded(self.loader.head()):
            groups, divergence = self.branch_pass.read_out(branch)
            tensors = self._tensors_of(decoder.family.head_parts)
            if self.settings.layout.ties_head:
                # Written with the embeddings; the probe sees it rounded as they are.
                tied = tensors.pop(f"{decoder.family.head}.weight")
                if not self.branch_pass.stored:
                    tied.copy_(self._rounded("", tied))
            part = self._finish(self.num_parts - 1, "head", tensors, groups=groups)
            part.divergence = divergence
            if self.probe is not None:
                self.probe = decoder.logits(self.probe)
        return part

    def _tensors_of(self, modules: Iterable[str]) -> dict[str, Tensor]:
        """Name the parameters and the persistent buffers of modules."""
        return {
            f"{module}.{name}": tensor
            for module in modules
            for name, tensor in self.decoder.model.get_submodule(module).state_dict(keep_vars=True).items()
        }

    @contextmanager
    def _loaded(self, part: AbstractContextManager[None]) -> Iterator[None]:
        with ExitStack() as stack:
            with self.clock("read"):
                stack.enter_context(part)
            yield

    def _finish(
        self,
        index: int,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        points: Sequence[StreamPoint] = (),
        groups: Sequence[Report] = (),
    ) -> FinishedPart:
        """Round a part's weights to the output dtype, in the module too: the probe sees what will be read back."""
        # What is stored of quantized tables takes the place of their weights.
        tables = {path: each for path, each in self.branch_pass.stored.items() if f"{path}.weight" in tensors}
        stored = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in tables}
        stored |= {f"{path}.{name}": tensor for path, each in tables.items() for name, tensor in each.items()}
        rounded = {key: self._rounded(key, tensor).cpu().contiguous() for key, tensor in stored.items()}
        for key, tensor in rounded.items():
            if is_wide_float(tensor) and not torch.isfinite(tensor).all():
                raise NumericalError(
                    f"The compressed weight {key!r} has a NaN or Inf in {self.settings.output_dtype}. "
                    "Try --dtype bfloat16 or float32."
                )
            stored[key].copy_(tensor)
        layout = self.settings.layout
        adapter = {key: to for key in rounded if (to := layout.in_adapter(key)) is not None}
        return FinishedPart(
            index,
            name,
            tensors={layout.file_name(key): tensor for key, tensor in rounded.items() if key not in adapter},
            adapter={to: rounded[key] for key, to in adapter.items()},
            parameters=sum(tensor.numel() for tensor in tensors.values()),
            points=[point.close() for point in points],
            groups=list(groups),
        )

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(written_dtype(name, tensor, self.settings.output_dtype))


def is_wide_float(tensor: Tensor) -> bool:
    """Whether a tensor holds floats; 8-bit floats are codes."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def written_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype` for floats; indices and codes, and the scale that NVFP4 has of a whole matrix, stay as they are.

    What is added to scores to choose experts is float32, as stock code wants it: neighbors are close together.
    """
    if name.endswith(".correction"):
        return torch.float32
    return dtype if is_wide_float(tensor) and not name.endswith("weight_global_scale") else tensor.dtype


def shared_frame(stages: Sequence[Stage], survey: Survey | None, *, layer_norm: bool) -> Frame | None:
    """Compute the frame that all points share, by the stages that work on the whole model."""
    stages = [stage for stage in stages if stage.site is WholeModel]
    if not stages:
        return None
    if survey is None:
        raise ValueError("A stage works on the whole model, and there is no survey of it.")
    site = WholeModel(survey, layer_norm)
    for stage in stages:
        stage.apply(site)
    return site.frame
