"""Every method, the papers' and ours, as a user runs it: quality, size, time, memory and speed, written into the docs.

    python benchmarks/all_methods.py --write docs/benchmarks.md --plots docs/plots demo
    python benchmarks/all_methods.py --write docs/benchmarks.md --plots docs/plots NAME=MODEL,CALIB.txt,TEST.txt ...

Each row is one `compress` command in a process of its own, then `compress eval` of what it wrote.
Ours gets no more parameters than the paper's method of the same kind (no more bits, where weights are stored in few):
excess is ln(perplexity / dense). Memory is the most that a process of the run held, the proof's included. `--write`
replaces the text between the marks; `--plots` draws size against perplexity beside it.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import marked

COMPRESS = Path(sys.executable).with_name("compress")
COLUMNS = [
    "way",
    "parameters",
    "bytes",
    "perplexity",
    "excess",
    "divergence, nats",
    "same token",
    "seconds",
    "memory",
]


@dataclass(frozen=True)
class Way:
    """
    like: the way whose share of the parameters this one may keep, by `--keep-params`.
    """

    label: str
    words: Sequence[str]
    like: str | None = None


WAYS = [
    Way("SliceGPT, 25%", ["slice", "--method", "slicegpt", "--ratio", "0.25"]),
    Way("slice, as many parameters", ["slice"], like="SliceGPT, 25%"),
    Way("LoRD, 60% of the rank", ["lord", "--method", "lord", "--form", "factors", "--rank-frac", "0.6"]),
    Way("lord, as many parameters", ["lord"], like="LoRD, 60% of the rank"),
    Way("SLiM, 2:4 in 4 bits, adapters 0.1", ["slim", "--method", "slim", "--compact"]),
    Way("slim, 2:4 in 4 bits, adapters 0.09", ["slim", "--adapter-rank", "0.09", "--compact"]),
    Way("slim, the same, adapters in 4 bits", ["slim", "--compact", "--set", "slim.adapt.num_bits=4"]),
    Way("slim, 4 bits", ["slim", "--sparsity", "none", "--adapter-rank", "0"]),
    Way("slim, 3 bits", ["slim", "--bits", "3", "--sparsity", "none", "--adapter-rank", "0"]),
    Way("slice, then slim, 4 bits, in one walk", ["run", "slice-then-slim"]),
    Way("lord, then slim, 4 bits, in one walk", ["run", "lord-then-slim"]),
]


@dataclass(frozen=True)
class Subject:
    name: str
    model: str
    calibration: str
    test: str

    @staticmethod
    def parse(text: str) -> "Subject":
        if text == "demo":
            return Subject("demo", "demo", "stdlib", "stdlib")
        name, _, rest = text.partition("=")
        model, calibration, test = rest.split(",")
        return Subject(name, model, calibration, test)


@dataclass(frozen=True)
class Ran:
    said: dict[str, Any]
    peak: int


def compress(*words: object) -> Ran:
    """A command in a process of its own: what it said as JSON, and the most bytes that it or a child of it held."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([str(COMPRESS), *map(str, words), "--json"], stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"compress {' '.join(map(str, words))}: exit code {process.returncode}")
        out.seek(0)
        return Ran(json.load(out), usage.ru_maxrss * 1024)


class Bench:
    def __init__(self, subject: Subject, options: argparse.Namespace, scratch: Path) -> None:
        self.subject = subject
        self.options = options
        self.scratch = scratch
        self.kept: dict[str, float] = {}
        self.dense = self.quality(subject.model)

    def quality(self, model: object) -> dict[str, Any]:
        window = ["--seq-len", self.options.seq_len, "--limit", self.options.windows]
        words = ["--ppl", self.subject.test, "--kl", self.subject.model, *window]
        saved = ["--save"] if isinstance(model, Path) else []
        return compress("eval", "--model", model, *words, *saved).said

    def row(self, number: int, way: Way) -> list[str]:
        out, options, subject = self.scratch / subject_file(self.subject, number), self.options, self.subject
        data = ["--calib", subject.calibration, "--samples", options.samples, "--seq-len", options.seq_len]
        share = [] if way.like is None else ["--keep-params", self.kept[way.like]]
        start = time.perf_counter()
        ran = compress(*way.words, *share, "--model", subject.model, *data, "--out", out)
        seconds = time.perf_counter() - start
        self.kept[way.label] = math.floor(10_000 * ran.said["parameters"] / ran.said["dense_parameters"]) / 10_000
        found = self.quality(out)
        ppl, divergence = found["perplexity"][0]["ppl"], found["divergence"][0]
        return [
            way.label,
            f"{ran.said['parameters']:,}",
            f"{ran.said['bytes']:,}",
            f"{ppl:.2f}",
            f"{math.log(ppl / self.dense['perplexity'][0]['ppl']):.3f}",
            f"{divergence['kl']:.3f}",
            f"{divergence['agreement']:.1%}",
            f"{seconds:.0f}",
            f"{ran.peak / 1e6:.0f} MB",
        ]

    def table(self) -> str:
        lines = [f"### {self.subject.name}: dense perplexity {self.dense['perplexity'][0]['ppl']:.2f}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        for number, way in enumerate(WAYS):
            lines.append(f"| {' | '.join(self.row(number, way))} |")
            print(lines[-1], flush=True)
        return "\n".join(lines) + "\n"

    def plot(self, folder: Path, beside: Path) -> str:
        """Size against perplexity, drawn by `compress inspect`; the Markdown that shows it in a file `beside` it."""
        outputs = [self.scratch / subject_file(self.subject, number) for number in range(len(WAYS))]
        drawn = self.scratch / "plots"
        words = [str(COMPRESS), "inspect", *map(str, outputs), "--fast", "--plot", str(drawn)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.subject.name.replace(' ', '-')}.png"
        (perplexity,) = drawn.glob("size-perplexity-*.png")
        shutil.move(perplexity, file)
        shutil.rmtree(drawn)
        return f"![Size against perplexity]({file.relative_to(beside.parent)})\n\n"


def subject_file(subject: Subject, number: int) -> str:
    name = WAYS[number].label.replace(":", "-").replace("%", "pc").replace(",", "").replace(" ", "-")
    return f"{subject.name.replace(' ', '-')}-{name}"


def head(options: argparse.Namespace, subjects: Sequence[Subject]) -> str:
    versions = f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}"
    names = " ".join("demo" if each.model == "demo" else f"'{each.name}=MODEL,CALIB.txt,TEST.txt'" for each in subjects)
    return (
        f"Date: {date.today().isoformat()}. {versions}, {os.cpu_count()} cores, no GPU. Every command in a process of "
        f"its own, with imports;\n{options.samples} calibration windows of {options.seq_len} tokens, quality on the "
        f"first {options.windows} windows of held-out text.\n\n"
        f"    python benchmarks/all_methods.py --write docs/benchmarks.md --plots docs/plots {names}\n\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="+", type=Subject.parse)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--plots", type=Path)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--windows", type=int, default=400)
    options = parser.parse_args()
    text = head(options, options.subjects)
    with tempfile.TemporaryDirectory() as scratch:
        for subject in options.subjects:
            bench = Bench(subject, options, Path(scratch))
            text += bench.table() + "\n"
            if options.plots:
                text += bench.plot(options.plots, options.write or Path("all.md"))
    if options.write is None:
        print(text)
        return
    marked.write(text, options.write, "all methods")


if __name__ == "__main__":
    main()
