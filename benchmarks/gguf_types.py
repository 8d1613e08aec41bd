"""Our GGUF files beside llama-quantize's of the same types, with an importance matrix of the same windows.

    python benchmarks/gguf_types.py --model llama-256 --llama-quantize bin/llama-quantize --types Q2_K Q3_K_S \\
        [--calib stdlib] [--test stdlib] [--samples 128] [--seq-len 256] [--windows 100] [--write FILE.md]

llama-quantize is the program of llama.cpp, or of a fork with the same types; it gets the model as a GGUF file in 16
bits and, as llama-imatrix makes it, the mean squares of every linear's inputs over the calibration windows. Each file
is measured by `compress eval`, as its divergence from the dense model on the test text. Seconds are the run's without
imports, and in forward passes of the calibration windows without the head.
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import marked
import torch
from real_model import pass_seconds
from torch import nn
from transformers import AutoModelForCausalLM

from compress.checkpoints.gguf import write_gguf
from compress.datasets.windows import calibration_windows
from compress.models.gguf_header import tensor_names
from compress.models.hub import find_model
from compress.models.loading import load_tokenizer

COLUMNS = ["file", "bytes", "perplexity", "divergence, nats", "of llama-quantize's", "seconds", "forward passes"]
LABEL = "gguf types"
AT_ONCE = 16  # windows
OF_LLAMA_CPP = {"IQ4_XS": ["--attn-v-type", "iq4_xs"]}  # where ik_llama.cpp's program takes a type of its own


def write_importance(folder: Path, windows: torch.Tensor, file: Path) -> None:
    """Write the sums of squares of all linears' inputs as llama-imatrix does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names, sums = tensor_names(model.config.model_type, model.config.num_hidden_layers), dict[str, torch.Tensor]()

    def watch(name: str, linear: nn.Linear) -> None:
        def add(_module: Any, inputs: tuple[torch.Tensor]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).square().sum(0)

        linear.register_forward_pre_hook(add)

    for path, module in model.base_model.named_modules(prefix="model"):
        if isinstance(module, nn.Linear):
            watch(names.get_name(f"{path}.weight", try_suffixes=(".weight",)), module)
    with torch.inference_mode():
        for batch in windows.split(AT_ONCE):
            model.base_model(batch, use_cache=False)
    with file.open("wb") as out:
        out.write(struct.pack("i", len(sums)))
        for name, total in sums.items():
            out.write(struct.pack("i", len(name)) + name.encode())
            out.write(struct.pack("ii", windows.numel(), len(total)) + total.numpy().tobytes())
        out.write(struct.pack("ii", len(windows), 4) + b"text")


class Bench:
    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.data = [] if options.data_dir is None else ["--data-dir", options.data_dir]
        folder = find_model(options.model).whole_folder()
        read = {"num_samples": options.samples, "seq_len": options.seq_len, "seed": 42, "data_dir": options.data_dir}
        windows = calibration_windows(options.calib, load_tokenizer(folder), **read)
        self.unit, self.dense, self.importance = (
            pass_seconds(folder, windows),
            scratch / "f16.gguf",
            scratch / "imatrix",
        )
        write_importance(folder, windows, self.importance)
        write_gguf(folder, self.dense)

    def compress(self, *words: object) -> Any:
        command = [sys.executable, "-m", "compress", *map(str, words), "--json"]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    def measured(self, file: Path) -> tuple[int, float, float]:
        options = self.options
        texts = ["--ppl", options.test, "--kl", options.model, "--seq-len", options.seq_len, "--limit", options.windows]
        found = self.compress("eval", "--model", file, *texts, *self.data)
        return file.stat().st_size, found["perplexity"][0]["ppl"], found["divergence"][0]["kl"]

    def theirs(self, name: str) -> Path:
        file = self.scratch / f"llama-quantize-{name}.gguf"
        command = [self.options.llama_quantize, "--imatrix", self.importance, *OF_LLAMA_CPP.get(name, ())]
        command += [self.dense, file, name]
        subprocess.run(command, check=True, capture_output=True)
        return file

    def ours(self, name: str) -> tuple[Path, float]:
        options, out = self.options, self.scratch / name
        text = ["--calib", options.calib, "--samples", options.samples, "--seq-len", options.seq_len, *self.data]
        found = self.compress("quantize", "--model", options.model, "--type", name, *text, "--out", out)
        return out / f"{name}.gguf", found["seconds"]["total"]

    def rows(self) -> list[list[str]]:
        rows = []
        for name in self.options.types:
            other, (file, seconds) = self.measured(self.theirs(name)), self.ours(name)
            mine = self.measured(file)
            rows.append([f"llama-quantize {name}", *said(other), "", "", ""])
            cost = [f"{seconds:.0f}", f"{seconds / self.unit:.1f}"]
            rows.append([f"`--type {name}`", *said(mine), f"{mine[2] / other[2]:.2f}", *cost])
            sys.stderr.write(f"{rows[-2]}\n{rows[-1]}\n")
        return rows


def said(found: tuple[int, float, float]) -> list[str]:
    return [f"{found[0]:,}", f"{found[1]:.3f}", f"{found[2]:.5f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--llama-quantize", required=True, type=Path)
    parser.add_argument("--types", nargs="+", default=["Q2_K", "Q3_K_S", "IQ4_XS", "Q4_K_M"])
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--test", default="stdlib")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.write:
        marked.check(options.write, LABEL)
    with tempfile.TemporaryDirectory() as scratch:
        rows = [COLUMNS, ["---"] * len(COLUMNS), *Bench(options, Path(scratch)).rows()]
    text = "\n".join([f"{Path(options.model).name}.", "", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
    sys.stdout.write(text)
    if options.write:
        marked.write(text, options.write, LABEL)


if __name__ == "__main__":
    main()
