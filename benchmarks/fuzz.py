"""Bad input by the thousand: how many tracebacks, hangs and how much memory, written into the docs.

    python benchmarks/fuzz.py --write docs/reliability.md
    python benchmarks/fuzz.py --inputs 2000 --seed 7 --target recipe

Every input is a valid file that was spoiled (spoiling.py) and is then read by the commands that read such a file,
behind the command line's own boundary (fuzzing.py). The inputs go over a few processes; one that dies, or hangs
where Python cannot stop it, counts against the input it was at and is replaced. `--write` replaces the text between the
marks. Without faults the exit code is 0.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import marked

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

COLUMNS = ["what was spoiled", "inputs", "refused", "tracebacks", "hangs", "other faults", "longest, s", "memory, MB"]
SILENCE = 120.0  # seconds after which a process is taken to hang
AT_A_TIME = 250  # inputs that one process takes


@dataclass(frozen=True)
class Share:
    """Some of a target's inputs: numbers from `start` to `stop`."""

    target: str
    start: int
    stop: int


def shares(inputs: int, only: str | None) -> list[Share]:
    from fuzzing import TARGETS

    targets = [target for target in TARGETS if only in (None, target.name)]
    if not targets:
        raise SystemExit(f"No target {only!r}. There are: {', '.join(target.name for target in TARGETS)}.")
    total = sum(target.weight for target in targets)
    found = []
    for target in targets:
        count = -int(-inputs * target.weight // total)
        found += [Share(target.name, start, min(count, start + AT_A_TIME)) for start in range(0, count, AT_A_TIME)]
    return found


def serve(home: Path, seed: int) -> None:
    """One process: takes a share from each line of its input and answers with a line an input."""
    from fuzzing import TARGETS, Fuzzer

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    fuzzer, targets = Fuzzer(home), {target.name: target for target in TARGETS}
    for line in sys.stdin:
        share = Share(**json.loads(line))
        target = targets[share.target]
        fuzzer.warm_up(target)
        for number in range(share.start, share.stop):
            verdict = fuzzer.spoil_and_judge(target, Random(f"{seed} {share.target} {number}"))
            print(json.dumps(asdict(verdict)), file=answers, flush=True)


class Worker:
    """A process with a home of its own, started anew when it is lost."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.seed = home, seed
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> "subprocess.Popen[str]":
        if self.process is None or self.process.poll() is not None:
            words = [sys.executable, __file__, "--serve", str(self.home), "--seed", str(self.seed)]
            variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            kept = {name: value for name, value in os.environ.items() if name != "COMPRESS_DATA_DIR"}
            self.process = subprocess.Popen(
                words,
                env=kept | variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        return self.process

    def verdicts(self, share: Share) -> Iterator[tuple[int, dict[str, Any]]]:
        """Of each input, with its number."""
        number = share.start
        while number < share.stop:
            process = self.start()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(asdict(Share(share.target, number, share.stop))) + "\n")
            process.stdin.flush()
            while number < share.stop:
                start = time.monotonic()
                line = self.answer(process)
                if line is None:
                    seconds = time.monotonic() - start
                    fault = f"hang, killed after {seconds:.0f} s" if seconds > SILENCE else "the process died"
                    yield number, {"code": None, "fault": fault, "seconds": seconds, "growth": 0}
                    number += 1
                    break
                yield number, json.loads(line)
                number += 1

    def answer(self, process: "subprocess.Popen[str]") -> str | None:
        """None where there is none any more."""
        assert process.stdout is not None
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(process.stdout.readline)
            try:
                return waiting.result(SILENCE) or None
            except TimeoutError:
                process.send_signal(signal.SIGKILL)
                return None
            finally:
                if waiting.done() and not waiting.result():
                    process.wait()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@dataclass
class Tally:
    inputs: int = 0
    refused: int = 0
    tracebacks: int = 0
    hangs: int = 0
    others: int = 0
    longest: float = 0.0
    growth: int = 0

    def add(self, verdict: dict[str, Any]) -> None:
        kind = (verdict["fault"] or "").partition(":")[0].partition(",")[0]
        self.inputs += 1
        self.refused += verdict["fault"] is None and verdict["code"] != 0
        self.tracebacks += kind == "traceback"
        self.hangs += kind == "hang"
        self.others += kind not in ("", "traceback", "hang")
        self.longest = max(self.longest, verdict["seconds"])
        self.growth = max(self.growth, verdict["growth"])

    def row(self, name: str) -> str:
        cells = [name, f"{self.inputs:,}", f"{self.refused:,}", self.tracebacks, self.hangs, self.others]
        return f"| {' | '.join(map(str, cells))} | {self.longest:.1f} | {self.growth / 1e6:.0f} |"


def total(tallies: list[Tally]) -> Tally:
    found = Tally()
    for each in tallies:
        found = Tally(
            *(getattr(found, name) + getattr(each, name) for name in list(vars(found))[:5]),
            longest=max(found.longest, each.longest),
            growth=max(found.growth, each.growth),
        )
    return found


def run(inputs: int, seed: int, workers: int, only: str | None) -> tuple[dict[str, Tally], Counter[str]]:
    """By target, and every fault with how often it came and the first input that has it."""
    from fuzzing import write_home

    tallies: dict[str, Tally] = {}
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="compress-fuzz-") as scratch:
        first = Path(scratch) / "home-0"
        first.mkdir()
        write_home(first)
        homes = [first, *(Path(scratch) / f"home-{number}" for number in range(1, workers))]
        for home in homes[1:]:
            shutil.copytree(first, home, copy_function=shutil.copy2)
        waiting = shares(inputs, only)

        def work(home: Path) -> None:
            worker = Worker(home, seed)
            try:
                while waiting:
                    share = waiting.pop(0)
                    for number, verdict in worker.verdicts(share):
                        tallies.setdefault(share.target, Tally()).add(verdict)
                        if verdict["fault"]:
                            faults[verdict["fault"]] += 1
                            print(f"{share.target}, seed {seed}, input {number}: {verdict['fault']}", flush=True)
            finally:
                worker.stop()

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, homes))
    return tallies, faults


def table(tallies: dict[str, Tally], options: argparse.Namespace, seconds: float) -> str:
    from fuzzing import GROWTH, SECONDS, TARGETS

    names = [target.name for target in TARGETS if target.name in tallies]
    versions = f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}"
    lines = [
        f"Date: {date.today().isoformat()}. {versions}, {os.cpu_count()} cores, {options.workers} processes, "
        f"{seconds / 60:.0f} minutes.",
        "",
        f"    python benchmarks/fuzz.py --inputs {options.inputs} --seed {options.seed} --write docs/reliability.md",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" + "|---:" * (len(COLUMNS) - 1) + "|",
        *(tallies[name].row(name) for name in names),
        total(list(tallies.values())).row("all"),
        "",
        f"A hang is an input that takes more than {SECONDS:.0f} seconds of computing. Other faults are memory that",
        f"grows by more than {GROWTH / 1e6:.0f} MB, files that are touched outside the output, processes or",
        "connections that are started, a message that cannot be printed, a process that dies.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, min(8, os.cpu_count() or 1)))
    parser.add_argument("--target", help="one of them alone")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.seed)
        return
    start = time.monotonic()
    tallies, faults = run(options.inputs, options.seed, options.workers, options.target)
    text = table(tallies, options, time.monotonic() - start)
    print(text)
    for fault, count in faults.most_common():
        print(f"{count} x {fault}")
    if options.write is not None:
        marked.write(text, options.write, "bad input")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
