"""Spectra of the dense linears' outputs, by variance and by the loss's gradient: what ranks are allocated by.

For each linear the eigenvalues of its outputs' covariance, and those of the same seen through the second moment of the
loss's gradient by these outputs (K-FAC, arXiv 1503.05671): what is cut off of the second is, to second order, what it
costs the loss. The gradient's moments themselves lie in one file a block until the walk comes there; of outputs wider
than twice the stream only the diagonal is kept.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float64
from safetensors import safe_open
from torch import Tensor, nn

from compress.calibration.processes import ALONE, Processes
from compress.calibration.statistics import EquationSums, regularized, rows
from compress.io import WrittenFile, write_tensors
from compress.models.decoder import Decoder
from compress.numerics.lowrank import InputMoments, Spread, gradient_metric, output_energies
from compress.numerics.sums import DiagonalSum, GramSum

WIDEST = 2  # times the stream: up to that the gradient's moment is a whole matrix


@dataclass(frozen=True)
class Spectrum:
    """Variances of the outputs along their principal components, decreasing, and the same weighted by the gradient."""

    energy: Float64[Tensor, "k"]
    felt: Float64[Tensor, "k"] | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.energy,) if self.felt is None else (self.energy, self.felt)


@dataclass(frozen=True)
class LinearFilter:
    """Select the linears that a stage wants spectra of, and how they are measured.

    gradient_weight: as `gradient_metric` has it. centers: whether the mean of the outputs does not count, with a bias
        or without.
    """

    wanted: Callable[[str, str], bool]
    gradient_weight: float
    centers: Callable[..., bool]


@dataclass
class GradientFiles:
    """Second moments of the gradients by the linears' outputs, in one file a block."""

    folder: Path
    written: list[WrittenFile] = field(default_factory=list)

    def write(self, block: int, moments: Mapping[str, Tensor]) -> None:
        tensors = {path: moment.float().cpu() for path, moment in moments.items()}
        self.written.append(write_tensors(self.file(block), tensors))

    def read(self, block: int, path: str) -> Tensor | None:
        """Read the moment of one linear; None where it was not watched."""
        if not self.file(block).exists():
            return None
        with safe_open(self.file(block), framework="pt") as opened:
            # A copy: tensors of a file lie unaligned, and products of matrices round differently there.
            return opened.get_tensor(path).clone() if path in opened.keys() else None  # noqa: SIM118 (no dict)

    def file(self, block: int) -> Path:
        return self.folder / f"finding-gradients-{block:05d}.safetensors"


@dataclass
class LinearObserver:
    """Gather the moments block by block, each process from its own batches. Without a `watch` nothing is gathered."""

    watch: LinearFilter | None
    files: GradientFiles
    decoder: Decoder
    processes: Processes = ALONE
    spectra: dict[str, Spectrum] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = self.decoder.device
        self._forget()

    def _forget(self) -> None:
        self.linears: dict[str, nn.Linear] = {}
        self.inputs: dict[str, Tensor] = {}  # of the present batch
        self.sums: list[EquationSums] = []
        self.shared: dict[str, int] = {}
        self.gradients: dict[str, GramSum | DiagonalSum] = {}
        self.tokens = 0

    @contextmanager
    def block(self, index: int, *, active: bool = True) -> Iterator[None]:
        """Watch a loaded block for as many batches as pass it, then compute its spectra."""
        prefix, part_of = self.decoder.block_prefix(index), self.decoder.family.part_of
        if self.watch is not None and active:
            self.linears = {
                prefix + name: module
                for name, module in self.decoder.blocks[index].named_modules()
                if isinstance(module, nn.Linear) and self.watch.wanted(name, part_of(name))
            }
        yield
        if self.watch is not None and self.linears:
            sharing = self._sharing()
            moments = {path: self._moments(path) for path in self.linears if sharing[path] == path}
            gradients = self._mean_gradients()
            for path, linear in self.linears.items():
                spread = moments[sharing[path]].spread(centered=self.watch.centers(has_bias=linear.bias is not None))
                found = spectrum_of(path, linear, spread, gradients, self.watch.gradient_weight)
                self.spectra[path] = found
                self.processes.follow(*found.tensors)
            if gradients and self.processes.is_first:
                self.files.write(index, gradients)
        self._forget()

    def _sharing(self) -> dict[str, str]:
        """Map each linear to the first one that is given the same inputs, over all processes."""
        first = {self.shared[path]: path for path in reversed(self.linears) if path in self.shared}
        mine = {path: first[place] for path, place in self.shared.items()}
        found = {path: shared for theirs in self.processes.gathered(mine) for path, shared in theirs.items()}
        return {path: found.get(path, path) for path in self.linears}

    def _moments(self, path: str) -> InputMoments:
        width, place = self.linears[path].in_features, self.shared.get(path)
        sums = EquationSums(width, 0, self.device) if place is None else self.sums[place]  # no token reached an expert
        if self.processes.total(sums.seen) < self.processes.total(self.tokens):
            return regularized(sums, self.processes).moments()
        return sums.moments(self.processes)

    def _mean_gradients(self) -> dict[str, Tensor]:
        tokens = self.processes.total(self.tokens)
        reached = {path for theirs in self.processes.gathered(sorted(self.gradients)) for path in theirs}
        sums = {
            path: self._gradient_sum(path, linear.out_features)
            for path, linear in self.linears.items()
            if path in reached
        }
        self.processes.add_up(*(each.total for each in sums.values()))
        return {path: each.close() / tokens for path, each in sums.items()}

    def _gradient_sum(self, path: str, m: int) -> GramSum | DiagonalSum:
        if path not in self.gradients:
            is_narrow = m <= WIDEST * self.decoder.dense_width
            self.gradients[path] = (GramSum if is_narrow else DiagonalSum)(m, self.device)
        return self.gradients[path]

    @contextmanager
    def batch(self) -> Iterator[dict[str, Tensor]]:
        """Record the inputs of the linears during one pass through the block; yields their outputs, by path."""
        outputs: dict[str, Tensor] = {}

        def note(path: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            self.inputs[path], outputs[path] = inputs[0], output
            # A copy goes on where gradients are wanted: OLMo clips it in place, and what is noted would be clipped too.
            return output.clone() if output.requires_grad else None

        handles = [linear.register_forward_hook(partial(note, path)) for path, linear in self.linears.items()]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add(self, tokens: int, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Take in the batch that has passed, of so many tokens, of which experts see some.

        Linears that are given the same tensor share its moments. gradients: by the linears' outputs.
        """
        seen: dict[int, int] = {}
        for path, given in self.inputs.items():
            if path not in self.shared:
                self.shared[path] = seen.get(id(given), len(self.sums))
                if self.shared[path] == len(self.sums):
                    self.sums.append(EquationSums(given.shape[-1], 0, self.device))
            if id(given) not in seen:
                seen[id(given)] = self.shared[path]
                self.sums[self.shared[path]].add(rows(given.detach()))
        for path, gradient in (gradients or {}).items():
            self._gradient_sum(path, gradient.shape[-1]).add(rows(gradient))
        self.tokens += tokens
        self.inputs = {}


def spectrum_of(
    path: str, linear: nn.Linear, spread: Spread, gradients: Mapping[str, Tensor], gradient_weight: float
) -> Spectrum:
    """gradients: their second moments by linears' outputs, or the diagonals of these, where they were taken."""
    W = linear.weight.double()
    energy = output_energies(W, spread)
    if path not in gradients:
        # Where others have a gradient, what no token reached has none to feel.
        return Spectrum(energy, torch.zeros_like(energy) if gradients else None)
    G = gradients[path]
    scale = (G if G.ndim == 1 else G.diagonal()).mean()
    metric = gradient_metric(G, gradient_weight, name=path)
    return Spectrum(energy, scale * (energy if metric is None else output_energies(metric.apply(W), spread)))
