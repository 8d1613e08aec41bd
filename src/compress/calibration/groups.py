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
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from compress.calibration.processes import ALONE, Processes
from compress.calibration.statistics import InputSums
from compress.models.branch import Branch, set_bias, set_weight
from compress.models.factors import with_outputs
from compress.numerics.lowrank import InputMoments
from compress.numerics.ridge import NormalEquations


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
