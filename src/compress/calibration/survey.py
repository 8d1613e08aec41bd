"""Survey the dense model before anything is changed: moments of its stream and of the loss's gradient.

For a basis that all layers share, the second moment of the normalized stream at every norm of the model is needed, and
that of the loss's gradient at the same places. Both come from one pass forward and one backward, a block at a time: the
inputs of all blocks are kept, in memory or on disk, and no weight is ever changed.

The loss is the cross-entropy of the next token of the calibration text. The gradient is that by the normalized stream,
n = x / rms(x): dL/dn = rms(x) dL/dx, with rms(x) taken as given. A LayerNorm model's stream is taken without its mean,
which no LayerNorm lets pass.

On the same passes the linears of the blocks can be watched (`spectra.py`).
"""

import enum
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from compress.calibration.observers import GradientFiles, LinearObserver, Spectrum, UnitObserver, cost_name
from compress.calibration.processes import ALONE, Processes
from compress.calibration.statistics import rows
from compress.calibration.streams import ActivationCache, Batch, CacheFolder, Streams
from compress.calibration.weights import PartLoader, block_number, renumbered
from compress.models.branch import Branch
from compress.models.soundness import check_sound
from compress.numerics.sums import GramSum, at_least_float32
from compress.progress import return_free_memory

# Tokens of each window whose logits are held at a time: a row of them is as wide as the vocabulary.
TOKENS_AT_ONCE = 64
TOKENS_PER_DIRECTION = 8


class SurveyNeed(enum.Flag):
    """Statistics of the whole dense model that stages need.

    STREAM: the moments of its stream. LINEARS: how the outputs of its linears are spread. GRADIENT: of each of these
    what the loss feels there, by a pass backward. UNITS: what deleting neurons or KV groups costs the loss.
    TYPES: in place of the linears' spectra, what rounding them and the tables to types costs.
    """

    NONE = 0
    STREAM = enum.auto()
    LINEARS = enum.auto()
    GRADIENT = enum.auto()
    UNITS = enum.auto()
    TYPES = enum.auto()


@dataclass(frozen=True)
class Survey:
    """What one forward and backward pass of the dense model found.

    moment, gradient: of the stream, sums over all points of the mean per token, D the dense width; zeros where no stage
        asked for them.
    spectra: of the linears, by their names below the causal LM. gradients: by the outputs of linears.
    unit_costs: what deleting units costs the loss (`unit_costs.py`). roundings: what rounding does (`roundings.py`).
    """

    moment: Float64[Tensor, "D D"]
    gradient: Float64[Tensor, "D D"] | None = None
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    gradients: GradientFiles | None = None
    unit_costs: Mapping[str, Float64[Tensor, "deleted"]] = field(default_factory=dict)
    roundings: Mapping[str, Tensor] = field(default_factory=dict)

    def gradient_at(self, path: str, block: int, device: torch.device) -> Tensor | None:
        """The second moment of the gradient by a linear's outputs; None where it was not taken."""
        moment = None if self.gradients is None else self.gradients.read(block, path)
        return None if moment is None else moment.to(device)

    def of_blocks(self, kept: Sequence[int]) -> "Survey":
        """The survey for the model that has only these of the blocks, by their numbers in that one."""
        spectra, costs = dict[str, Spectrum](), dict[str, Tensor]()
        for number, dense in enumerate(kept):
            inside = [path for path in self.spectra if block_number(path) == dense]
            spectra |= {renumbered(path, {dense: number}): self.spectra[path] for path in inside}
            kinds = [name.rsplit(" ", 1)[0] for name in self.unit_costs if name.endswith(f" {dense}")]
            costs |= {cost_name(kind, number): self.unit_costs[cost_name(kind, dense)] for kind in kinds}
        gradients = None if self.gradients is None else replace(self.gradients, kept=kept)
        return replace(self, spectra=spectra, unit_costs=costs, gradients=gradients)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors but the gradients by linears, which are in files."""
        energy = {path: spectrum.energy for path, spectrum in self.spectra.items()}
        felt = {path: spectrum.felt for path, spectrum in self.spectra.items()}
        kinds: dict[str, Mapping[str, Tensor | None]]
        kinds = {"energy": energy, "felt": felt, "units": self.unit_costs, "rounding": self.roundings}
        named = {"moment": self.moment, "gradient": self.gradient}
        named |= {f"{kind} {name}": each for kind, found in kinds.items() for name, each in found.items()}
        return {name: tensor.cpu() for name, tensor in named.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], gradients: GradientFiles | None) -> "Survey":
        kinds = defaultdict[str, dict[str, Tensor]](dict)
        for full, tensor in tensors.items():
            kind, _, name = full.partition(" ")
            kinds[kind][name] = tensor
        spectra = {path: Spectrum(energy, kinds["felt"].get(path)) for path, energy in kinds["energy"].items()}
        moment, gradient = tensors["moment"], tensors.get("gradient")
        return cls(moment, gradient, spectra, gradients, kinds["units"], kinds["rounding"])


class Surveyor:
    """Run the dense model forward and backward over calibration windows, block by block.

    memory: bytes of activations to hold in memory; past it they go to disk.
    observer: of the blocks' linears, where they are to be watched. units: of the units whose costs are wanted.
    processes: all survey in step, each its share of the batches; what they find is equal.
    """

    def __init__(
        self,
        loader: PartLoader,
        batches: list[Batch],
        caches: CacheFolder,
        *,
        memory: int,
        observer: LinearObserver | None = None,
        units: UnitObserver | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.loader = loader
        self.decoder = decoder = loader.decoder
        copies = len(decoder.blocks) + 1
        self.streams = Streams(decoder, batches, caches, dense=False, memory=memory // copies, processes=processes)
        self.batches, self.stream = self.streams.batches, self.streams.compressed
        self.new_cache = partial(caches.new, batches=self.batches, memory=memory // copies, copies=copies)
        self.observer = observer or LinearObserver(None, GradientFiles(caches.scratch), decoder)
        self.units = units or UnitObserver({}, decoder.device)
        self.counts_stream = True
        self.moment, self.gradient = (GramSum(decoder.dense_width, decoder.device) for _ in range(2))

    def run(self, *, gradient: bool, stream: bool = True, begin: Callable[[str], None] = lambda _step: None) -> Survey:
        """Take the survey. stream: whether its moments are wanted. begin: called with the name of each step."""
        self.counts_stream, blocks = stream, range(len(self.decoder.blocks))
        inputs: list[ActivationCache] = []
        begin("embeddings")
        with self.loader.embeddings():
            self.streams.embed()
        for batch in self.batches:
            self._count(self.stream.get(batch.index, self.decoder.device))
        for block in blocks:
            begin(f"block {block}")
            if gradient:
                inputs.append(self.new_cache(f"kept-{block}"))
                for batch in self.batches:
                    inputs[-1].put(batch.index, self.stream.stored(batch.index))
            self._forward(block, watch=not gradient)
            return_free_memory()
        if gradient:
            begin("head")
            self._start_backward()
            for block in reversed(blocks):
                begin(f"block {block}, backward")
                self._backward(block, inputs.pop())
                return_free_memory()
        processes = self.streams.processes
        tokens = processes.total(sum(batch.ids.numel() for batch in self.batches))
        processes.add_up(self.moment.total, self.gradient.total)
        return Survey(
            self.moment.close() / tokens,
            self.gradient.close() / tokens if gradient else None,
            self.observer.spectra,
            self.observer.files,
            self.units.costs,
        )

    @torch.no_grad()
    def _forward(self, block: int, *, watch: bool) -> None:
        """Advance the stream through a block, counting its points in the moment; `watch` its linears."""
        with self.loader.block(block), self.observer.block(block, active=watch):
            branches = self.decoder.block_branches(block)
            for batch in self.batches:
                x = self.stream.get(batch.index, self.decoder.device)
                with self.observer.batch():
                    for branch in branches:
                        x = x + self.streams.update(branch, x, batch, block)
                        self._count(x)
                self.stream.put(batch.index, x)
                self.observer.add(batch.ids.numel())

    def _start_backward(self) -> None:
        """Turn the last stream into the loss's gradient by it, in place."""
        with self.loader.head():
            for batch in self.batches:
                x = self.stream.get(batch.index, self.decoder.device)
                self.observer.last(x)
                # Every token but a window's last predicts the next.
                pieces = zip(x[:, :-1].split(TOKENS_AT_ONCE, 1), batch.ids[:, 1:].split(TOKENS_AT_ONCE, 1), strict=True)
                found = []
                for piece, following in pieces:
                    with torch.enable_grad():
                        piece = piece.detach().requires_grad_()
                        logits, following = self.decoder.logits(piece).flatten(0, 1), following.flatten().to(x.device)
                        loss = torch.nn.functional.cross_entropy(logits, following, reduction="sum")
                        found.append(torch.autograd.grad(loss, piece)[0])
                gradient = torch.cat([*found, x.new_zeros(x[:, -1:].shape)], 1)
                self._count(x, gradient)
                self.stream.put(batch.index, gradient)

    def _backward(self, block: int, inputs: ActivationCache) -> None:
        """Take the gradients from a block's output to its input, counting them at each point on the way."""
        with self.loader.block(block), self.observer.block(block), torch.enable_grad():
            branches = self.decoder.block_branches(block)
            with self.units.block(block, branches):
                for batch in self.batches:
                    x = inputs.get(batch.index, self.decoder.device)
                    after = self.stream.get(batch.index, self.decoder.device)
                    self.stream.put(batch.index, self._backward_batch(batch, block, branches, x, after))

    def _backward_batch(
        self, batch: Batch, block: int, branches: Sequence[Branch], x: Tensor, after: Tensor
    ) -> Float[Tensor, "windows tokens D"]:
        """Return the gradient by a block's input x, from that by its output."""
        points = [x.detach().requires_grad_()]
        with self.observer.batch() as outputs, self.units.batch() as given:
            for branch in branches:
                points.append(points[-1] + self.streams.update(branch, points[-1], batch, block))
        found = torch.autograd.grad(points[-1], [*points[:-1], *outputs.values()], after)
        before, by_outputs = found[: len(branches)], dict(zip(outputs, found[len(branches) :], strict=True))
        for point, gradient in zip(points[:-1], before, strict=True):
            self._count(point.detach(), gradient)
        self.observer.add(batch.ids.numel(), by_outputs)
        self.units.add(given, [*before[1:], after])
        check_sound(before[0], f"the loss's gradient before block {block}")
        return before[0].detach()

    @torch.no_grad()
    def _count(self, x: Float[Tensor, "*batch D"], gradient: Float[Tensor, "*batch D"] | None = None) -> None:
        """Add a point's tokens, or the gradients there, to the sums."""
        if not self.counts_stream:
            return
        x = at_least_float32(rows(x))
        if self.decoder.family.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        rms = torch.sqrt(x.square().mean(-1, keepdim=True) + self.decoder.family.epsilon(self.decoder.config))
        if gradient is None:
            self.moment.add(x / rms)
        else:
            self.gradient.add(rows(gradient) * rms)


def num_steps(num_blocks: int, *, gradient: bool) -> int:
    """Count a survey's steps: the embeddings, every block, and with a gradient the head and every block again."""
    return (1 + num_blocks) * (2 if gradient else 1)


def survey_samples(samples: int, seq_len: int, width: int) -> int:
    """Number of calibration windows that a survey uses: a quarter, but at least 8 tokens for each stream direction.

    Second moments of the stream and of the gradient settle long before regressions do.
    """
    return min(samples, max(math.ceil(samples / 4), math.ceil(TOKENS_PER_DIRECTION * width / seq_len)))
