"""Groups of linears that are fitted together: inputs from the compressed prefix, targets from the dense model.

The anchored view: a group is not to reproduce itself on the inputs it is given, but to turn them into what the dense
model had at the same place. What is known of that are two second moments, gathered over the calibration windows apart
for those it is fitted on and those held out:

    readers of the stream (q, k, v | gate, up | head)    u = RMSNorm(z) of the compressed stream
                                                         t = RMSNorm(x) of the dense stream
    writers of the stream (o | down)                     u = (z,) their inputs in the compressed branch
                                                         t = what takes the compressed stream to the dense one, encoded

Readers have one unknown, the map from u to t: each linear is its dense weight after it, so a map is fitted once for all
of them and the head costs no more than any. Writers are the unknown themselves. Where the linears have biases, u ends
in a constant 1. Tokens count by the inverse mean square of the dense stream there, as the next norm will weigh them.

The experts of a mixture are fitted each by the tokens that are routed to it, each token once for what reads the stream.
What writes it is given its inputs times the token's share, so that an error counts as it does in the stream. Those that
have too few tokens are regularized (`statistics.py`). All experts' writers together are one least-squares problem of
experts x inner unknown rows, too wide to solve. A token whose experts have the shares p_e (1 in sum) lacks r toward the
dense stream; with changes D_e,

    ||r - sum_e u_e D_e||^2  <=  sum_e ||p_e r - u_e D_e||^2 / p_e        (convexity; equal at D = 0)

and the right side is a ridge problem for each expert alone: it is to make up for its share of what its tokens lack.
Where each is no worse than its weights were, neither is their sum. Experts that do not fit into memory together are
fitted one lot after the other, each to what is then still missing, which keeps that promise.

Dimensions: k inputs, D the dense width, d the kept one. Matrices act from the right: u W.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from compress.calibration.processes import ALONE, Processes
from compress.calibration.statistics import EquationSums, InputSums, Regularized, regularized, rows
from compress.calibration.streams import Streams
from compress.models.branch import Branch, captured_inputs, set_bias, set_weight
from compress.models.factors import with_outputs
from compress.numerics.moments import InputMoments
from compress.numerics.ridge import NormalEquations


def with_constant(inputs: Sequence[Float[Tensor, "tokens _"]], *, bias: bool) -> Float[Tensor, "tokens k"]:
    """Concatenate inputs and, where there is a bias, a constant 1; a single input is not copied."""
    columns = [*inputs, inputs[0].new_ones(len(inputs[0]), 1)] if bias else inputs
    return columns[0] if len(columns) == 1 else torch.cat(list(columns), dim=1)


@dataclass
class LinearGroup(ABC):
    """Linears that are fitted together: what the compressed prefix gives them, what the dense model had.

    name: as a user should read it, "block 3 mlp writers".
    block: the block it is in; past the last one for the head.
    matrix: (k, targets); what the group now makes of u. A stage replaces it, `write` puts it into the linears.
    tokens: how many an expert was given; None for a group that all tokens pass.
    damping: how strongly the matrix was drawn toward what it was, in units of the mean of fit.G's diagonal; later
        stages judge changes by the same measure.
    processes: those that the equations come from; the first one decides.
    notes: what stages have to say about the group in the report.
    """

    name: str
    block: int
    branch: Branch
    fit: NormalEquations
    held_out: NormalEquations
    inputs: InputSums
    matrix: Float64[Tensor, "k m"]
    tokens: int | None = None
    damping: float = 0.01
    processes: Processes = ALONE
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def metric(self) -> Float64[Tensor, "m m"] | None:
        """S S^T, where an error e of the targets costs ||e S||^2; None where S is the identity."""
        return None

    @abstractmethod
    def write(self) -> None:
        """Put the matrix into the linears."""

    @abstractmethod
    def places(self) -> dict[str, slice]:
        """Slices of the group's inputs, by linear."""

    def moments(self, place: slice) -> InputMoments:
        """Moments of some of the inputs over all windows."""
        tokens = self.fit.tokens + self.held_out.tokens
        second = self.fit.G[place, place] / tokens
        if self.held_out.tokens:
            second += self.held_out.G[place, place] / tokens
        return InputMoments(second, self.inputs.total[place] / tokens, self.inputs.absolute[place] / tokens)

    def close(self) -> dict[str, Any]:
        """Return the group's report and free its matrices, the largest besides a block's weights."""
        wanted, nothing = len(self.fit.G), self.matrix.new_zeros(0, 0)
        self.fit = self.held_out = NormalEquations(nothing, nothing, 0.0)
        self.matrix = nothing
        tokens = {} if self.tokens is None else {"tokens": self.tokens, "wanted": wanted}
        return {"group": self.name, **tokens, **self.notes}


@dataclass
class Readers(LinearGroup):
    """The linears that read the stream through one norm; they hold their dense weights until `write`. m = D."""

    readers: Mapping[str, nn.Linear] = field(default_factory=dict)

    @property
    def metric(self) -> Float64[Tensor, "D D"]:
        """The metric by which an error of the map counts: what it does to the outputs of all linears together."""
        weights = [linear.weight.double() for linear in self.readers.values()]
        return torch.stack([W.T @ W for W in weights]).sum(0)

    def places(self) -> dict[str, slice]:
        width = len(self.matrix) - all_biased(self.readers.values())
        return dict.fromkeys(self.readers, slice(0, width))

    def write(self) -> None:
        has_bias = all_biased(self.readers.values())
        through = self.matrix[:-1] if has_bias else self.matrix
        for linear in self.readers.values():
            weight = linear.weight.double()
            if has_bias:
                set_bias(linear, linear.bias.double() + weight @ self.matrix[-1])
            set_weight(linear, weight @ through.T)


def all_biased(linears: Iterable[nn.Linear]) -> bool:
    """Whether a constant can be fitted: only if every linear has a bias to hold it."""
    return all(linear.bias is not None for linear in linears)


@dataclass
class Writers(LinearGroup):
    """The linears that write the stream, encoded already, and the shortcut before them where there is one. m = d."""

    def places(self) -> dict[str, slice]:
        places, start = {}, 0 if self.branch.shortcut is None else self.branch.shortcut.in_features
        for name, writer in self.branch.writers.items():
            assert isinstance(writer, nn.Linear)
            places[name] = slice(start, start + writer.in_features)
            start += writer.in_features
        return places

    def write(self) -> None:
        """Write the matrix; one writer gets the whole bias, since the stream takes in only the sum of all."""
        start = 0
        for linear in writer_linears(self.branch):
            set_weight(linear, self.matrix[start : start + linear.in_features].T)
            start += linear.in_features
        biases = [linear for linear in writer_linears(self.branch) if linear.bias is not None]
        for place, linear in enumerate(biases):
            set_bias(linear, self.matrix[-1] if place == 0 else torch.zeros_like(self.matrix[-1]))

    def unit_inputs(self, kind: str) -> Int64[Tensor, "units inputs"] | None:
        """The inputs of each unit of a kind; None where the branch has none."""
        if kind not in self.branch.units:
            return None
        units, count = self.branch.units[kind]
        place = self.places()[units.writer]
        return torch.arange(place.start, place.stop, device=self.matrix.device).view(count, -1)

    def keep(self, kind: str, kept: Int64[Tensor, "kept"]) -> None:
        """Delete all other units: from what produces them, from their writer and from the equations."""
        self.processes.follow(kept)
        units, count = self.branch.units[kind]
        inputs = self.unit_inputs(kind)
        assert inputs is not None
        gone = torch.ones(count, dtype=torch.bool, device=inputs.device)
        gone[kept] = False
        rest = torch.ones(len(self.matrix), dtype=torch.bool, device=inputs.device)
        rest[inputs[gone].flatten()] = False
        stay = rest.nonzero()[:, 0]
        self.matrix, self.fit, self.held_out = self.matrix[stay], self.fit.only(stay), self.held_out.only(stay)
        self.inputs = self.inputs.only(stay)
        writer = self.branch.writers[units.writer]
        columns = kept_rows(writer.weight.shape[1], 1, count, kept)
        set_weight(writer, writer.weight[:, columns])
        for name, stacks in units.readers:
            reader = self.branch.linear(name)
            rows = kept_rows(reader.out_features, stacks, count, kept)
            self.branch.replace_linear(name, with_outputs(reader, partial(torch.index_select, dim=0, index=rows)))
        self.branch.units = {**self.branch.units, kind: (units, len(kept))}


def writer_linears(branch: Branch) -> list[nn.Linear]:
    """The linears that write the stream after a branch, in the order of the group's inputs."""
    linears = [linear for linear in branch.writers.values() if isinstance(linear, nn.Linear)]
    return linears if branch.shortcut is None else [branch.shortcut, *linears]


def kept_rows(size: int, stacks: int, count: int, kept: Int64[Tensor, "kept"]) -> Int64[Tensor, "rows"]:
    """Indices of the rows of the kept units, where `size` rows are `stacks` times `count` units of adjacent rows."""
    rows = torch.arange(size, device=kept.device).view(stacks, count, -1)
    return rows[:, kept].flatten()


def writer_matrix(branch: Branch) -> Float64[Tensor, "k d"]:
    """Stack the weights of a branch's writers, then the sum of their biases."""
    linears = writer_linears(branch)
    rows = [linear.weight.double().T for linear in linears]
    biases = [linear.bias.double() for linear in linears if linear.bias is not None]
    if biases:
        rows.append(torch.stack(biases).sum(0, keepdim=True))
    return torch.cat(rows)


LOT_BYTES = 2**32  # of the equations of experts that are fitted together
SMALLEST_PART = 1e-12

Weigh = Callable[[Tensor], Tensor]  # the dense stream's tokens (n, D) to how much each counts (n, 1)


def chunks(experts: Sequence[Branch], targets: int) -> Iterator[range]:
    """Split the experts into chunks whose equations, held-out ones included, fit in memory together."""
    widest = max(writer_of(expert).in_features for expert in experts)
    size = max(1, LOT_BYTES // equation_bytes(widest, targets))
    for start in range(0, len(experts), size):
        yield range(start, min(start + size, len(experts)))


def gather_experts(
    branch: Branch, numbers: range, block: int, streams: Streams, weigh: Weigh, encode: Float64[Tensor, "D d"] | None
) -> list[tuple[Regularized, NormalEquations]]:
    """Gather the normal equations of some of a branch's experts, to fit on (with pseudo-tokens) and held out.

    encode: of the basis that the branch writes in, None for the dense one.
    """
    writers = [writer_of(branch.experts[number]) for number in numbers]
    matrices = [writer_matrix(branch.experts[number]) for number in numbers]
    sums = [EquationSums(len(matrix), matrix.shape[1], matrix.device) for matrix in matrices]
    for batch, stream, dense in streams.both():
        with captured_inputs(writers) as given:
            update = streams.update(branch, stream, batch, block)
        t = rows(dense)
        target, weights = t if encode is None else t @ encode.to(t.dtype), weigh(t)
        lacking = target - rows(branch.carried(stream) + update)
        for number, tokens, part in parts(branch, stream):
            if number not in numbers:
                continue
            place = number - numbers.start
            u = rows(given[place])
            meant = u @ matrices[place].to(u.dtype) + part * lacking[tokens]
            sums[place].add(u, meant, weights=weights[tokens] / part, held_out=batch.held_out)
    processes = streams.processes
    return [
        (regularized(its_sums, processes, matrix=matrix), its_sums.equations(processes, held_out=True))
        for its_sums, matrix in zip(sums, matrices, strict=True)
    ]


def parts(
    branch: Branch, stream: Float[Tensor, "*batch d"]
) -> list[tuple[int, Int64[Tensor, "n"], Float[Tensor, "n 1"]]]:
    """Yield each expert that is given tokens: its number, their indices and its routing weights."""
    assert branch.sparse is not None
    assert branch.norm is not None
    x = rows(branch.norm(stream))
    assigned = [(number, tokens, shares.to(x.dtype)) for number, tokens, shares in branch.sparse.assignments(x)]
    total = x.new_zeros(len(x), 1)
    for _, tokens, shares in assigned:
        total.index_add_(0, tokens, shares)
    return [(number, tokens, (shares / total[tokens]).clamp_min(SMALLEST_PART)) for number, tokens, shares in assigned]


def writer_of(expert: Branch) -> nn.Linear:
    (writer,) = expert.writers.values()
    assert isinstance(writer, nn.Linear)
    return writer


def short_of_tokens(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """Say which experts were given fewer tokens than their linears have inputs."""
    told: dict[str, tuple[int, int]] = {}
    for entry in reports:
        if "tokens" in entry:
            name = entry["group"].removesuffix(" writers") if "group" in entry else entry["linear"].rpartition(".")[0]
            told[name] = max((entry["tokens"], entry["wanted"]), told.get(name, (0, 0)), key=lambda pair: pair[1])
    short = {name: pair for name, pair in told.items() if pair[0] < pair[1]}
    if not short:
        return []
    least = min(short, key=lambda name: short[name][0])
    tokens, wanted = short[least]
    return [
        f"{len(short)} of {len(told)} experts saw fewer calibration tokens than they have inputs (the least, {least}: "
        f"{tokens:,} of {wanted:,}), and go the more by their weights alone. Use more --samples."
    ]


def lot_bytes(experts: int, inner: int, targets: int) -> int:
    one = equation_bytes(inner, targets)
    return min(experts * one, max(one, LOT_BYTES))


def equation_bytes(inner: int, targets: int) -> int:
    """Bytes of an expert's equations, to fit on and held out, in float64."""
    return 2 * 8 * inner * (inner + targets)
