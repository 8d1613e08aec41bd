"""Is a factorised Llama faster, not only smaller? Prefill and decoding, dense and factorised, interleaved.

    python benchmarks/lowrank_speed.py

A Llama of hidden size 1024 and 8 layers with random weights (times do not depend on them), and the model that
`compress lord` would write for it when so much of the block linears' parameters is kept, in pivot form and in plain
factors. Every round runs both once, in turns; stated is the median of the rounds' ratios dense / factorised, and the
range that holds the middle half of them. Above 1, factorised is faster. With --forms, pivot against factors at equal
ranks, where pivot has fewer numbers, and at equal parameters.
"""

import argparse
from typing import Any

import torch
from slicing_speed import SHAPES, described, paired, run_decode, run_prefill
from transformers import AutoModelForCausalLM, LlamaConfig

from compress import families
from compress.plan import make_plan
from compress.recipe import lowrank, parse_recipe

CALIBRATION = {"source": "stdlib"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--prefill", type=int, default=512, help="tokens")
    parser.add_argument("--decode", type=int, default=32, help="tokens, one at a time")
    parser.add_argument("--rank-frac", type=float, nargs="+", default=[0.6, 0.5, 0.35])
    options = parser.parse_args()
    config = LlamaConfig(**SHAPES["hidden 1024, 8 layers"], max_position_embeddings=1024)
    print("| rank | form | parameters | prefill, tokens/s | ratio | decode, tokens/s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for share in options.rank_frac:
        for form in ("pivot", "factors"):
            print(row(share, form, config, options), flush=True)


def row(share: float, form: str, config: LlamaConfig, options: argparse.Namespace) -> str:
    models = [model.eval() for model in (AutoModelForCausalLM.from_config(config), factorised(config, share, form))]
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    prefill = paired(models, lambda model: run_prefill(model, options.prefill), options.rounds)
    decode = paired(models, lambda model: run_decode(model, options.decode), options.rounds)
    speeds = [described(times, tokens) for times, tokens in ((prefill, options.prefill), (decode, options.decode))]
    return f"| {share} | {form} | {counts[1] / counts[0]:.2f} | {' | '.join(speeds)} |"


def factorised(config: LlamaConfig, share: float, form: str) -> Any:
    stages = lowrank("lord", {"rank_frac": share}, form=form, bias=False)
    recipe = parse_recipe({"method": "lord", "stages": stages, "calibration": CALIBRATION})
    family = families.find(config)
    plan = make_plan(recipe, config, family, dtype=torch.float32, computing=torch.float32, cache_memory=2**30)
    return AutoModelForCausalLM.from_config(plan.target.config(plan.shape, torch.float32))


if __name__ == "__main__":
    main()
