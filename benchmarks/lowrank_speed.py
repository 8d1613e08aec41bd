"""Is a factorized Llama faster, not only smaller? Prefill and decoding, dense and factorized, interleaved.

    python benchmarks/lowrank_speed.py

A Llama of hidden size 1024 and 8 layers with random weights (times do not depend on them), and the model that
`compress lord` would write for it when so much of the block linears' parameters is kept, in pivot form and in plain
factors. Every round runs both once, in turns; stated is the median of the rounds' ratios dense / factorized, and the
range that holds the middle half of them. Above 1, factorized is faster.

With --forms, single linears instead: the time of plain factors over that of pivot form at the same rank, where pivot
form has fewer numbers but has to bring its outputs into order. Above 1, pivot form is faster.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from slicing_speed import SHAPES, described, paired, run_decode, run_prefill
from transformers import AutoModelForCausalLM, LlamaConfig

from compress import families
from compress.own_model.modeling_compress import LowRankLinear, PivotLinear
from compress.planning.memory import Room
from compress.planning.plan import make_plan
from compress.recipe import parse_recipe

CALIBRATION = {"source": "stdlib"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--prefill", type=int, default=512, help="tokens")
    parser.add_argument("--decode", type=int, default=32, help="tokens, one at a time")
    parser.add_argument("--rank-frac", type=float, nargs="+", default=[0.6, 0.5, 0.35])
    parser.add_argument("--forms", action="store_true")
    options = parser.parse_args()
    if options.forms:
        compare_forms(options.rounds)
        return
    config = LlamaConfig(**SHAPES["hidden 1024, 8 layers"], max_position_embeddings=1024)
    print("| rank | form | parameters | prefill, tokens/s | ratio | decode, tokens/s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for share in options.rank_frac:
        for form in ("pivot", "factors"):
            print(row(share, form, config, options), flush=True)


SHARES = (0.03, 0.06, 0.1, 0.125, 0.15, 0.2, 0.25)  # of m + n
TOKENS = (1, 16, 512)


def compare_forms(rounds: int) -> None:
    print(f"| m, n | rank of m + n | {' | '.join(f'{tokens} tokens' for tokens in TOKENS)} |")
    print(f"|---|---|{'---|' * len(TOKENS)}")
    for m, n in ((1024, 1024), (2816, 1024), (1024, 2816)):
        for share in SHARES:
            rank = int(share * (m + n))
            linears = [form(n, m, rank, False).eval() for form in (LowRankLinear, PivotLinear)]
            cells = [median_ratio(linears, torch.randn(tokens, n), rounds) for tokens in TOKENS]
            print(f"| {m}, {n} | {share} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)


def median_ratio(linears: list[Any], x: torch.Tensor, rounds: int) -> float:
    return statistics.median(pair[0] / pair[1] for pair in paired(linears, lambda linear: timed(linear, x), rounds))


@torch.inference_mode()
def timed(linear: Any, x: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(3):
        linear(x)
    return time.perf_counter() - start


def row(share: float, form: str, config: LlamaConfig, options: argparse.Namespace) -> str:
    models = [model.eval() for model in (AutoModelForCausalLM.from_config(config), factorized(config, share, form))]
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    prefill = paired(models, lambda model: run_prefill(model, options.prefill), options.rounds)
    decode = paired(models, lambda model: run_decode(model, options.decode), options.rounds)
    speeds = [described(times, tokens) for times, tokens in ((prefill, options.prefill), (decode, options.decode))]
    return f"| {share} | {form} | {counts[1] / counts[0]:.2f} | {' | '.join(speeds)} |"


def factorized(config: LlamaConfig, share: float, form: str) -> Any:
    stages = [{"stage": "factorize", "method": "lord", "rank_frac": share, "form": form, "bias": False}]
    recipe = parse_recipe({"method": "lord", "stages": stages, "calibration": CALIBRATION})
    family = families.find(config)
    plan = make_plan(recipe, config, family, dtype=torch.float32, computing=torch.float32, room=Room(1, 2**30))
    return AutoModelForCausalLM.from_config(plan.spec.config(torch.float32))


if __name__ == "__main__":
    main()
