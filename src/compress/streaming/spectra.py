"""How the outputs of the dense model's linears are spread, and how much the loss feels it: what ranks are chosen by.

For each linear the eigenvalues of its outputs' covariance, and those of the same seen through the second moment of the
loss's gradient by these outputs (K-FAC, arXiv 1503.05671): what is cut off of the second is, to second order, what it
costs the loss. The gradient's moments themselves lie in one file a block until the walk comes there; of outputs wider
than twice the stream only the diagonal is kept.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from safetensors import safe_open
from torch import Tensor, nn

from compress.models.decoder import Decoder
from compress.numerics.lowrank import InputMoments, Spread, gradient_metric, output_energies
from compress.streaming.experts import fill_up
from compress.streaming.groups import EquationSums
from compress.streaming.journal import write_tensors

WIDEST = 2  # times the stream: up to that the gradient's moment is a whole matrix


@dataclass(frozen=True)
class Spectrum:
    """By decreasing size: the variances of the outputs along their principal components, and what the loss feels."""

    energy: Float64[Tensor, "k"]
    felt: Float64[Tensor, "k"] | None = None


@dataclass(frozen=True)
class LinearWatch:
    """Which linears a stage wants to know of, by their names below a block and parts, and how it measures them.

    gradient_weight: as `gradient_metric` has it. centres: whether the mean of the outputs does not count, with a bias
        or without.
    """

    wanted: Callable[[str, str], bool]
    gradient_weight: float
    centres: Callable[..., bool]


@dataclass
class GradientFiles:
    """The moments of the gradients by the outputs of linears, a file a block."""

    folder: Path
    written: list[dict[str, Any]] = field(default_factory=list)

    def write(self, block: int, moments: Mapping[str, Tensor]) -> None:
        tensors = {path: moment.float().cpu() for path, moment in moments.items()}
        self.written.append(write_tensors(self.file(block), tensors))

    def read(self, block: int, path: str) -> Tensor | None:
        """The moment of one linear; None where it was not watched."""
        if not self.file(block).exists():
            return None
        with safe_open(self.file(block), framework="pt") as opened:
            # A copy: tensors of a file lie unaligned, and products of matrices round differently there.
            return opened.get_tensor(path).clone() if path in opened.keys() else None  # noqa: SIM118 (no dict)

    def file(self, block: int) -> Path:
        return self.folder / f"finding-gradients-{block:05d}.safetensors"


class LinearObserver:
    """Gathers one block's moments after the other."""

    def __init__(self, watch: LinearWatch, files: GradientFiles, decoder: Decoder) -> None:
        self.watch = watch
        self.files = files
        self.decoder = decoder
        self.widest = WIDEST * decoder.dense_width
        self.device = decoder.device
        self.spectra: dict[str, Spectrum] = {}
        self.linears: dict[str, nn.Linear] = {}
        self._forget()

    def _forget(self) -> None:
        self.sums: list[EquationSums] = []
        self.shared: dict[str, int] = {}
        self.gradients: dict[str, Tensor] = {}
        self.tokens = 0

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """Watch a block whose weights are there, for as many batches as pass it; then draw the conclusions."""
        prefix, part_of = self.decoder.block_prefix(index), self.decoder.family.part_of
        self.linears = {
            prefix + name: module
            for name, module in self.decoder.blocks[index].named_modules()
            if isinstance(module, nn.Linear) and self.watch.wanted(name, part_of(name))
        }
        yield
        moments = [self._moments(its_sums) for its_sums in self.sums]
        for path, linear in self.linears.items():
            if path not in self.shared:  # an expert that no token reached
                self.shared[path] = len(moments)
                moments.append(self._moments(EquationSums(linear.in_features, 0, self.device)))
            spread = moments[self.shared[path]].spread(centred=self.watch.centres(has_bias=linear.bias is not None))
            self.spectra[path] = self._spectrum(path, linear.weight.double(), spread)
        if self.gradients:
            self.files.write(index, {path: moment / self.tokens for path, moment in self.gradients.items()})
        self._forget()

    @contextmanager
    def batch(self) -> Iterator["Watched"]:
        """The inputs and outputs of the linears during one pass through the block."""
        watched = Watched()
        handles = [linear.register_forward_hook(watched.hook(path)) for path, linear in self.linears.items()]
        try:
            yield watched
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add(self, watched: "Watched", tokens: int, gradients: Mapping[str, Tensor] | None = None) -> None:
        """A batch of so many tokens, of which experts see some: linears that are given the same tensor share its
        moments."""
        seen: dict[int, int] = {}
        for path, given in watched.inputs.items():
            if path not in self.shared:
                self.shared[path] = seen.get(id(given), len(self.sums))
                if self.shared[path] == len(self.sums):
                    self.sums.append(EquationSums(given.shape[-1], 0, self.device))
            if id(given) not in seen:
                seen[id(given)] = self.shared[path]
                self.sums[self.shared[path]].add(rows(given.detach()), None)
        for path, gradient in (gradients or {}).items():
            self._add_gradient(path, rows(gradient).double())
        self.tokens += tokens

    def _add_gradient(self, path: str, g: Float64[Tensor, "tokens m"]) -> None:
        m = g.shape[-1]
        if path not in self.gradients:
            shape = (m, m) if m <= self.widest else (m,)
            self.gradients[path] = torch.zeros(shape, dtype=torch.float64, device=self.device)
        if m <= self.widest:
            self.gradients[path].addmm_(g.T, g)
        else:
            self.gradients[path] += g.square().sum(0)

    def _moments(self, sums: EquationSums) -> InputMoments:
        if sums.seen < self.tokens:  # an expert's
            fill_up(sums)
        return sums.moments()

    def _spectrum(self, path: str, W: Float64[Tensor, "m n"], spread: Spread) -> Spectrum:
        energy = output_energies(W, spread)
        if path not in self.gradients:
            # Where others have a gradient, what no token reached has none to feel.
            return Spectrum(energy, torch.zeros_like(energy) if self.gradients else None)
        G = self.gradients[path] / self.tokens
        scale = (G if G.ndim == 1 else G.diagonal()).mean()
        metric = gradient_metric(G, self.watch.gradient_weight, name=path)
        return Spectrum(energy, scale * (energy if metric is None else output_energies(metric.apply(W), spread)))


class Watched:
    """What linears were given and gave in one pass."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[path], self.outputs[path] = inputs[0], output

        return note


def rows(stream: Float[Tensor, "*tokens d"]) -> Float[Tensor, "_ d"]:
    return stream.reshape(-1, stream.shape[-1])
