"""Perplexity of factorized models at equal parameters: every method with every allocation of its ranks.

    python benchmarks/lowrank_at_equal_size.py --model MODEL --calib CALIBRATION.txt --test TEST.txt

`--keep` is the share of the block linears' parameters that stays; biases count. For each share a row a way: parameters
of the whole model, how many linears are factorized, perplexity on held-out text, the excess ln(perplexity / dense), and
that as a share of LoRD's with uniform ranks. LoRD gets the better of one share of the parameters for each matrix, as
it is compared in the literature, and one share of each matrix's rank. `pivot` ways are the same methods in pivot form,
which keeps higher ranks in as many numbers. With --ranks, the ranks that the default came to.

All walks are made in this process, as `compress lord` makes them, but for the files that it writes and proves. The row
`anchored, auto` is what the default chooses, by its own trials on calibration text.
"""

import argparse
import math
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from compress.calibration.survey import Survey
from compress.datasets.windows import evaluation_windows
from compress.errors import UsageError
from compress.evaluation.windows import perplexity
from compress.models.hub import find_model
from compress.models.loading import load_model, load_tokenizer
from compress.numerics.sums import full_precision
from compress.planning import search
from compress.planning.budget import rank_choices
from compress.planning.plan import Plan
from compress.planning.prepare import Job, Prepared, new_walk, prepare, take_survey
from compress.progress import Steps, silent
from compress.recipe import parse_recipe

PAPERS = ("lord", "svd-llm", "asvd", "svd")
# What each way of factorizing is: its method and its options.
WAYS: dict[str, dict[str, Any]] = {method: {"method": method, "form": "factors"} for method in PAPERS}
WAYS |= {"lord, pivot": {"method": "lord"}}
WAYS |= {"anchored": {"method": "anchored", "gradient_weight": 0.9}}
WAYS |= {"anchored, no gradient": {"method": "anchored"}}
WAYS |= {"anchored, no refit": {"method": "anchored", "gradient_weight": 0.9, "refit": False}}
WAYS |= {"anchored, pivot": {"method": "anchored", "gradient_weight": 0.9, "form": "pivot"}}
WAYS |= {"anchored, factors": {"method": "anchored", "gradient_weight": 0.9, "form": "factors"}}
REFERENCE = "lord"
BLOCK = re.compile(r"\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Found:
    parameters: int
    ppl: float
    seconds: float
    ranks: dict[str, int]


class Bench:
    """One model and its texts; surveys are taken once for all ways that ask for the same."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source = find_model(options.model)
        self.scratch = Path(tempfile.mkdtemp())
        tokenizer = load_tokenizer(self.source.whole_folder())
        text = options.test
        self.windows = evaluation_windows(
            text, tokenizer, seq_len=options.seq_len, limit=options.windows, data_dir=None
        )
        self.parameters = self.prepared("lord", "uniform", {}, {"keep_params": 0.99}).plan.dense.parameters
        self.surveys: dict[str, Survey | None] = {}

    def dense(self) -> float:
        folder = self.source.whole_folder()
        return self.perplexity(load_model(folder, dtype=torch.float32, device=torch.device("cpu")))

    def perplexity(self, model: torch.nn.Module) -> float:
        return perplexity(model, self.windows, dataset="test", batch_size=32).ppl

    def prepared(self, way: str, allocation: str, amount: dict[str, Any], budget: dict[str, Any] | None) -> Prepared:
        how = dict(WAYS[way])
        refit = [{"stage": "refit"}] if how.pop("refit", how["method"] == "anchored") else []
        stages = [*refit, {"stage": "factorize", "allocation": allocation, **amount, **how}]
        calibration = {"source": self.options.calib, "samples": self.options.samples, "seq_len": self.options.seq_len}
        recipe = parse_recipe({"method": way, "stages": stages, "budget": budget, "calibration": calibration})
        out = Path(tempfile.mkdtemp(dir=self.scratch)) / "out"
        job = Job(model=self.source, recipe=recipe, out=out, command="", overwrite=True)
        job.partial.mkdir()
        return prepare(job)

    def survey(self, prepared: Prepared, way: str) -> Survey | None:
        """Taken once for all ways that measure outputs by the same and ask for as many passes."""
        how = WAYS[way]
        centering = how["method"] if how["method"] in ("lord", "anchored") else ""
        key = f"{centering} {how.get('gradient_weight')} {how.get('target')} {prepared.plan.survey}"
        if key not in self.surveys:
            self.surveys[key] = take_survey(prepared, lambda name: None)
        return self.surveys[key]

    def kept(self, share: float) -> dict[str, float]:
        """The budget, as a share of the whole model, that leaves so much of the blocks' linears."""
        plan = self.prepared("lord", "uniform", {}, {"keep_params": 0.99}).plan
        assert plan.ranks is not None
        blocks = sum(linear.m * linear.n for linear in plan.ranks.linears)
        return {"keep_params": 1 - (1 - share) * blocks / plan.dense.parameters}

    def attempts(self, way: str, allocation: str, share: float) -> Iterator[tuple[str, Found]]:
        """What an allocation comes to; `auto` gives all that it compares, then the one that its trials choose."""
        start = time.perf_counter()
        prepared = self.prepared(way, allocation, {}, self.kept(share))
        survey, plan = self.survey(prepared, way), prepared.plan
        assert plan.ranks is not None
        spectra = {} if survey is None else survey.spectra
        choices = rank_choices(plan.ranks, prepared.job.recipe.budget, plan.dense, spectra)
        if allocation != "auto":
            yield allocation, self.walked(prepared, plan.chosen(choices[0]), survey, start)
            return
        compared = replace(prepared, plan=replace(plan, choices=choices))
        steps = Steps(silent, "trials", len(choices))
        chosen = min(choices, key=lambda choice: search.try_out(compared, choice, survey, steps))
        best = str(chosen.label["allocation"])
        found = {}
        for choice in choices:
            start = time.perf_counter()
            found[str(choice.label["allocation"])] = self.walked(prepared, plan.chosen(choice), survey, start)
        yield from found.items()
        yield f"auto: {best}", found[best]

    def same_rank_share(self, share: float) -> Found:
        """LoRD with one share of each matrix's rank, the largest that keeps the budget."""
        limit = self.kept(share)["keep_params"]
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if self.fits(middle, limit) else (low, middle)
        start, prepared = time.perf_counter(), self.prepared("lord", "uniform", {"rank_frac": low}, None)
        return self.walked(prepared, prepared.plan, None, start)

    def fits(self, rank_frac: float, limit: float) -> bool:
        try:
            plan = self.prepared("lord", "uniform", {"rank_frac": rank_frac}, None).plan
        except UsageError:  # so high that no matrix would be smaller
            return False
        return plan.size is not None and plan.size.parameters <= limit * plan.dense.parameters

    def walked(self, prepared: Prepared, plan: Plan, survey: Survey | None, start: float) -> Found:
        held_out = prepared.job.recipe.held_out_windows
        walk = new_walk(replace(prepared, plan=plan), plan.stages, prepared.windows, held_out, survey)
        tensors = {name: tensor for part in walk.parts() for name, tensor in part.tensors.items()}
        seconds = time.perf_counter() - start
        model = AutoModelForCausalLM.from_config(plan.spec.config(torch.float32)).eval()
        left = model.load_state_dict(tensors, strict=False)
        assert not left.unexpected_keys
        model.tie_weights()
        assert plan.size is not None
        ranks = {path: factors.rank for path, factors in plan.spec.factors.items()}
        return Found(plan.size.parameters, self.perplexity(model), seconds, ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--test", default="stdlib")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--ranks", action="store_true", help="print the default's ranks")
    options = parser.parse_args()
    with full_precision():
        bench = Bench(options)
        dense = bench.dense()
        print("| blocks kept | way | allocation | parameters | factorized | perplexity | excess | of LoRD's | s |")
        print("|---|---|---|---|---|---|---|---|---|")
        print(f"| | dense | | {bench.parameters:,} | | {dense:.2f} | | | |", flush=True)
        for share in options.keep:
            compare(bench, share, dense, options)


def compare(bench: Bench, share: float, dense: float, options: argparse.Namespace) -> None:
    """All ways at one size, a row each."""
    paper = {allocation: found for allocation, found in bench.attempts(REFERENCE, "uniform", share)}
    paper["uniform in rank"] = bench.same_rank_share(share)
    reference = math.log(min(found.ppl for found in paper.values()) / dense)

    def show(way: str, allocation: str, found: Found) -> None:
        excess = math.log(found.ppl / dense)
        print(
            f"| {share:.1f} | {way} | {allocation} | {found.parameters:,} | {len(found.ranks)} | {found.ppl:.2f} "
            f"| {excess:.3f} | {excess / reference:.2f} | {found.seconds:.1f} |",
            flush=True,
        )

    for allocation, found in paper.items():
        show(REFERENCE, allocation, found)
    for way in options.ways:
        for asked in allocations(way):
            for allocation, found in bench.attempts(way, asked, share):
                show(way, allocation, found)
                if options.ranks and way == "anchored" and allocation.startswith("auto"):
                    print_ranks(found.ranks)


def allocations(way: str) -> list[str]:
    """Uniform first; what our method compares by trial in one go."""
    if WAYS[way]["method"] != "anchored":
        return [name for name in ("uniform", "energy", "fisher") if (way, name) != (REFERENCE, "uniform")]
    return ["uniform", "auto"] if WAYS[way].get("refit", True) else ["auto"]


def print_ranks(ranks: dict[str, int]) -> None:
    """A row a kind of linear, its ranks from the first block to the last; those that stay dense as a dash."""
    placed = {(match[2], int(match[1])): rank for path, rank in ranks.items() if (match := BLOCK.search(path))}
    blocks = range(max(block for _, block in placed) + 1)
    for name in dict.fromkeys(name for name, _ in placed):
        row = (str(placed.get((name, block), "-")) for block in blocks)
        print(f"    {name}: {', '.join(row)}", flush=True)


if __name__ == "__main__":
    main()
