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

Dimensions: k inputs, D the dense width, d the kept one. Matrices act from the right: u W.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from compress.calibration.processes import ALONE, Processes
from compress.models.branch import Branch, set_bias, set_weight
from compress.models.factors import with_outputs
from compress.numerics.lowrank import InputMoments
from compress.numerics.ridge import NormalEquations
from compress.numerics.sums import TOKENS_AT_ONCE, GramSum, add_product, at_least_float32


@dataclass(frozen=True)
class InputSums:
    """Sums of u and of |u| over all windows."""

    total: Float64[Tensor, "k"]
    absolute: Float64[Tensor, "k"]

    def only(self, inputs: Tensor | slice) -> "InputSums":
        return InputSums(self.total[inputs], self.absolute[inputs])


class RunningEquations:
    """Running sums of u u^T and u t^T."""

    def __init__(self, inputs: int, targets: int, device: torch.device) -> None:
        self.G = GramSum(inputs, device)
        self.B = torch.zeros(inputs, targets, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, u: Float[Tensor, "tokens k"], t: Float[Tensor, "tokens m"], tokens: Float[Tensor, ""]) -> None:
        self.G.add(u)
        add_product(self.B, u, t)
        self.tokens += tokens

    def close(self, processes: Processes) -> NormalEquations:
        processes.add_up(self.G.total, self.B, self.tokens)
        return NormalEquations(self.G.close(), self.B, float(self.tokens))


class EquationSums:
    """Sums of u u^T and u t^T, separate for the windows to fit on and the held-out ones; of u and |u| over all.

    Each of them is asked for once, in all processes, when everything is added.

    fitted, seen: how many tokens there were in this process, of the windows to fit on and of all.
    """

    def __init__(self, inputs: int, targets: int, device: torch.device) -> None:
        self._new = partial(RunningEquations, inputs, targets, device)
        self._fit = self._new()
        self._total, self._absolute = torch.zeros(2, inputs, dtype=torch.float64, device=device)
        self.fitted = self.seen = 0

    @cached_property
    def _held_out(self) -> RunningEquations:
        """The held-out sums, allocated on first use: they are as large as the others."""
        return self._new()

    def add(
        self,
        u: Float[Tensor, "tokens k"],
        t: Float[Tensor, "tokens m"] | None,
        *,
        weights: Float[Tensor, "tokens 1"] | None = None,
        held_out: bool = False,
    ) -> None:
        """Add a batch, weighted by token: as if u and t were multiplied by the weight's square root."""
        self.seen += len(u)
        self.fitted += 0 if held_out else len(u)
        running = self._held_out if held_out else self._fit
        u = at_least_float32(u)
        t = u[:, :0] if t is None else t.to(u.dtype)
        roots = u.new_ones(len(u), 1) if weights is None else weights.to(u.dtype).sqrt()
        for inputs, targets, root in zip(*(x.split(TOKENS_AT_ONCE) for x in (u, t, roots)), strict=True):
            if weights is not None:
                inputs, targets = inputs * root, targets * root
            self._total += (root.T @ inputs)[0]
            self._absolute += (root.T @ inputs.abs())[0]
            running.add(inputs, targets, root.square().sum())

    def fit(self, processes: Processes) -> NormalEquations:
        return self._fit.close(processes)

    def held_out(self, processes: Processes) -> NormalEquations:
        return self._held_out.close(processes)

    def inputs(self, processes: Processes) -> InputSums:
        processes.add_up(self._total, self._absolute)
        return InputSums(self._total, self._absolute)

    def moments(self, processes: Processes) -> InputMoments:
        """Moments of the inputs over the windows to fit on."""
        return mean_moments(self.fit(processes), self.inputs(processes))


def mean_moments(fit: NormalEquations, inputs: InputSums) -> InputMoments:
    """Means over tokens, from sums; the second moment takes the place of fit.G."""
    return InputMoments(fit.G.div_(fit.tokens), inputs.total / fit.tokens, inputs.absolute / fit.tokens)


def with_constant(inputs: Sequence[Float[Tensor, "tokens _"]], *, bias: bool) -> Float[Tensor, "tokens k"]:
    """Concatenate inputs and, where there is a bias, a constant 1; a single input is not copied."""
    columns = [*inputs, inputs[0].new_ones(len(inputs[0]), 1)] if bias else inputs
    return columns[0] if len(columns) == 1 else torch.cat(list(columns), dim=1)


@dataclass
class LinearGroup(ABC):
    """
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

    def moments(self, place: slice) -> InputMoments:
        """Moments of some of the inputs over all windows."""
        return input_moments(self.fit, self.held_out, self.inputs, place)

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
        """Slices of the group's inputs, by linear."""
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


def input_moments(fit: NormalEquations, held_out: NormalEquations, sums: InputSums, place: slice) -> InputMoments:
    tokens = fit.tokens + held_out.tokens
    second = fit.G[place, place] / tokens
    if held_out.tokens:
        second += held_out.G[place, place] / tokens
    return InputMoments(second, sums.total[place] / tokens, sums.absolute[place] / tokens)


def all_biased(linears: Iterable[nn.Linear]) -> bool:
    """Whether a constant can be fitted: only if every linear has a bias to hold it."""
    return all(linear.bias is not None for linear in linears)


@dataclass
class Writers(LinearGroup):
    """The linears that write the stream, encoded already, and the shortcut before them where there is one. m = d."""

    def places(self) -> dict[str, slice]:
        """Slices of the group's inputs, by writer."""
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
        linear, start = self.branch.writers[units.writer], 0
        for other in writer_linears(self.branch):
            if other is linear:
                break
            start += other.in_features
        assert isinstance(linear, nn.Linear)
        inputs = torch.arange(start, start + linear.in_features, device=self.matrix.device)
        return inputs.view(count, -1)

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
