"""Compressed models tuned block by block: perplexity before and after, and how long it took, written into the docs.

    python benchmarks/blockwise.py --write docs/finetuning_blocks.md demo
    python benchmarks/blockwise.py --write docs/finetuning_blocks.md NAME=MODEL,CALIB.txt,TEST.txt ...

Each row is one `compress` command in a process of its own, then `tune_blocks` with other windows of the calibration
text, and `compress eval` before and after. Excess is ln(perplexity / dense). `--write` replaces the text between the
marks. `--only TEXT ...` runs the rows whose label has one of the texts; `--keep FOLDER` keeps the checkpoints and goes
on with those that are there.
"""

import argparse
import math
import os
import platform
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import marked
from all_methods import Subject, compress

from compress.datasets.windows import calibration_windows
from compress.models.hub import find_model
from compress.models.loading import load_tokenizer
from compress.tuning.blocks_files import KeptTensors
from compress.tuning.blockwise import BlockSettings, tune_blocks
from compress.tuning.writing import write_weights

COLUMNS = ["compressed by", "perplexity", "tuned", "excess", "tuned", "divergence, nats", "tuned", "seconds"]
SEED = 7  # of the windows: compressing takes another


@dataclass(frozen=True)
class Way:
    label: str
    words: Sequence[str]


WAYS = [
    Way("`lord --rank-frac 0.6`", ["lord", "--rank-frac", "0.6"]),
    Way(
        "`lord --rank-frac 0.6 --method lord`", ["lord", "--method", "lord", "--form", "factors", "--rank-frac", "0.6"]
    ),
    Way("`slim --bits 3`, packed", ["slim", "--bits", "3"]),
    Way("`slim --bits 3 --compact`", ["slim", "--bits", "3", "--compact"]),
    Way("`slim --compact --adapter-bits 4`", ["slim", "--compact", "--adapter-bits", "4"]),
    Way("`slim --method slim --compact`", ["slim", "--method", "slim", "--compact"]),
    Way("`slim --bits none`, 2:4", ["slim", "--bits", "none"]),
    Way("`slice --ratio 0.4`", ["slice", "--ratio", "0.4"]),
    Way("`slice --ratio 0.4 --method slicegpt`", ["slice", "--method", "slicegpt", "--ratio", "0.4"]),
]


class Bench:
    def __init__(self, subject: Subject, options: argparse.Namespace, scratch: Path) -> None:
        self.subject = subject
        self.options = options
        self.scratch = scratch
        self.teacher = find_model(subject.model).whole_folder()
        self.dense, _ = self.quality(subject.model)

    def quality(self, model: object) -> tuple[float, float]:
        """Perplexity, and the divergence from the dense model in nats a token."""
        test, options = self.subject.test, self.options
        words = ["--ppl", test, "--kl", self.subject.model, "--seq-len", options.seq_len, "--limit", options.windows]
        said = compress("eval", "--model", model, *words).said
        return float(said["perplexity"][0]["ppl"]), float(said["divergence"][0]["kl"])

    def compressed(self, number: int, way: Way) -> Path:
        out = self.scratch / f"{self.subject.name.replace(' ', '-')}-{number}"
        if not out.exists():
            data = ["--calib", self.subject.calibration, "--samples", 256, "--seq-len", self.options.seq_len]
            compress(*way.words, "--model", self.subject.model, *data, "--out", out)
        return out

    def tuned(self, folder: Path) -> tuple[Path, float]:
        """The tuned checkpoint, and how many seconds it took."""
        out, blocks = folder.with_name(f"{folder.name}-tuned"), folder.with_name(f"{folder.name}-blocks")
        for leftover in (out, blocks):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(folder, out)
        blocks.mkdir()
        options = self.options
        windows = calibration_windows(
            self.subject.calibration,
            load_tokenizer(self.teacher),
            num_samples=options.samples + options.held_out,
            seq_len=options.seq_len,
            seed=SEED,
            data_dir=None,
        )
        learned, held_out = windows[: options.samples], windows[options.samples :]
        start = time.perf_counter()
        tune_blocks(folder, self.teacher, learned, held_out, blocks, BlockSettings(), lambda *_heard: None)
        write_weights(folder, out, KeptTensors(blocks))
        return out, time.perf_counter() - start

    def row(self, number: int, way: Way) -> list[str]:
        folder = self.compressed(number, way)
        out, seconds = self.tuned(folder)
        found = [self.quality(model) for model in (folder, out)]
        return [
            way.label,
            *(f"{ppl:.2f}" for ppl, _ in found),
            *(f"{math.log(ppl / self.dense):.3f}" for ppl, _ in found),
            *(f"{divergence:.3f}" for _, divergence in found),
            f"{seconds:.0f}",
        ]

    def table(self) -> str:
        lines = [f"### {self.subject.name}: dense perplexity {self.dense:.2f}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        for number, way in enumerate(WAYS):
            if not self.options.only or any(text in way.label for text in self.options.only):
                lines.append(f"| {' | '.join(self.row(number, way))} |")
                print(lines[-1], flush=True)
        return "\n".join(lines) + "\n"


def head(options: argparse.Namespace, subjects: Sequence[Subject]) -> str:
    versions = f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}"
    names = " ".join("demo" if each.model == "demo" else f"'{each.name}=MODEL,CALIB.txt,TEST.txt'" for each in subjects)
    only = f"--only {shlex.join(options.only)} " if options.only else ""
    return (
        f"Date: {date.today().isoformat()}. {versions}, {os.cpu_count()} cores, no GPU. Compressed with 256 windows of "
        f"{options.seq_len} tokens,\ntuned with {options.samples} others of the same text and judged on "
        f"{options.held_out} more; perplexity on the first {options.windows} windows of held-out text.\nExcess is "
        "ln(perplexity / dense); seconds are those of the tuning.\n\n"
        f"    python benchmarks/blockwise.py {only}--write docs/finetuning_blocks.md {names}\n\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="+", type=Subject.parse)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--windows", type=int, default=400)
    options = parser.parse_args()
    text = head(options, options.subjects)
    with tempfile.TemporaryDirectory() as passing:
        scratch = options.keep or Path(passing)
        scratch.mkdir(parents=True, exist_ok=True)
        for subject in options.subjects:
            text += Bench(subject, options, scratch).table() + "\n"
    if options.write is None:
        print(text)
        return
    marked.write(text, options.write, "blockwise")


if __name__ == "__main__":
    main()
