"""Is a sliced Llama faster, not only smaller? Prefill and decoding, dense and sliced, interleaved in one process.

    python benchmarks/slicing_speed.py

For two shapes, that of a small model (hidden 128, 4 layers) and a wider one (hidden 1024, 8 layers), the dense model
and the stock model that `compress slice` would write for it: 25% of the hidden size deleted, and 75% of the parameters
kept. Weights are random, times do not depend on them. Each round runs both once, in turns; stated is the median of the
rounds' ratios dense / sliced, and the range that holds the middle half of them. Above 1, sliced is faster.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from compress import families, presets
from compress.planning.memory import Room
from compress.planning.plan import make_plan
from compress.recipe import parse_recipe

SHAPES: dict[str, dict[str, int]] = {
    "hidden 128, 4 layers": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 336,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "hidden 1024, 8 layers": {
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}
KEEP = presets.load("anchored")  # three quarters of the parameters
AMOUNTS: dict[str, dict[str, Any]] = {
    "ratio 0.25": {
        "stages": [
            each | ({"ratio": 0.25} if each["stage"] == "slice" else {})
            for each in KEEP["stages"]
            if each["stage"] != "prune_units"
        ]
    },
    "keep 0.75": {"stages": KEEP["stages"], "budget": KEEP["budget"]},
}
CALIBRATION = {"source": "stdlib"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--prefill", type=int, default=512, help="tokens")
    parser.add_argument("--decode", type=int, default=32, help="tokens, one at a time")
    options = parser.parse_args()
    print("| model | sliced to | parameters | prefill, tokens/s | ratio | decode, tokens/s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        config = LlamaConfig(**shape, max_position_embeddings=1024)
        for amount, how in AMOUNTS.items():
            print(row(name, amount, config, sliced_config(config, how), options), flush=True)


def sliced_config(config: LlamaConfig, how: dict[str, Any]) -> Any:
    """What would be written; of the shapes that a budget allows, the one in the middle."""
    recipe = parse_recipe({"method": "anchored", "calibration": CALIBRATION, **how})
    family = families.find(config)
    plan = make_plan(recipe, config, family, dtype=torch.float32, computing=torch.float32, room=Room(1, 2**30))
    spec = plan.choices[len(plan.choices) // 2].spec if plan.choices else plan.spec
    return spec.config(torch.float32)


def row(name: str, amount: str, config: Any, narrow: Any, options: argparse.Namespace) -> str:
    models = [AutoModelForCausalLM.from_config(one).eval() for one in (config, narrow)]
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    prefill = paired(models, lambda model: run_prefill(model, options.prefill), options.rounds)
    decode = paired(models, lambda model: run_decode(model, options.decode), options.rounds)
    speeds = [described(times, tokens) for times, tokens in ((prefill, options.prefill), (decode, options.decode))]
    shape = f"{amount}: hidden {narrow.hidden_size}, MLP {narrow.intermediate_size}"
    return f"| {name} | {shape} | {counts[1] / counts[0]:.2f} | {' | '.join(speeds)} |"


def described(times: list[tuple[float, float]], tokens: int) -> str:
    dense, sliced = (statistics.median(pair[side] for pair in times) for side in (0, 1))
    ratios = sorted(pair[0] / pair[1] for pair in times)
    quarter = len(ratios) // 4
    spread = f"{ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f}"
    return f"{tokens / dense:,.0f}, {tokens / sliced:,.0f} | {statistics.median(ratios):.2f} ({spread})"


def paired(models: list[Any], run: Any, rounds: int) -> list[tuple[float, float]]:
    """Seconds of both, round by round, the first of each round by turns; one round before for warming up."""
    for model in models:
        run(model)
    times = []
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        taken = {side: run(models[side]) for side in order}
        times.append((taken[0], taken[1]))
    return times


@torch.inference_mode()
def run_prefill(model: Any, tokens: int) -> float:
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    return time.perf_counter() - start


@torch.inference_mode()
def run_decode(model: Any, tokens: int) -> float:
    """After a prompt of 64 tokens, which is not counted."""
    cache = model(input_ids=torch.zeros(1, 64, dtype=torch.int64), use_cache=True).past_key_values
    next_id = torch.zeros(1, 1, dtype=torch.int64)
    start = time.perf_counter()
    for _ in range(tokens):
        cache = model(input_ids=next_id, past_key_values=cache, use_cache=True).past_key_values
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
