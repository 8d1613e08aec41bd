"""What the survey gathers of linears and units, a block at a time: spectra of outputs, and what deleting units costs.

For each linear the eigenvalues of its outputs' covariance, and those of the same seen through the second moment of the
loss's gradient by these outputs (K-FAC, arXiv 1503.05671): what is cut off of the second is, to second order, what it
costs the loss. The gradient's moments themselves lie in one file a block until the walk comes there; of outputs wider
than twice the stream only the diagonal is kept.

Units are MLP neurons, or KV groups with their query heads. A branch adds z W to the stream. With M = E g g^T the second
moment of the loss's gradient by the stream there and G = E z z^T, an error dW of the writer costs the loss, to second
order and with z and g taken as independent,

    1/2 E (g . z dW)^2  =  1/2 tr dW^T G dW M

which is the quadratic that structured OBS minimizes (`numerics/obs.py`) for the writer W M^(1/2). One elimination a
block gives the cost of every count, down to the smallest that is asked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from safetensors import safe_open
from torch import Tensor, nn

from compress.calibration.processes import ALONE, Processes
from compress.calibration.statistics import EquationSums, regularized, rows
from compress.calibration.weights import renumbered
from compress.io import WrittenFile, write_tensors
from compress.models.branch import Branch, captured_inputs
from compress.models.decoder import Decoder, part_of
from compress.numerics.lowrank import gradient_metric, output_energies
from compress.numerics.moments import InputMoments, Spread
from compress.numerics.obs import elimination
from compress.numerics.ridge import cholesky, damped
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
    """Second moments of the gradients by the linears' outputs, in one file a block.

    kept: the blocks of the surveyed model that the one they are read for has; None for all.
    """

    folder: Path
    written: list[WrittenFile] = field(default_factory=list)
    kept: Sequence[int] | None = None

    def write(self, block: int, moments: Mapping[str, Tensor]) -> None:
        tensors = {path: moment.float().cpu() for path, moment in moments.items()}
        self.written.append(write_tensors(self.file(block), tensors))

    def read(self, block: int, path: str) -> Tensor | None:
        """Read the moment of one linear; None where it was not watched."""
        if self.kept is not None:
            block, path = self.kept[block], renumbered(path, dict(enumerate(self.kept)))
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
        self.groups: list[dict[str, nn.Linear]] = []  # by what they are given, by path
        self.sums: list[EquationSums] = []
        self.inputs: dict[str, Tensor] = {}  # of the present batch
        self.gradients: dict[str, GramSum | DiagonalSum] = {}
        self.tokens = 0

    @contextmanager
    def block(self, index: int, *, active: bool = True) -> Iterator[None]:
        """Watch a loaded block for as many batches as pass it, then compute its spectra."""
        watch, decoder = self.watch if active else None, self.decoder
        prefix, part = decoder.block_prefix(index), decoder.family.part_of
        for names in (names for branch in decoder.block_branches(index) for names in branch.sharing()):
            wanted = [name for name in names if watch is not None and watch.wanted(name, part(name))]
            if wanted:
                linears = {prefix + name: part_of(decoder.blocks[index], name, nn.Linear) for name in wanted}
                self.groups.append(linears)
                self.sums.append(EquationSums(linears[prefix + wanted[0]].in_features, 0, self.device))
        yield
        if watch is not None and self.groups:
            gradients = self._mean_gradients()
            for group, sums in zip(self.groups, self.sums, strict=True):
                is_whole = self.processes.total(sums.seen) == self.processes.total(self.tokens)
                moments = sums.moments(self.processes) if is_whole else regularized(sums, self.processes).moments()
                for path, module in group.items():
                    self.measure(path, module, moments, gradients, watch)
            if gradients and self.processes.is_first:
                self.files.write(index, gradients)
        self._forget()

    def measure(
        self, path: str, module: nn.Linear, moments: InputMoments, gradients: Mapping[str, Tensor], watch: LinearFilter
    ) -> None:
        """Find what is wanted of a linear; gradients: as `spectrum_of` has them."""
        spread = moments.spread(centered=watch.centers(has_bias=module.bias is not None))
        self.spectra[path] = found = spectrum_of(path, module, spread, gradients, watch.gradient_weight)
        self.processes.follow(*found.tensors)

    def last(self, x: Float[Tensor, "windows tokens D"]) -> None:
        """See a batch of the stream before the head."""

    def _mean_gradients(self) -> dict[str, Tensor]:
        tokens = self.processes.total(self.tokens)
        reached = {path for theirs in self.processes.gathered(sorted(self.gradients)) for path in theirs}
        sums = {
            path: self._gradient_sum(path, module.out_features)
            for group in self.groups
            for path, module in group.items()
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

        linears = [each for group in self.groups for each in group.items()]
        handles = [module.register_forward_hook(partial(note, path)) for path, module in linears]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add(self, tokens: int, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Take in a batch of so many tokens, of which experts see some. gradients: by the linears' outputs."""
        for group, sums in zip(self.groups, self.sums, strict=True):
            if (given := self.inputs.get(next(iter(group)))) is not None:
                sums.add(rows(given.detach()))
        for path, gradient in (gradients or {}).items():
            self._gradient_sum(path, gradient.shape[-1]).add(rows(gradient))
        self.tokens += tokens
        self.inputs = {}


def spectrum_of(
    path: str, module: nn.Linear, spread: Spread, gradients: Mapping[str, Tensor], gradient_weight: float
) -> Spectrum:
    """Compute a linear's spectrum. gradients: their second moments by linears' outputs, or the diagonals of these."""
    W = module.weight.double()
    energy = output_energies(W, spread)
    if path not in gradients:
        # Where others have a gradient, what no token reached has none to feel.
        return Spectrum(energy, torch.zeros_like(energy) if gradients else None)
    G = gradients[path]
    scale = (G if G.ndim == 1 else G.diagonal()).mean()
    metric = gradient_metric(G, gradient_weight, name=path)
    return Spectrum(energy, scale * (energy if metric is None else output_energies(metric.apply(W), spread)))


DAMPING = 0.01  # of the mean diagonal of G
FLOOR = 1e-3  # of the mean diagonal of M: keeps directions without a gradient from costing nothing


def cost_name(kind: str, block: int) -> str:
    return f"{kind} {block}"


@dataclass
class WatchedUnits:
    """One kind of unit in one branch of the present block, and the sums over its tokens.

    place: of the branch in the block. inputs: of its writer. gradient: by the stream after the branch.
    """

    place: int
    kind: str
    branch: Branch
    writer: nn.Linear
    inputs: EquationSums
    gradient: EquationSums


@dataclass
class UnitObserver:
    """Gather the moments of one block after the other, each process from its own batches.

    down_to: the smallest count of each kind of unit that costs are wanted for; nothing is gathered of other kinds.
    costs: by `cost_name`, what deleting 0, 1, 2, ... units costs the loss, in nats a token.
    """

    down_to: Mapping[str, int]
    device: torch.device
    processes: Processes = ALONE
    costs: dict[str, Float64[Tensor, "deleted"]] = field(default_factory=dict)
    watched: list[WatchedUnits] = field(default_factory=list)

    @contextmanager
    def block(self, index: int, branches: Sequence[Branch]) -> Iterator[None]:
        """Watch a block's units for as many batches as pass it, then compute their costs."""
        for (place, branch), kind in product(enumerate(branches), self.down_to):
            if kind in branch.units:
                writer = branch.writers[branch.units[kind][0].writer]
                assert isinstance(writer, nn.Linear)
                inputs, gradient = (
                    EquationSums(width, 0, self.device) for width in (writer.in_features, writer.out_features)
                )
                self.watched.append(WatchedUnits(place, kind, branch, writer, inputs, gradient))
        yield
        for watched in self.watched:
            branch, kind, name = watched.branch, watched.kind, f"{watched.branch.name} writers"
            G, M = (sums.moments(self.processes).second for sums in (watched.inputs, watched.gradient))
            count = branch.units[kind][1]
            self.costs[cost_name(kind, index)] = costs = G.new_zeros(1 + max(0, count - self.down_to[kind]))
            if G.any() and M.any():
                root = cholesky(damped(M, FLOOR), name=f"the loss's gradient at {name}")
                W = branch.scale * watched.writer.weight.double().T
                units = torch.arange(len(W), device=W.device).view(count, -1)
                costs[1:] = elimination(W @ root, G, units, self.down_to[kind], damping=DAMPING, name=name).costs / 2
                self.processes.follow(costs)
        self.watched = []

    def batch(self) -> AbstractContextManager[dict[int, Tensor]]:
        """Capture the writers' inputs during one pass through the block, as `add` takes them."""
        return captured_inputs(units.writer for units in self.watched)

    @torch.no_grad()
    def add(self, inputs: Mapping[int, Tensor], gradients: Sequence[Tensor]) -> None:
        """Take in a batch: the writers' inputs, and the gradients by the stream after each branch."""
        for place, units in enumerate(self.watched):
            units.inputs.add(rows(inputs[place].detach()))
            units.gradient.add(rows(gradients[units.place].detach()))
