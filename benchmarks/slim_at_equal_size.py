"""Quantized and sparse models: perplexity and divergence from the dense model at honestly counted bits a weight.

    python benchmarks/slim_at_equal_size.py --model MODEL --calib CALIBRATION.txt --test TEST.txt

A row a way: bits a weight of the compressed linears, everything counted (scales, places of the kept weights, adapters),
stored as small as `compress slim` can (packed where nothing is pruned, compact where a pattern is or where the inputs
come in no whole groups, and for unstructured sparsity, which neither stores, packed, zeros included); perplexity on
held-out text, the excess ln(perplexity / dense), and the mean Kullback-Leibler divergence of the next token from the
dense model's, in nats.

All walks are made in this process, as `compress slim` makes them, but for the files that it writes and proves; what is
not compact is multiplied out to be measured. `--only` names a group of rows.
"""

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from compress.cli.quantize import FAST_ITERATIONS
from compress.datasets.windows import evaluation_windows
from compress.evaluation.windows import perplexity
from compress.models.hub import find_model
from compress.models.loading import load_model, load_tokenizer
from compress.numerics.sums import full_precision
from compress.planning.plan import Plan
from compress.planning.prepare import Job, new_walk, prepare
from compress.recipe import parse_recipe

Way = dict[str, Any]


def way(
    prune: Way | None = None, quantize: Way | None = None, adapt: Way | None = None, *, refit: bool = False, **rest: Any
) -> Way:
    return {"prune": prune, "quantize": quantize, "adapt": adapt, "refit": refit, **rest}


def rounded(method: str, bits: int, group: int | str, **rest: Any) -> Way:
    shared = {"group_size": group} if isinstance(group, int) else {"strategy": group}
    return {"method": method, "num_bits": bits, **shared, **rest}


def pruned(method: str, pattern: str, **rest: Any) -> Way:
    return {"method": method, "pattern": pattern, **rest}


GROUP = 64
OURS: Way = {"refit": True, "polish": 3, "center": True}
WHITENED: Way = {"method": "whitened", "rank": 0.1}
ROUNDS: Way = WHITENED | {"rounds": 3}
GPTQ = rounded("gptq", 4, "channel")


def quantizers(bits: int) -> dict[str, Way]:
    found = {}
    for method, group in (
        ("absmax", "tensor"),
        ("slim", "tensor"),
        ("absmax", "channel"),
        ("slim", "channel"),
        ("mse", "channel"),
        ("gptq", "channel"),
        ("absmax", GROUP),
        ("mse", GROUP),
        ("gptq", GROUP),
    ):
        found[f"{method}, {bits} bits, {shared(group)}"] = way(None, rounded(method, bits, group))
    for group in ("channel", GROUP, GROUP // 2):
        found[f"ours, {bits} bits, {shared(group)}"] = way(None, rounded("gptq", bits, group), **OURS)
    return found


def shared(group: int | str) -> str:
    return f"groups of {group}" if isinstance(group, int) else f"a {group}"


def pruners(pattern: str) -> dict[str, Way]:
    found = {f"{method}, {pattern}": way(pruned(method, pattern)) for method in ("magnitude", "wanda", "sparsegpt")}
    found[f"ADMM, {pattern}"] = way(pruned("admm", pattern), polish=3)
    return found | {f"ours, {pattern}": way(pruned("admm", pattern), **OURS)}


PAPER = way(pruned("wanda", "2:4"), rounded("slim", 4, "tensor"), {"method": "slim", "rank": 0.1})
TOGETHER: dict[str, Way] = {
    "SLiM: Wanda, SLiM-Quant^W, SLiM adapters 0.1": PAPER,
    "the same, naive adapters": PAPER | {"adapt": {"method": "naive", "rank": 0.1}},
    "the same, scales of channels": PAPER | {"quantize": rounded("slim", 4, "channel")},
    "SparseGPT + GPTQ, no adapters": way(pruned("sparsegpt", "2:4"), GPTQ),
    "SparseGPT + GPTQ, whitened adapters 0.1": way(pruned("sparsegpt", "2:4"), GPTQ, WHITENED),
    "the same, refitted, 3 rounds": way(pruned("sparsegpt", "2:4"), GPTQ, ROUNDS, **OURS),
    "ours, --fast": way(pruned("admm", "2:4", iterations=FAST_ITERATIONS), GPTQ, WHITENED, **OURS),
    "ours": way(pruned("admm", "2:4"), GPTQ, ROUNDS, **OURS),
    "ours, adapters 0.09": way(pruned("admm", "2:4"), GPTQ, ROUNDS | {"rank": 0.09}, **OURS),
    "ours, adapters in 4 bits": way(pruned("admm", "2:4"), GPTQ, ROUNDS | {"num_bits": 4}, **OURS),
    "ours, 50% anywhere": way(pruned("admm", "50%"), GPTQ, ROUNDS, **OURS),
}
UNPRUNED: dict[str, Way] = {
    "ours, 2:4 in 4 bits, no adapters": way(pruned("admm", "2:4"), GPTQ, **OURS),
    "ours, 3 bits unpruned": way(None, rounded("gptq", 3, "channel"), **OURS),
    "ours, 2:4 in 4 bits, adapters 0.1 in 4 bits": way(pruned("admm", "2:4"), GPTQ, ROUNDS | {"num_bits": 4}, **OURS),
    "ours, 3 bits unpruned, groups of 64": way(None, rounded("gptq", 3, GROUP), **OURS),
    "ours, 2:4 in 4 bits, adapters 0.1": way(pruned("admm", "2:4"), GPTQ, ROUNDS, **OURS),
    "ours, 2 bits unpruned, adapters 0.1": way(None, rounded("gptq", 2, "channel"), ROUNDS, **OURS),
    "ours, 4 bits unpruned": way(None, rounded("gptq", 4, "channel"), **OURS),
    "ours, 5 bits unpruned": way(None, rounded("gptq", 5, "channel"), **OURS),
}
GROUPS = {
    "quantizers": quantizers(4) | quantizers(3),
    "pruners": pruners("2:4") | pruners("50%"),
    "together": TOGETHER,
    "unpruned": UNPRUNED,
}


@dataclass(frozen=True)
class Found:
    bits: float
    ppl: float
    divergence: float
    seconds: float


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source = find_model(options.model)
        self.scratch = Path(tempfile.mkdtemp())
        tokenizer = load_tokenizer(self.source.whole_folder())
        self.windows = evaluation_windows(
            options.test, tokenizer, seq_len=options.seq_len, limit=options.windows, data_dir=None
        )
        self.dense = load_model(self.source.whole_folder(), dtype=torch.float32, device=torch.device("cpu"))
        self.dense_ppl = perplexity(self.dense, self.windows, dataset="test", batch_size=32).ppl

    def found(self, how: Way) -> Found:
        start = time.perf_counter()
        bits, form = self.bits(how), "compact" if is_compact(how) else "dense"
        with full_precision():
            prepared = prepare(self.job(how, form))
            plan, held_out = prepared.plan, prepared.job.recipe.held_out_windows
            walk = new_walk(prepared, plan.stages, prepared.windows, held_out, None)
            tensors = {name: tensor for part in walk.parts() for name, tensor in part.tensors.items()}
        seconds = time.perf_counter() - start
        model = AutoModelForCausalLM.from_config(plan.spec.config(torch.float32)).float().eval()
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        model.tie_weights()
        assert not unexpected
        assert all(name.endswith("lm_head.weight") for name in missing)
        ppl = perplexity(model, self.windows, dataset="test", batch_size=32).ppl
        return Found(bits, ppl, self.divergence(model), seconds)

    def bits(self, how: Way) -> float:
        if how["quantize"] is None and how["adapt"] is None and how["prune"]["pattern"].endswith("%"):
            return 16.0
        plan = self.plan(how)
        return plan.alternatives[0].bits_per_weight

    def plan(self, how: Way) -> Plan:
        return prepare(self.job(how, "compact" if is_compact(how) else "packed")).plan

    def job(self, how: Way, form: str) -> Job:
        calibration = {"source": self.options.calib, "samples": self.options.samples, "seq_len": self.options.seq_len}
        how = {name: part for name, part in how.items() if part is not None}
        stages = [{"stage": "refit"}] if how.pop("refit") else []
        stages.append({"stage": "slim", "form": form, **how})
        recipe = parse_recipe(
            {"method": "slim", "stages": stages, "calibration": calibration, "dtype": self.options.dtype}
        )
        out = Path(tempfile.mkdtemp(dir=self.scratch)) / "out"
        job = Job(model=self.source, recipe=recipe, out=out, command="", overwrite=True)
        job.partial.mkdir()
        return job

    @torch.inference_mode()
    def divergence(self, model: torch.nn.Module) -> float:
        total = 0.0
        for ids in self.windows.split(32):
            p, q = (each(input_ids=ids).logits.double().log_softmax(-1) for each in (self.dense, model))
            total += float((p.exp() * (p - q)).sum())
        return total / self.windows.numel()


def is_compact(how: Way) -> bool:
    """Where nothing else stores it small: a pattern, adapters in few bits, groups that do not divide the inputs."""
    if how["quantize"] is not None and "group_size" in how["quantize"]:
        return True
    grouped = how["prune"] is not None and ":" in how["prune"]["pattern"]
    return grouped or (how["adapt"] is not None and "num_bits" in how["adapt"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--test", default="stdlib")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--only", choices=GROUPS, action="append")
    bench = Bench(options := parser.parse_args())
    print(f"{bench.source.name}: dense perplexity {bench.dense_ppl:.3f}, scales and adapters in {options.dtype}\n")
    print("| way | bits a weight | perplexity | excess | divergence, nats | seconds |\n|---|---|---|---|---|---|")
    for name in options.only or GROUPS:
        for label, how in GROUPS[name].items():
            found = bench.found(how)
            excess = math.log(found.ppl / bench.dense_ppl)
            print(
                f"| {label} | {found.bits:.2f} | {found.ppl:.2f} | {excess:.3f} | {found.divergence:.4f} "
                f"| {found.seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
