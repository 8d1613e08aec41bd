"""Several processes against one: the same weights? the same bytes from run to run? how long? Written into the docs.

    python benchmarks/processes.py --write docs/reliability.md demo
    python benchmarks/processes.py --write docs/reliability.md demo NAME=MODEL,CALIB.txt ...

Every command runs once in one process, twice in two and once in four, started by `torchrun` on this machine's CPU with
one thread each, so that a process stands for a device. Differences are of the written weights from one process's: of
each tensor ||W - W1|| / ||W1||, the largest; tensors of codes, masks and orders are compared number by number. Then
runs of two processes are killed: one of the two, at a moment drawn from a seed, by SIGKILL; what is left is resumed.
"""

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import marked
import psutil
import torch
from safetensors.torch import load_file

BIN = Path(sys.executable).parent
COMMANDS = {
    "slice, slicegpt 25%": ["slice", "--method", "slicegpt", "--ratio", "0.25"],
    "slice, keep 75%": ["slice", "--keep-params", "0.75", "--set", "budget.trial_samples=32"],
    "lord, keep 75%": ["lord", "--keep-params", "0.75"],
    "slim": ["slim"],
}


@dataclass(frozen=True)
class Subject:
    name: str
    model: str
    calib: str | None

    @classmethod
    def parse(cls, text: str) -> "Subject":
        name, _, rest = text.partition("=")
        model, _, calib = (rest or name).partition(",")
        return cls(name, model, calib or None)

    def words(self, command: Sequence[str], samples: int) -> list[str]:
        text = ["--calib", self.calib] if self.calib else []
        return [*command, "--model", self.model, *text, "--samples", str(samples), "--seq-len", "128"]


def start(words: Sequence[str], count: int, out: Path, *more: str) -> "subprocess.Popen[str]":
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(count), "-m", "compress"]
    command = launcher if count > 1 else [str(BIN / "compress")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*command, *words, "--device", "cpu", "--batch-size", "8", "--out", str(out), "--json", *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> float:
    """The run's seconds, without verification."""
    out, err = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{process.args} ended with {process.returncode}:\n{err}")
    seconds = json.loads(out[out.index("{") :])["seconds"]
    return float(seconds["total"] - seconds["verify"])


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.rglob("*.safetensors")):
        yield from ((f"{file.parent.name}/{name}", tensor) for name, tensor in load_file(file).items())


def difference(one: Path, other: Path) -> tuple[float, int, int]:
    """The largest relative difference of a tensor; of codes, how many differ and how many there are."""
    found, largest, differing, codes = dict(tensors(other)), 0.0, 0, 0
    for name, tensor in tensors(one):
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            apart = (tensor.double() - found[name].double()).norm() / tensor.double().norm().clamp_min(1e-300)
            largest = max(largest, float(apart))
        else:
            differing, codes = differing + int((tensor != found[name]).sum()), codes + tensor.numel()
    return largest, differing, codes


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(str(file.relative_to(one)) for file in one.rglob("*") if file.is_file())
    others = sorted(str(file.relative_to(other)) for file in other.rglob("*") if file.is_file())
    return names == others and not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


def row(subject: Subject, label: str, samples: int, scratch: Path) -> str:
    words = subject.words(COMMANDS[label], samples)
    # Beside each other's folders, under one name: it is in the model card.
    outs = [scratch / run / "out" for run in ("1", "2", "2 again", "4")]
    seconds = [finish(start(words, count, out)) for count, out in zip((1, 2, 2, 4), outs, strict=True)]
    cells = [f"{subject.name}: {label}"]
    for out in (outs[1], outs[3]):
        largest, differing, codes = difference(outs[0], out)
        cells.append(f"{largest:.0e}" + (f"; {differing:,} of {codes:,} codes" if codes else ""))
    cells.append("yes" if same_bytes(outs[1], outs[2]) else "NO")
    cells += [f"{seconds[place]:.0f}" for place in (0, 1, 3)]
    return f"| {' | '.join(cells)} |"


def kills(subject: Subject, label: str, samples: int, scratch: Path, times: int) -> str:
    """How runs ended of which one process was killed at some moment, and whether going on gave the same bytes."""
    words, rng, slowest, same = subject.words(COMMANDS[label], samples), random.Random(0), 0.0, 0
    whole, resumed = scratch / "2" / "out", 0
    began = time.perf_counter()
    finish(start(words, 2, scratch / "timed" / "out"))
    length = time.perf_counter() - began
    for number in range(times):
        out = scratch / f"killed {number}" / "out"
        process = start(words, 2, out)
        time.sleep(rng.uniform(0.2, 0.9) * length)
        workers = [child for child in psutil.Process(process.pid).children() if "compress" in child.cmdline()]
        if len(workers) == 2:
            rng.choice(workers).send_signal(signal.SIGKILL)
        killed = time.perf_counter()
        process.communicate(timeout=120)
        slowest = max(slowest, time.perf_counter() - killed)
        more = ["--resume"] if out.with_name("out.partial").exists() else []
        resumed += bool(more)
        if not out.exists():
            finish(start(words, 2, out, *more))
        same += same_bytes(whole, out)
        shutil.rmtree(out.parent)
    return (
        f"{subject.name}, {label}, two processes, one of them killed {times} times: all had ended "
        f"{slowest:.1f} s after the kill at the latest,\n{resumed} had finished something and were resumed, and {same} "
        f"of {times} came to the bytes of a run that nothing disturbed.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="+", type=Subject.parse)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--killed", choices=list(COMMANDS), default="slim")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    names = " ".join("demo" if each.model == "demo" else f"{each.name}=MODEL,CALIB.txt" for each in options.subjects)
    lines = [
        f"torch {torch.__version__}, {os.cpu_count()} cores, one thread a process, {options.samples} windows of 128 "
        "tokens; seconds without verification.\n",
        f"    python benchmarks/processes.py --samples {options.samples} --kills {options.kills} "
        f"--killed {options.killed} --write docs/reliability.md {names}\n",
        "| command | 2 from 1 | 4 from 1 | two runs of 2: same bytes | 1, s | 2, s | 4, s |",
        "|---|---|---|---|---|---|---|",
    ]
    after = []
    for subject in options.subjects:
        for label in options.commands:
            with tempfile.TemporaryDirectory() as scratch:
                lines.append(row(subject, label, options.samples, Path(scratch)))
                print(lines[-1], flush=True)
                if label == options.killed and options.kills:
                    after.append(kills(subject, label, options.samples, Path(scratch), options.kills))
                    print(after[-1], flush=True)
    text = "\n".join([*lines, "", *after])
    if options.write is None:
        return
    marked.write(text, options.write, "processes")


if __name__ == "__main__":
    main()
