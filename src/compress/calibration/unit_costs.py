"""Predict what the loss suffers when units of a branch are deleted: MLP neurons, or KV groups with their query heads.

A branch adds z W to the stream. With M = E g g^T the second moment of the loss's gradient by the stream there and
G = E z z^T, an error dW of the writer costs the loss, to second order and with z and g taken as independent (K-FAC,
arXiv 1503.05671),

    1/2 E (g . z dW)^2  =  1/2 tr dW^T G dW M

which is the quadratic that structured OBS minimizes (`numerics/obs.py`) for the writer W M^(1/2). One elimination a
block gives the cost of every count, down to the smallest that is asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import product

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from compress.calibration.processes import ALONE, Processes
from compress.calibration.statistics import EquationSums, rows
from compress.models.branch import Branch, captured_inputs
from compress.numerics.obs import elimination
from compress.numerics.ridge import cholesky, damped

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
        for units in self.watched:
            self.costs[cost_name(units.kind, index)] = self._costs(units)
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

    def _costs(self, watched: WatchedUnits) -> Float64[Tensor, "deleted"]:
        G = watched.inputs.moments(self.processes).second
        M = watched.gradient.moments(self.processes).second
        count, name = watched.branch.units[watched.kind][1], f"{watched.branch.name} writers"
        costs = G.new_zeros(1 + max(0, count - self.down_to[watched.kind]))
        if not (G.any() and M.any()):
            return costs
        W = watched.branch.scale * watched.writer.weight.double().T
        root = cholesky(damped(M, FLOOR), name=f"the loss's gradient at {name}")
        units = torch.arange(len(W), device=W.device).view(count, -1)
        found = elimination(W @ root, G, units, self.down_to[watched.kind], damping=DAMPING, name=name)
        costs[1:] = found.costs / 2
        self.processes.follow(costs)
        return costs
