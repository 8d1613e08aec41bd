"""What factorizing costs: seconds and peak memory of `compress lord`, against LoRD written down plainly.

    python benchmarks/lowrank_cost.py

A random Llama (hidden 1024, MLP 2816) of two depths, 60% of every rank, the same calibration windows. The plain run
(plain_lord.py) holds the whole model and the second moments of all outputs at once and proves nothing; reloading in a
clean process is left out of our seconds, and so is the import of torch and transformers from both. Stated are ratios
ours / plain beside the plain run's own figures.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory_by_depth import write_llama
from slicing_quality import compress, wait

WAYS = {
    "lord": ["--method", "lord", "--rank-frac", "0.6"],
    "anchored": ["--rank-frac", "0.6"],
    "anchored, no gradient": ["--rank-frac", "0.6", "--set", "factorize.gradient_weight=0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    options = parser.parse_args()
    print("| layers | way | seconds | of plain | peak memory, MB | of plain |")
    print("|---|---|---|---|---|---|")
    for depth in options.depths:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            writer = multiprocessing.get_context("spawn").Process(target=write_llama, args=(model, depth))
            writer.start()
            writer.join()
            plain = plain_run(model, Path(folder) / "plain", options)
            print(f"| {depth} | plain | {plain[0]:.1f} | | {plain[1] / 1e6:.0f} | |", flush=True)
            for way, how in WAYS.items():
                seconds, memory = our_run(model, Path(folder) / way.replace(", ", "-"), how, options)
                shares = f"{seconds / plain[0]:.2f} | {memory / 1e6:.0f} | {memory / plain[1]:.2f}"
                print(f"| {depth} | {way} | {seconds:.1f} | {shares} |", flush=True)


def texts(options: argparse.Namespace) -> list[str]:
    return ["--calib", "stdlib", "--samples", str(options.samples), "--seq-len", str(options.seq_len)]


def our_run(model: Path, out: Path, how: list[str], options: argparse.Namespace) -> tuple[float, int]:
    result, memory = compress("lord", "--model", str(model), "--out", str(out), *how, *texts(options))
    return result["seconds"]["total"] - result["seconds"]["verify"], memory


def plain_run(model: Path, out: Path, options: argparse.Namespace) -> tuple[float, int]:
    script = Path(__file__).with_name("plain_lord.py")
    command = [sys.executable, str(script), "--model", str(model), "--out", str(out), *texts(options)]
    process: Any = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    printed = process.stdout.read()
    _, code, used = wait(process)
    if code:
        raise SystemExit("the plain run failed")
    return json.loads(printed.splitlines()[-1])["seconds"], used.ru_maxrss * 1024


if __name__ == "__main__":
    main()
