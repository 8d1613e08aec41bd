"""Is --max-memory kept, and is the plan's memory true? Synthetic Llamas of several depths and calibrations, measured.

    python benchmarks/max_memory.py --write docs/reliability.md

Measured is what the run and the process that reloads its result hold together and the system cannot take back
(RssAnon of /proc, summed over the processes, looked at every 10 ms); pages of mapped files, which the system drops or
writes out when memory is short, are not promised. The last row is a model larger than its limit, which the kernel
enforces: a memory cgroup where one can be made, else RLIMIT_DATA for each process.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import marked
from memory_by_depth import write_llama

COMPRESS = Path(sys.executable).with_name("compress")
CGROUPS = Path("/sys/fs/cgroup/memory")
METHODS = {
    "slicegpt": ["slice", "--method", "slicegpt", "--ratio", "0.25"],
    "anchored": ["slice", "--ratio", "0.25"],
    "lord": ["lord", "--keep-params", "0.8"],
    "slim": ["slim", "--compact"],
}


class Watch(threading.Thread):
    """The most that a process and its children hold, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.peak = 0

    def run(self) -> None:
        while held := sum(anonymous(pid) for pid in family(self.pid)):
            self.peak = max(self.peak, held)
            time.sleep(0.01)


def family(pid: int) -> Iterator[int]:
    """A process and those that it has started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from family(int(child))


def anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:"))


def run(words: Sequence[str], begin: Callable[[], None] | None = None) -> tuple[int, str, str, int]:
    """A command's exit code, what it printed, and the most it held."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command, pipe = [str(COMPRESS), *words], subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=begin)
    watch = Watch(process.pid)
    watch.start()
    out, err = process.communicate()
    watch.join()
    return process.returncode, out, err, watch.peak


def words_of(model: Path, method: str, samples: int, seq_len: int, out: Path) -> list[str]:
    text = ["--calib", "stdlib", "--samples", str(samples), "--seq-len", str(seq_len), "--device", "cpu"]
    return [*METHODS[method], "--model", str(model), *text, "--out", str(out), "--json", "--overwrite"]


def row(model: Path, depth: int, method: str, samples: int, seq_len: int, out: Path) -> str:
    """Without a limit: planned and measured. With the least limit that the plan allows: measured."""
    words = words_of(model, method, samples, seq_len, out)
    code, out, err, _ = run([*words, "--dry-run"])
    if code:
        raise SystemExit(err)
    planned = json.loads(out)["memory_bytes"]
    _, _, refused, _ = run([*words, "--max-memory", "1MB", "--dry-run"])
    least = float(refused.split("the run takes ")[1].split(" GB")[0])
    code, _, err, free = run(words)
    limited, _, limited_err, held = run([*words, "--max-memory", f"{least:.2f}GB"])
    if code or limited:
        raise SystemExit(err + limited_err)
    cells = [f"{method}, {depth} layers", f"{samples} x {seq_len}", megabytes(planned), megabytes(free)]
    cells += [megabytes(least * 1e9), megabytes(held), "yes" if held <= least * 1e9 else "NO"]
    return f"| {' | '.join(cells)} |"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f}"


@contextmanager
def enforced(limit: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """What the kernel keeps a process to, and what the process does at its start."""
    group = CGROUPS / f"max-memory-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return
    try:
        yield "a memory cgroup", lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        group.rmdir()


def larger_than_memory(folder: Path, depth: int, limit: int) -> str:
    model = written(folder / "large", depth)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    words = [*words_of(model, "slicegpt", 16, 256, folder / "small"), "--max-memory", f"{limit / 1e9}GB"]
    with enforced(limit) as (keeper, begin):
        code, out, err, held = run(words, begin)
    if code:
        raise SystemExit(err)
    facts = json.loads(out[out.index("{") :])
    return (
        f"A model of {size / 1e9:.2f} GB, `--max-memory {limit / 1e9:.1f}GB`, kept to that by {keeper}: compressed in "
        f"{facts['seconds']['total']:.0f} s, the proof\nthat it reloads included; {held / 1e9:.2f} GB held at most.\n"
    )


def written(folder: Path, depth: int) -> Path:
    # In a process of its own: a child's peak starts from what its parent held when it was forked.
    writer = multiprocessing.get_context("spawn").Process(target=write_llama, args=(folder, depth))
    writer.start()
    writer.join()
    return folder


def cells(options: argparse.Namespace, depth: int) -> Iterator[tuple[str, int]]:
    """Methods and calibrations that are measured at a depth."""
    extremes = [(options.depths[end], options.calibrations[end]) for end in (0, -1)]
    for method in options.methods:
        for samples in options.calibrations:
            if method == options.methods[0] or (depth, samples) in extremes:
                yield method, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--calibrations", type=int, nargs="+", default=[2, 4, 8], help="windows of 512 tokens")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=["slicegpt", "anchored"],
        help="the first at every depth and calibration, the others at the least of both and the most",
    )
    parser.add_argument("--large-depth", type=int, default=24)
    parser.add_argument("--limit", type=int, default=10**9)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    lines = [
        f"    python benchmarks/max_memory.py --methods {' '.join(options.methods)} --write docs/reliability.md\n",
        "Megabytes; width 1024, 2816 neurons, a layer has 51 MB. Planned: beside the interpreter. Least: the smallest "
        "limit that the plan allows.\n",
        "| run | windows | planned | held | least limit | held under it | kept |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for depth in options.depths:
            model = written(folder / f"model-{depth}", depth)
            for method, samples in cells(options, depth):
                lines.append(row(model, depth, method, samples, 512, folder / "out"))
                print(lines[-1], flush=True)
        lines += ["", larger_than_memory(folder, options.large_depth, options.limit)]
        print(lines[-1], flush=True)
    if options.write is None:
        return
    marked.write("\n".join(lines), options.write, "memory")


if __name__ == "__main__":
    main()
