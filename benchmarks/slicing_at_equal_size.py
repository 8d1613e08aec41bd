"""Perplexity at equal total parameters: the paper's method, ours, and ours with parts left out.

    python benchmarks/slicing_at_equal_size.py --model MODEL --calib CALIBRATION.txt --test TEST.txt --data-dir DATA

For each share of the dense model's parameters, a row a way: what the result has, its bytes, perplexity on the test
text, the excess ln(perplexity / dense) and that as a share of SliceGPT's. SliceGPT gets any width (--round-to 1)
and the better of a sliced and an unsliced head. With --other, perplexity on a text unlike the calibration text too.
Seconds are the whole run's, reloading left out.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WAYS: dict[str, list[list[str]]] = {
    "slicegpt": [
        ["--method", "slicegpt", "--round-to", "1", *head] for head in ([], ["--set", "slice.slice_head=true"])
    ],
    "anchored": [[]],
    "anchored, no refit": [["--no-refit"]],
    "anchored, by variance alone": [["--set", "rotate_shared.gradient_weight=0"]],
    "anchored, per-layer rotations": [["--rotation", "per-layer"]],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--test", default="stdlib")
    parser.add_argument("--other", help="a text unlike the calibration text, such as wikitext2")
    parser.add_argument("--data-dir")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.75, 0.65])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    dense = evaluated(options.model, options)
    print(
        "| kept | way | hidden, neurons | parameters | bytes | perplexity | excess | of SliceGPT's | other text | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    print(f"| | dense | | {dense['parameters']:,} | | {dense['ppl']:.2f} | | | {shown(dense['other'])} | |")
    for share in options.keep:
        paper: float | None = None
        for way in options.ways:
            found = min((attempt(share, extra, options) for extra in WAYS[way]), key=lambda one: one["ppl"])
            excess = math.log(found["ppl"] / dense["ppl"])
            paper = excess if way == "slicegpt" else paper
            against = "" if paper is None or way == "slicegpt" else f"{excess / paper:.2f}"
            print(f"| {share:.2f} | {way} | {row(found)} | {excess:.3f} | {against} | {tail(found)} |", flush=True)


def row(found: dict[str, Any]) -> str:
    shape = f"{found['widths'][0]}, {found['units']['neurons']}"
    return f"{shape} | {found['parameters']:,} | {found['bytes']:,} | {found['ppl']:.2f}"


def tail(found: dict[str, Any]) -> str:
    seconds = sum(value for kind, value in found["seconds"].items() if kind not in ("verify", "total"))
    return f"{shown(found['other'])} | {seconds:.1f}"


def shown(ppl: float | None) -> str:
    return "" if ppl is None else f"{ppl:.1f}"


def attempt(share: float, extra: list[str], options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "sliced")
        arguments = ["--model", options.model, "--keep-params", str(share), "--calib", options.calib, "--out", out]
        arguments += ["--samples", str(options.samples), "--seq-len", str(options.seq_len), *extra]
        made = compress("slice", *arguments)
        return made | evaluated(out, options)


def evaluated(model: str, options: argparse.Namespace) -> dict[str, Any]:
    texts = [options.test, options.other] if options.other else [options.test]
    found = [perplexity(model, text, options) for text in texts]
    first = found[0]
    return {
        "ppl": first["perplexity"][0]["ppl"],
        "parameters": first["parameters"],
        "other": found[1]["perplexity"][0]["ppl"] if options.other else None,
    }


def perplexity(model: str, text: str, options: argparse.Namespace) -> dict[str, Any]:
    arguments = ["--model", model, "--ppl", text, "--seq-len", str(options.seq_len), "--limit", str(options.windows)]
    return compress("eval", *arguments, *(["--data-dir", options.data_dir] if options.data_dir else []))


def compress(command: str, *arguments: str) -> dict[str, Any]:
    program = Path(sys.executable).with_name("compress")
    done = subprocess.run([program, command, *arguments, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"compress {command} failed: {arguments}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
