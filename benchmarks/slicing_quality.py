"""Perplexity, parameters, seconds and memory of slicing at several ratios, each run a process of its own.

    python benchmarks/slicing_quality.py --model demo --calib stdlib --test stdlib
    python benchmarks/slicing_quality.py --model MODEL --calib CALIB.txt --test TEST.txt --samples 256 --seq-len 128 \\
        --windows 400 --ratios 0 0.1 0.2 0.25 0.3

Prints a Markdown table. Slicing is the walk: reading weights, forward (with reading and rotating), statistics,
eigensolves, writing. Imports, reading the text and the proof by reloading are not in it. Peak memory is the slicing
process's maximum resident set, torch itself (about 400 MB) included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FORWARD = ("read", "forward", "rotate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--test", default="stdlib")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0, 0.1, 0.2, 0.25, 0.3])
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="passed on to compress slice")
    options = parser.parse_args()
    print(
        "| ratio | parameters | perplexity | slicing, s | forward / statistics / eigensolve / write, s | peak memory |"
    )
    print("|---|---|---|---|---|---|")
    for ratio in options.ratios:
        print(row(ratio, options), flush=True)


def row(ratio: float, options: argparse.Namespace) -> str:
    evaluation = ["--ppl", options.test, "--seq-len", str(options.seq_len), "--limit", str(options.windows)]
    if ratio == 0:
        found = compress("eval", "--model", options.model, *evaluation)[0]
        return f"| dense | {found['parameters']:,} | {shown(found)} | | | |"
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "sliced")
        arguments = ["--model", options.model, "--method", "slicegpt", "--ratio", str(ratio)]
        arguments += ["--calib", options.calib, "--out", out]
        arguments += ["--samples", str(options.samples), "--seq-len", str(options.seq_len), *options.options]
        result, memory = compress("slice", *arguments)
        found = compress("eval", "--model", out, *evaluation)[0]
    seconds = result["seconds"]
    parts = [
        sum(seconds.get(kind, 0) for kind in FORWARD),
        *(seconds[k] for k in ("statistics", "eigensolve", "write")),
    ]
    slicing = sum(value for kind, value in seconds.items() if kind not in ("verify", "total"))
    split = " / ".join(f"{part:.2f}" for part in parts)
    return (
        f"| {ratio:.0%} | {result['parameters']:,} | {shown(found)} | {slicing:.2f} | {split} | {memory / 1e6:.0f} MB |"
    )


def shown(found: dict[str, Any]) -> str:
    entry = found["perplexity"][0]
    return f"{entry['ppl']:.2f} ± {entry['standard_error']:.2f}"


def compress(command: str, *arguments: str) -> tuple[dict[str, Any], int]:
    """The command's JSON and its peak resident bytes."""
    program = Path(sys.executable).with_name("compress")
    with subprocess.Popen(
        [program, command, *arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = wait(process)
    if status:
        raise SystemExit(f"compress {command} failed: {arguments}")
    return json.loads(output), usage.ru_maxrss * 1024


def wait(process: "subprocess.Popen[str]") -> tuple[int, int, resource.struct_rusage]:
    found = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(found[1])
    return found


if __name__ == "__main__":
    main()
