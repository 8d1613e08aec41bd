"""Fit the experts of a mixture, each by the tokens that are routed to it.

**Statistics** of an expert's linears are of the tokens that reach it alone, each once for what reads the stream. What
writes it is given its inputs times the token's share, so that an error counts as it does in the stream. Those that have
too few are regularized (`statistics.py`).

**The anchored fit.** All experts' writers together are one least-squares problem of experts x inner unknown rows, too
wide to solve. A token whose experts have the shares p_e (1 in sum) lacks r toward the dense stream; with changes D_e,

    ||r - sum_e u_e D_e||^2  <=  sum_e ||p_e r - u_e D_e||^2 / p_e        (convexity; equal at D = 0)

and the right side is a ridge problem for each expert alone: it is to make up for its share of what its tokens lack.
Where each is no worse than its weights were, neither is their sum. Experts that do not fit into memory together are
fitted one lot after the other, each to what is then still missing, which keeps that promise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from compress.calibration.groups import writer_matrix
from compress.calibration.statistics import EquationSums, Regularized, regularized, rows
from compress.calibration.streams import Streams
from compress.models.branch import Branch, captured_inputs
from compress.numerics.ridge import NormalEquations

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
    branch: Branch,
    numbers: range,
    block: int,
    streams: Streams,
    weigh: Weigh,
    encode: Float64[Tensor, "D d"] | None,
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
        (regularized(its_sums, processes, matrix=matrix), its_sums.held_out(processes))
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
