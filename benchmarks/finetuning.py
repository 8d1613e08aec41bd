"""What a little training wins back of hard compression, written into the docs.

    python benchmarks/finetuning.py --data-dir DATA --write docs/finetuning.md demo NAME=MODEL,CALIB.txt,TEST.txt ...

Each row is a `compress` command, then `compress finetune` of what it wrote, of which only text, windows and steps are
said, and `compress eval` of both on the test text, each in a process of its own. Won back is (lost before - lost after)
/ lost before, lost being ln(perplexity / dense). `demo` is trained on the `stdlib` data set and tested on its test
split; other models on the standard library's source without the files that their calibration or test text has. Seconds
are those of the whole command, imports and proof included; the other text is the validation split of `wikitext2` in
DATA.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import marked

from compress.datasets.texts import LEFT_OUT

COMPRESS = Path(sys.executable).with_name("compress")
COLUMNS = [
    "compressed by",
    "trained",
    "bytes",
    "perplexity",
    "tuned",
    "won back",
    "wikitext2",
    "tuned",
    "steps",
    "best",
    "seconds",
]
WAYS = {
    "slice, 60% of the parameters": ["slice", "--keep-params", 0.6],
    "lord, 60% of the parameters": ["lord", "--keep-params", 0.6],
    "slim, 2:4 in 3 bits, adapters 0.1": ["slim", "--bits", 3],
}
PROBE, STRIDE = 120, 4000  # characters by which a file is found in a text, and from one to the next


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

    def training_text(self, scratch: Path) -> str:
        if self.test == "stdlib":
            return "stdlib"
        held = "".join(Path(name).read_text(encoding="utf-8") for name in (self.calibration, self.test))
        file = scratch / "training.txt"
        file.write_text("\n\n".join(text for text in library() if not is_in(text, held)), encoding="utf-8")
        return str(file)


def library() -> list[str]:
    """The files of the standard library, without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if LEFT_OUT.isdisjoint(file.relative_to(root).parts)]
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def is_in(text: str, held: str) -> bool:
    """Whether any of many passages of a file stands in another text."""
    passages = [text[start : start + PROBE] for start in range(0, max(1, len(text) - PROBE), STRIDE)]
    return any(len(passage) == PROBE and passage in held for passage in passages)


def compress(*words: object) -> tuple[dict[str, Any], float]:
    """What a command said as JSON, and its seconds."""
    start = time.perf_counter()
    command = [str(COMPRESS), *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")
    return json.loads(done.stdout), time.perf_counter() - start


class Bench:
    def __init__(self, subject: Subject, options: argparse.Namespace, scratch: Path) -> None:
        self.subject, self.options, self.scratch = subject, options, scratch
        self.text = subject.training_text(scratch)
        self.dense = self.loss(subject.model)

    def loss(self, model: object) -> float:
        window = ["--seq-len", self.options.seq_len, "--limit", self.options.windows]
        found, _ = compress("eval", "--model", model, "--ppl", self.subject.test, *window)
        return math.log(found["perplexity"][0]["ppl"])

    def row(self, number: int, label: str) -> list[str]:
        out, subject, seq_len = (
            self.scratch / f"{subject_file(self.subject)}-{number}",
            self.subject,
            self.options.seq_len,
        )
        data = ["--calib", subject.calibration, "--samples", self.options.samples, "--seq-len", seq_len]
        compress(*WAYS[label], "--model", subject.model, *data, "--out", out)
        tuned = out.with_name(f"{out.name}-tuned")
        words = ["--data", self.text, "--seq-len", seq_len, "--teacher", subject.model, "--out", tuned]
        said, seconds = compress(
            "finetune", out, *words, "--steps", self.options.steps, "--data-dir", self.options.data_dir
        )
        before, after, unlike = self.loss(out), self.loss(tuned), said["unlike"]
        return [
            label,
            said["trained"],
            f"{said['bytes']:,}",
            f"{math.exp(before):.2f}",
            f"{math.exp(after):.2f}",
            f"{(before - after) / (before - self.dense):.0%}",
            f"{math.exp(unlike['before']):.1f}",
            f"{math.exp(unlike['after']):.1f}",
            f"{said['steps']}",
            f"{said['best_step']}",
            f"{seconds:.0f}",
        ]

    def table(self, ways: Sequence[str]) -> str:
        lines = [f"### {self.subject.name}: dense perplexity {math.exp(self.dense):.2f}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        for number, label in enumerate(ways):
            lines.append(f"| {' | '.join(self.row(number, label))} |")
            print(lines[-1], flush=True)
        return "\n".join(lines) + "\n\n"


def subject_file(subject: Subject) -> str:
    return subject.name.replace(" ", "-")


def head(options: argparse.Namespace, subjects: Sequence[Subject]) -> str:
    versions = f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}"
    names = " ".join("demo" if each.model == "demo" else f"'{each.name}=MODEL,CALIB.txt,TEST.txt'" for each in subjects)
    return (
        f"Date: {date.today().isoformat()}. {versions}, {os.cpu_count()} cores, no GPU. {options.samples} calibration "
        f"windows of {options.seq_len} tokens,\nperplexity on the first {options.windows} windows of the test text.\n\n"
        f"    python benchmarks/finetuning.py --data-dir DATA --write docs/finetuning.md {names}\n\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="+", type=Subject.parse)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args()
    text = head(options, options.subjects)
    with tempfile.TemporaryDirectory() as scratch:
        for subject in options.subjects:
            text += Bench(subject, options, Path(scratch)).table(options.ways)
    if options.write is None:
        print(text)
        return
    marked.write(text, options.write, "finetuning")


if __name__ == "__main__":
    main()
