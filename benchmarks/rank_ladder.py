"""Perplexity against rank: how far every matrix's rank can fall before the perplexity rises by 1%.

    python benchmarks/rank_ladder.py --model MODEL --calib CALIBRATION.txt --test TEST.txt

As LoRD (arXiv 2309.14021) shows it for code models: both MLP matrices of every block lose the same share of their rank;
beside it all linears. A row a reduction: the rise of the perplexity on held-out text in percent for each way. Last, the
largest reduction, in whole percent, with a rise of less than 1%, and what it leaves of the whole model's parameters, in
plain factors (where these are smaller than the matrix) and in pivot form, which is the same function.
"""

import argparse
from typing import Any

from lowrank_at_equal_size import WAYS, Bench

from compress.errors import UsageError
from compress.numerics.sums import full_precision
from compress.planning.prepare import Prepared

LADDER: dict[str, dict[str, Any]] = {
    "lord, MLPs": {"method": "lord", "form": "pivot", "target": ["mlp"]},
    "anchored, MLPs": {"method": "anchored", "gradient_weight": 0.9, "form": "pivot", "target": ["mlp"]},
    "lord, all": {"method": "lord", "form": "pivot"},
    "anchored, all": {"method": "anchored", "gradient_weight": 0.9, "form": "pivot"},
}
REDUCTIONS = (5, 10, 20, 30, 40, 50, 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--test", default="stdlib")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--windows", type=int, default=400)
    options = parser.parse_args()
    WAYS.update(LADDER)
    with full_precision():
        bench = Bench(options)
        dense = bench.dense()
        print(f"| rank reduction | {' | '.join(LADDER)} |")
        print(f"|---|{'---|' * len(LADDER)}")
        for reduction in REDUCTIONS:
            cells = [f"{rise(bench, way, reduction, dense):+.2f}%" for way in LADDER]
            print(f"| {reduction}% | {' | '.join(cells)} |", flush=True)
        print(f"| largest below 1% | {' | '.join(largest(bench, way, dense) for way in LADDER)} |", flush=True)


def planned(bench: Bench, way: str, reduction: int) -> Prepared:
    return bench.prepared(way, "uniform", {"rank_frac": 1 - reduction / 100, "multiple": 1}, None)


def rise(bench: Bench, way: str, reduction: int, dense: float) -> float:
    """Of the perplexity, in percent."""
    prepared = planned(bench, way, reduction)
    found = bench.walked(prepared, prepared.plan, bench.survey(prepared, way), 0.0)
    return 100 * (found.ppl / dense - 1)


def largest(bench: Bench, way: str, dense: float) -> str:
    """By bisection: the rise is taken to grow with the reduction."""
    low, high = 0, 95
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if rise(bench, way, middle, dense) < 1 else (low, middle)
    if low == 0:
        return "0%"
    shares = []
    for form in ("factors", "pivot"):
        WAYS["measured"] = {**WAYS[way], "form": form}
        try:
            size = planned(bench, "measured", low).plan.size
        except UsageError:  # no matrix is smaller in factors
            size = None
        shares.append(1.0 if size is None else size.parameters / bench.parameters)
    return f"{low}% (parameters {shares[0]:.0%} in factors, {shares[1]:.0%} in pivot form)"


if __name__ == "__main__":
    main()
