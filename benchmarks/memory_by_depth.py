"""Does memory grow with depth? A synthetic Llama of few and of many equal layers, sliced; peak resident sets compared.

    python benchmarks/memory_by_depth.py

The weights are random, written block by block so that this process stays small too. Prints a Markdown table.
"""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from slicing_quality import compress
from transformers import LlamaConfig

from compress.models.hub import find_model

WIDTH, INTERMEDIATE, HEADS, VOCABULARY = 1024, 2816, 16, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--method", default="slicegpt", choices=["anchored", "slicegpt"])
    options = parser.parse_args()
    print("| layers | model, MB | peak memory, MB | slicing, s |")
    print("|---|---|---|---|")
    for depth in options.depths:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            # In a process of its own: a child's peak starts from what its parent held when it was forked.
            writer = multiprocessing.get_context("spawn").Process(target=write_llama, args=(model, depth))
            writer.start()
            writer.join()
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            arguments = ["--model", str(model), "--ratio", "0.25", "--calib", "stdlib", "--out", f"{folder}/sliced"]
            arguments += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
            arguments += ["--method", options.method]
            result, memory = compress("slice", *arguments)
        seconds = result["seconds"]["total"] - result["seconds"]["verify"]
        print(f"| {depth} | {size / 1e6:.0f} | {memory / 1e6:.0f} | {seconds:.1f} |", flush=True)


def write_llama(folder: Path, depth: int) -> None:
    """A random float32 Llama, a shard a layer."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    demo = find_model("demo").whole_folder()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    ends = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    parts = [{name: matrix(*shape) for name, shape in ends.items()} | {"model.norm.weight": torch.ones(WIDTH)}]
    weight_map: dict[str, str] = {}
    for index in range(depth + 1):
        tensors = parts[0] if index == depth else layer(index, matrix)
        file = f"model-{index:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def layer(index: int, matrix: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    shapes = {
        **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
        "mlp.gate_proj": (INTERMEDIATE, WIDTH),
        "mlp.up_proj": (INTERMEDIATE, WIDTH),
        "mlp.down_proj": (WIDTH, INTERMEDIATE),
    }
    prefix = f"model.layers.{index}."
    tensors = {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return tensors | {f"{prefix}{norm}.weight": torch.ones(WIDTH) for norm in norms}


if __name__ == "__main__":
    main()
