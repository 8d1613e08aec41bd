"""What the commands cost, in forward passes of their calibration windows.

    python benchmarks/cost.py
    python benchmarks/cost.py --model MODEL --calib wikitext2 --data-dir DATA --samples 32 --seq-len 512 \\
        --write docs/benchmarks.md

Every row is one command in a process of its own, as a user runs it; its seconds are the whole run's without imports, by
kind of work. Beside each row, before and after it, a plain forward pass of the same windows is timed (float32, without
the head), so that rows compare across machines and hours. The limit is what the
row's forward and backward passes and products of activations would take at the rate of a matrix product timed in the
same run: no arrangement of the same arithmetic is faster. A step of `finetune`, on the last result, stands beside the
plain forward and backward pass of its tokens (finetune_cost.py).
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import finetune_cost
import marked
import torch
from transformers import AutoModelForCausalLM

from compress.calibration.survey import survey_samples
from compress.datasets.windows import calibration_windows
from compress.models.hub import find_model
from compress.models.loading import load_config, load_tokenizer

COMPRESS = Path(sys.executable).with_name("compress")
KINDS = ("depth", "survey", "trials", "forward", "statistics", "solve", "eigensolve", "rotate", "write", "verify")


@dataclass(frozen=True)
class Row:
    """
    at_most, goal: passes. forwards: of the streams, over all windows. survey: whether it makes a pass backward.
    trials: walks over a quarter of the windows. anchored: whether it gathers normal equations for every linear.
    """

    label: str
    words: tuple[str, ...]
    at_most: float
    goal: float
    forwards: int = 3
    survey: bool = False
    trials: int = 0
    anchored: bool = True


ROWS = [
    Row("slicegpt", ("slice", "--method", "slicegpt", "--ratio", "0.25"), 2.3, 1.8, forwards=1, anchored=False),
    Row("fixed", ("slice", "--ratio", "0.125", "--mlp-ratio", "0.51"), 8, 6, survey=True),
    Row("slice", ("slice", "--keep-params", "0.8"), 14, 10, survey=True, trials=3),
    Row("bits", ("slim", "--bits", "3", "--sparsity", "none", "--adapter-rank", "0", "--group", "64"), 7, 5),
    Row("lord", ("lord", "--keep-params", "0.8"), 12, 9, survey=True),
    Row("slim", ("slim",), 14, 10),
]
STEP = "finetune"  # the row's label
MOST_OF_STEP = 1.3  # plain forward and backward passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--data-dir")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    labels = [*(row.label for row in ROWS), STEP]
    parser.add_argument("--rows", nargs="+", choices=labels, default=labels)
    parser.add_argument("--keep", type=Path, help="a folder to leave the results in")
    parser.add_argument("--write", type=Path, help="the document to write the table into")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(Bench(options, options.keep or Path(scratch)))


def measure(bench: "Bench") -> None:
    options = bench.options
    lines = [
        "| command | seconds | passes | at most (goal) | limit | seconds by kind of work |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        if row.label in options.rows:
            lines.append(bench.row(row))
            print(lines[-1], flush=True)
    if STEP in options.rows:
        lines.append(bench.step())
        print(lines[-1], flush=True)
    if options.write:
        marked.write(f"{bench.heading()}\n\n" + "\n".join(lines) + "\n", options.write, f"cost of {bench.name}")


class Bench:
    """
    place: the folder for the results. made: the last of them.
    """

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options, self.place, self.made = options, place, place
        source = find_model(options.model)
        # A link keeps its own name.
        self.name, folder = Path(options.model).name, source.whole_folder()
        if options.write:
            marked.check(options.write, f"cost of {self.name}")
        self.config = load_config(folder)
        self.windows = calibration_windows(
            options.calib,
            load_tokenizer(folder),
            num_samples=options.samples,
            seq_len=options.seq_len,
            seed=42,
            data_dir=None if options.data_dir is None else Path(options.data_dir),
        )
        self.folder = folder
        self.passes = [self.forward_pass()]
        self.rate = matrix_rate(self.config.hidden_size)

    def heading(self) -> str:
        options, words = self.options, sys.argv[1:]
        text = " ".join(
            f"docs/{Path(word).name}" if before == "--write" else word for before, word in pairwise(["", *words])
        )
        return (
            f"Date: {date.today()}. Python {platform.python_version()}, torch {version('torch')}, transformers "
            f"{version('transformers')}, {torch.get_num_threads()} cores. {self.name}, {options.samples} windows of "
            f"{options.seq_len} tokens; a forward pass took {min(self.passes):.1f} to {max(self.passes):.1f} s, matrix "
            f"products run at {self.rate / 1e9:.0f} GFLOP/s.\n\n    python benchmarks/cost.py {text}"
        )

    def forward_pass(self) -> float:
        """Seconds of a plain forward pass over all windows, in a process of its own."""
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            torch.save(self.windows, file.name)
            command = [sys.executable, str(Path(__file__)), "--forward-pass", str(self.folder), file.name]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return float(printed.splitlines()[-1])

    def row(self, row: Row) -> str:
        self.made = self.place / row.label
        said = self.compress(*row.words, "--out", str(self.made), "--overwrite")
        self.passes.append(self.forward_pass())
        unit, seconds = (self.passes[-2] + self.passes[-1]) / 2, said["seconds"]
        kinds = {kind: seconds.get(kind, 0.0) for kind in KINDS}
        kinds["other"] = seconds["total"] - sum(kinds.values())
        parts = ", ".join(f"{kind} {value:.0f}" for kind, value in kinds.items() if value >= 0.5)
        return (
            f"| `{' '.join(row.words)}` | {seconds['total']:.0f} | {seconds['total'] / unit:.1f} | "
            f"{row.at_most:g} ({row.goal:g}) | {self.flops(row) / self.rate / unit:.1f} | {parts} |"
        )

    def step(self) -> str:
        """Of a training step on the last result, in place of passes over the calibration windows."""
        found = finetune_cost.measure(self.made, batch_size=4, seq_len=self.options.seq_len)
        return (
            f"| `finetune`, a step on the last result | {found['step_seconds']:.1f} | {found['ratio']:.2f} forward "
            f"and backward | {MOST_OF_STEP:g} | | trained: {found['trained']}; with the looks at held-out windows "
            f"{found['run_ratio']:.2f} |"
        )

    def compress(self, *words: str) -> dict[str, Any]:
        options = self.options
        text = ["--calib", options.calib, "--samples", str(options.samples), "--seq-len", str(options.seq_len)]
        data = ["--data-dir", options.data_dir] if options.data_dir else []
        command = [str(COMPRESS), *words, "--model", options.model, *text, *data, "--json"]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return found

    def flops(self, row: Row) -> float:
        """Of a row's passes and products of activations, at the dense model's widths."""
        config, tokens = self.config, self.windows.numel()
        shapes = [tuple(p.shape) for p in meta_block_parameters(config) if p.ndim == 2]
        blocks, width, head = config.num_hidden_layers, config.hidden_size, config.vocab_size * config.hidden_size
        forward = 2.0 * tokens * blocks * sum(m * n for m, n in shapes)
        walk = row.forwards * forward
        if row.anchored:
            inputs = {n for _, n in shapes}
            readers, writers = 2 * width * (width / 2 + width), sum(2 * k * (k / 2 + width) for k in inputs)
            walk += tokens * blocks * (2 * readers + max(writers, 2 * readers))
        else:
            walk += tokens * blocks * 2 * width * width
        share = survey_samples(*self.windows.shape, width) / len(self.windows)
        survey = share * (3 * forward + 3 * 2.0 * tokens * head) if row.survey else 0.0
        return walk * (1 + row.trials / 4) + survey


def meta_block_parameters(config: Any) -> list[torch.nn.Parameter]:
    """The parameters of one decoder block, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return list(blocks[0].parameters())


def matrix_rate(width: int) -> float:
    """Floating-point operations a second of a float32 product as wide as the model's."""
    A, B = torch.randn(4096, width), torch.randn(width, 4 * width)
    A @ B
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 1:
        A @ B
        count += 1
    return count * 2 * A.numel() * B.shape[1] / (time.perf_counter() - start)


@torch.no_grad()
def time_forward(folder: str, file: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().base_model
    windows = torch.load(file, weights_only=True)
    model(windows[:1], use_cache=False)
    start = time.perf_counter()
    for batch in windows.split(max(1, 2048 // windows.shape[1])):
        model(batch, use_cache=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    if "--forward-pass" in sys.argv:
        print(time_forward(*sys.argv[2:4]))
    else:
        main()
