"""A real model, compressed by our commands, beside files of other tools: bytes, perplexity, divergence, cost.

    python benchmarks/real_model.py --model MODEL --data-dir DATA --commands "quantize --type Q4_K_M" \\
        "slice --keep-params 0.8" ... [--files Q3_K_S.gguf ...] [--label "real model"] [--write FILE.md]

Each command calibrates on 32 windows of 512 tokens of WikiText-2; its result is measured by `compress eval`:
perplexity, and divergence from the dense model, on the first 20 windows of 512 tokens of the test text. --files: other
GGUF files or folders of the model, in rows by their names. Seconds are the whole run's without imports, and in forward
passes of the calibration windows without the head, timed before it and after.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import marked
import torch
from transformers import AutoModelForCausalLM

from compress.datasets.windows import calibration_windows
from compress.models.loading import load_tokenizer

COMPRESS = Path(sys.executable).with_name("compress")
SAMPLES, SEQ_LEN, TEST_WINDOWS = 32, 512, 20
COLUMNS = ["result", "parameters", "bytes", "perplexity", "divergence, nats", "same token", "seconds", "forward passes"]


def compress(*words: object) -> Any:
    done = subprocess.run([str(COMPRESS), *map(str, words), "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def pass_seconds(model: Path, windows: torch.Tensor, at_once: int = 1024) -> float:
    """Seconds of a forward pass of the windows, without the head. at_once: tokens."""
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).base_model
    batches = windows.split(max(1, at_once // windows.shape[1]))
    with torch.inference_mode():
        decoder(batches[0], use_cache=False)
        start = time.perf_counter()
        for batch in batches:
            decoder(batch, use_cache=False)
    return time.perf_counter() - start


def measured(file: Path, options: argparse.Namespace) -> list[str]:
    texts = ["--ppl", "wikitext2", "--kl", options.model, "--seq-len", SEQ_LEN, "--limit", TEST_WINDOWS]
    found = compress("eval", "--model", file, *texts, "--data-dir", options.data_dir)
    divergence = found["divergence"][0]
    files = [file] if file.is_file() else sorted(file.glob("*.safetensors"))
    return [
        f"{found['parameters'] / 1e6:.1f}M",
        f"{sum(each.stat().st_size for each in files):,}",
        f"{found['perplexity'][0]['ppl']:.2f}",
        f"{divergence['kl']:.4f}",
        f"{divergence['agreement']:.1%}",
    ]


def rows(options: argparse.Namespace, scratch: Path) -> list[list[str]]:
    found = [[file.stem, *measured(file, options), "", ""] for file in options.files]
    sys.stderr.write("\n".join(map(" | ".join, found)) + "\n")
    windows = calibration_windows(
        "wikitext2",
        load_tokenizer(options.model),
        num_samples=SAMPLES,
        seq_len=SEQ_LEN,
        seed=42,
        data_dir=options.data_dir,
    )
    units = [pass_seconds(options.model, windows)] if options.commands else []
    for number, command in enumerate(options.commands):
        out = scratch / f"model-{number}"
        words = ["--calib", "wikitext2", "--data-dir", options.data_dir, "--samples", SAMPLES, "--seq-len", SEQ_LEN]
        done = compress(*shlex.split(command), "--model", options.model, *words, "--out", out)
        file = out / f"{out.name}.gguf"
        units.append(pass_seconds(options.model, windows))
        seconds = done["seconds"]["total"]
        cost = [f"{seconds:.0f}", f"{2 * seconds / sum(units[-2:]):.1f}"]
        found.append([f"`{command}`", *measured(file if file.exists() else out, options), *cost])
        sys.stderr.write(f"{' | '.join(found[-1])} | {json.dumps(done['seconds'])}, a pass {units[-2:]}\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--commands", nargs="*", default=["quantize --type Q3_K_S", "quantize --type Q4_K_M"])
    parser.add_argument("--files", nargs="*", type=Path, default=[])
    parser.add_argument("--label", default="real model")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        table = [COLUMNS, ["---"] * len(COLUMNS), *rows(options, Path(scratch))]
    versions = f"torch {version('torch')}, transformers {version('transformers')}, {torch.get_num_threads()} threads"
    lines = [f"Date: {date.today()}. Python {platform.python_version()}, {versions}. {options.model.name}.", ""]
    text = "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in table)])
    sys.stdout.write(text + "\n")
    if options.write:
        marked.write(text + "\n", options.write, options.label)


if __name__ == "__main__":
    main()
