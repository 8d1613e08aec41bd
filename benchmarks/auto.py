"""One size, the best model of it: `compress auto` beside the best single type and other GGUF files.

    python benchmarks/auto.py --model MODEL --calib CALIBRATION --test TEST --sizes 0.35 0.5 88.2MB \\
        [--for transformers] [--data-dir DATA] [--types Q3_K_S Q4_K_M ...] [--files Q3_K_S.gguf ...] \\
        [--write docs/benchmarks.md]

Sizes are bytes, or shares of the model's in 16 bits. For each: the best of our results of a single type that is no
larger (`compress quantize --type`, or --bits and --group; all of --types are made), the best of --files, such as
llama-quantize's, and `compress auto`, each measured by `compress eval` as its divergence from the dense model on the
test text; seconds are the run's without imports, and in forward passes of the calibration windows without the head.
Before the table, how well the survey predicts: over single matrices in their smallest type, the rank correlation
(Spearman) of predicted and measured divergence.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import marked
import torch
from real_model import pass_seconds
from transformers import AutoModelForCausalLM

from compress import presets
from compress.cli.options import parse_size
from compress.datasets.windows import calibration_windows
from compress.models.hub import find_model
from compress.models.loading import load_config, load_tokenizer
from compress.numerics.grids import QuantizationArgs
from compress.numerics.sums import full_precision
from compress.planning.prepare import Job, new_rounded_model, plan_job, prepare, take_survey
from compress.planning.types import TypeSearch, TypeSpace
from compress.recipe import Budget, parse_recipe

COLUMNS = ["size", "file", "bytes", "divergence, nats", "of the best single type's", "seconds", "forward passes"]
LABEL = "auto"
INTEGERS = tuple(f"int{bits}-{group}" for bits in (2, 3, 4, 5, 6, 8) for group in ("g32", "g128"))
TYPES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_0", "IQ4_XS", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_M", "Q6_K", "Q8_0")
MOST_MATRICES = 40  # whose divergence is measured one by one


class Bench:
    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch, self.is_gguf = options, scratch, options.engine == "llama.cpp"
        self.folder = find_model(options.model).whole_folder()
        self.data = [] if options.data_dir is None else ["--data-dir", options.data_dir]
        self.text = ["--calib", options.calib, "--samples", options.samples, "--seq-len", options.seq_len, *self.data]
        self.unit = pass_seconds(self.folder, self.windows(), at_once=8192)

    def compress(self, *words: object) -> Any:
        command = [sys.executable, "-m", "compress", *map(str, words), "--json"]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    def windows(self) -> torch.Tensor:
        options = self.options
        return calibration_windows(
            options.calib,
            load_tokenizer(self.folder),
            num_samples=options.samples,
            seq_len=options.seq_len,
            seed=42,
            data_dir=options.data_dir,
        )

    def made(self, name: str, *words: object) -> dict[str, Any]:
        out = self.scratch / name
        found = self.compress(*words, "--model", self.options.model, *self.text, "--out", out)
        seconds = found["seconds"]
        return self.measured(out / f"{name}.gguf" if self.is_gguf else out) | {
            "seconds": seconds["total"],
            "kinds": seconds,
        }

    def measured(self, file: Path) -> dict[str, Any]:
        options = self.options
        texts = ["--kl", options.model, "--ppl", options.test, "--seq-len", options.seq_len, "--limit", options.windows]
        found = self.compress("eval", "--model", file, *texts, *self.data)
        files = file.glob("*.safetensors") if file.is_dir() else [file]
        size = sum(each.stat().st_size for each in files)
        return {"name": file.stem, "bytes": size, "kl": found["divergence"][0]["kl"]}

    def single(self, name: str) -> dict[str, Any]:
        """All matrices in one type, the linears alone where it is of integers."""
        if self.is_gguf:
            return self.made(name, "quantize", "--type", name)
        kind = QuantizationArgs.of_name(name)
        return self.made(name, "quantize", "--bits", kind.num_bits, "--group", kind.group_size or "channel")

    def row(self, size: int, found: dict[str, Any], single: float) -> list[str]:
        cost = [f"{found['seconds']:.0f}", f"{found['seconds'] / self.unit:.1f}"] if "seconds" in found else ["", ""]
        told = [f"{size:,}", found["name"], f"{found['bytes']:,}", f"{found['kl']:.5f}", f"{found['kl'] / single:.2f}"]
        sys.stderr.write(" | ".join([*told, *cost, json.dumps(found.get("kinds"))]) + "\n")
        return [*told, *cost]

    def rows(self) -> list[list[str]]:
        options = self.options
        singles = [self.single(name) for name in options.types or (TYPES if self.is_gguf else INTEGERS)]
        others = [self.measured(file) for file in options.files]
        found = []
        for size in map(self.bytes_of, options.sizes):
            fitting = [each for each in singles if each["bytes"] <= size]
            best = min(fitting, key=lambda each: each["kl"]) if fitting else None
            auto = self.made(f"auto-{size}", "auto", "--target-size", size, "--for", options.engine, *options.auto)
            assert auto["bytes"] <= size
            single = auto["kl"] if best is None else best["kl"]
            rest = sorted((each for each in others if each["bytes"] <= size), key=lambda each: each["kl"])
            found += [self.row(size, each, single) for each in (best, *rest[:1], auto) if each is not None]
        return found

    def bytes_of(self, size: str) -> int:
        if not size.replace(".", "").isdigit() or float(size) > 1:
            return parse_size(size, "--sizes")
        model = AutoModelForCausalLM.from_pretrained(self.folder)
        return int(float(size) * 2 * sum(parameter.numel() for parameter in model.parameters()))

    def correlation(self) -> str:
        options, out = self.options, self.scratch / "correlation"
        calibration = {"source": options.calib, "samples": options.samples, "seq_len": options.seq_len}
        data = presets.load("auto" if self.is_gguf else "auto-packed") | {"calibration": calibration}
        if not self.is_gguf:
            data["stages"][-1]["quantize"]["engine"] = options.engine
        recipe = parse_recipe(data)
        job = Job(model=find_model(options.model), recipe=recipe, out=out, command="", data_dir=options.data_dir)
        with full_precision():
            plan = plan_job(job, self.folder, load_config(self.folder))
            budget = Budget(target_size=TypeSpace.of(plan, self.folder, job.output_name).least)
            job = replace(job, recipe=recipe.model_copy(update={"budget": budget}))
            prepared = prepare(job)
            job.partial.mkdir()
            survey = take_survey(prepared, lambda _name: None)
            assert prepared.types is not None
            assert survey is not None
            costs, model = TypeSearch.of(prepared.types, survey.roundings).costs, new_rounded_model(prepared, survey)
            paths = [*costs][:: max(1, len(costs) // MOST_MATRICES)]
            smallest = {path: next(iter(costs[path])) for path in paths}
            predicted = [costs[path][name] for path, name in smallest.items()]
            measured = [model.divergence({path: name}) for path, name in smallest.items()]
        ranks = torch.stack([torch.tensor(each).argsort().argsort().double() for each in (predicted, measured)])
        ratios = torch.tensor(measured) / torch.tensor(predicted)
        low, middle, high = ratios.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        return (
            f"Of {len(paths)} matrices alone in their smallest type, predicted and measured divergence have a rank "
            f"correlation of {float(torch.corrcoef(ranks)[0, 1]):.2f}; measured over predicted: {low:.2f}, "
            f"{middle:.2f}, {high:.2f} (10%, 50%, 90%)."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", default="wikitext2")
    parser.add_argument("--test", default="wikitext2")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--sizes", nargs="+", default=["0.25", "0.35", "0.5"])
    parser.add_argument("--for", dest="engine", default="llama.cpp", choices=["llama.cpp", "vllm", "transformers"])
    parser.add_argument("--types", nargs="*")
    parser.add_argument("--files", nargs="*", type=Path, default=[])
    parser.add_argument(
        "--auto", nargs="*", default=[], help="more options of compress auto, such as --auto=--trials=0"
    )
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        said = bench.correlation()
        table = [COLUMNS, ["---"] * len(COLUMNS), *bench.rows()]
    text = "\n".join(
        [f"{Path(options.model).name}, for {options.engine}. {said}", "", *(f"| {' | '.join(row)} |" for row in table)]
    )
    sys.stdout.write(text + "\n")
    if options.write:
        marked.write(text + "\n", options.write, LABEL if bench.is_gguf else f"{LABEL}-{options.engine}")


if __name__ == "__main__":
    main()
