"""Bytes on disk, memory while loading, and speed of packed and compact models against the dense one.

    python benchmarks/slim_runtime.py

A Llama of about 100 million parameters with random weights in bfloat16 (sizes and times do not depend on them) is
compressed by `compress slim --method slim --set slim.quantize.method=absmax` to 4 bits: unpruned, packed; 2:4 with
adapters, packed;
the same, compact. Stated are the bytes of all files with tensors against the plan's, the most memory that a process
holds which loads the model and generates a token, less what it held when torch and transformers were imported, and
prefill and decoding, dense and compressed in turns: the median of the rounds' ratios and the range that holds the
middle half of them. Above 1, compressed is faster.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from slicing_speed import described, paired, run_decode, run_prefill
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import compress
from compress.models.hub import find_model

SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
WAYS = {
    "4 bits, groups of 128, packed": ["--sparsity", "none", "--adapter-rank", "0", "--group", "128"],
    "2:4, 4 bits, adapters 0.1, packed": ["--group", "128"],
    "2:4, 4 bits, adapters 0.1 in 4 bits, compact": ["--group", "128", "--compact", "--set", "slim.adapt.num_bits=4"],
}
PROBE = r"""
import re, sys, torch, transformers
import transformers.models.llama.modeling_llama, compress.models.stored_loading
def peak(): return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
model = compress.load(sys.argv[1])
loaded = peak()
model.generate(torch.ones(1, 16, dtype=torch.long), max_new_tokens=2, do_sample=False)
print(loaded - before, peak() - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prefill", type=int, default=256, help="tokens")
    parser.add_argument("--decode", type=int, default=16, help="tokens, one at a time")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    try:
        measure(scratch, options)
    finally:
        shutil.rmtree(scratch)


def measure(scratch: Path, options: argparse.Namespace) -> None:
    dense = synthetic(scratch / "dense")
    folders = {label: compressed(dense, scratch / str(place), how) for place, (label, how) in enumerate(WAYS.items())}
    print("| | bytes on disk | plan | of dense | memory, loading | and generating |\n|---|---|---|---|---|---|")
    whole = on_disk(dense)
    for label, folder in {"dense, bfloat16": dense, **folders}.items():
        facts = folder / "compress.json"
        planned = json.loads(facts.read_text())["size"]["bytes"] if facts.exists() else whole
        loading, generating = memory(folder)
        print(
            f"| {label} | {on_disk(folder):,} | {planned:,} | {on_disk(folder) / whole:.3f} "
            f"| {loading / 1e6:.0f} MB | {generating / 1e6:.0f} MB |",
            flush=True,
        )
    print("\n| | prefill, tokens/s | ratio | decode, tokens/s | ratio |\n|---|---|---|---|---|")
    for label, folder in folders.items():
        models = [compress.load(each) for each in (dense, folder)]
        prefill = paired(models, lambda model: run_prefill(model, options.prefill), options.rounds)
        decode = paired(models, lambda model: run_decode(model, options.decode), options.rounds)
        print(f"| {label} | {described(prefill, options.prefill)} | {described(decode, options.decode)} |", flush=True)


def synthetic(folder: Path) -> Path:
    torch.manual_seed(0)
    demo = find_model("demo").whole_folder()
    tokenizer = AutoTokenizer.from_pretrained(demo)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer)}, max_position_embeddings=512))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compressed(dense: Path, out: Path, how: list[str]) -> Path:
    command = [
        sys.executable,
        "-c",
        "from compress.cli import main; main()",
        "slim",
        "--model",
        str(dense),
        "--out",
        str(out),
    ]
    command += ["--method", "slim", "--set", "slim.quantize.method=absmax"]
    command += ["--calib", "stdlib", "--samples", "4", "--seq-len", "128", *how]
    subprocess.run(command, check=True, capture_output=True)
    return out


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def memory(folder: Path) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", PROBE, str(folder)], check=True, capture_output=True, text=True)
    loading, generating = map(int, done.stdout.split()[-2:])
    return loading, generating


if __name__ == "__main__":
    main()
