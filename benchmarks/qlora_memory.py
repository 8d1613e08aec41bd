"""What QLoRA over low-rank factors holds in memory, beside QLoRA over the dense model (LoRD, arXiv 2309.14021).

    python benchmarks/qlora_memory.py --write docs/finetuning.md

A Llama of random weights as `compress` writes it: its linears in 4 bits (groups of 32, bfloat16), once whole and once
as factors of `--rank-frac` of every rank. On each a fresh LoRA is trained for a few steps by the code of `compress
finetune`, in a process of its own. Memory is the most that the process held (VmHWM) beyond what its imports take.
Random weights take as much memory as trained ones.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import marked

GROUP = 32
CHILD = """
import json, re, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from compress.own_model import modeling_compress
from compress.models.stored_loading import load_stored
from compress.tuning.looking import block_linears
from compress.tuning.settings import Rate, Settings
from compress.tuning.trained import lora
from compress.tuning.training import Training
from transformers.models.llama import modeling_llama
def memory(kind):
    return 1024 * int(re.search(rf"{kind}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
folder, rank, batch, seq_len, steps, checkpointing = sys.argv[1], *map(int, sys.argv[2:])
before = memory("VmRSS")
model = load_stored(Path(folder), dtype=torch.bfloat16, device=torch.device("cpu"))
loaded = memory("VmRSS") - before
if checkpointing:
    model.gradient_checkpointing_enable({"use_reentrant": False})
trained = lora(model, block_linears(model, model.config), rank=rank, alpha=rank, merge=False)
windows = torch.randint(model.config.get_text_config().vocab_size, (4 * batch, seq_len))
settings = Settings(data="random", steps=steps, seq_len=seq_len, batch_size=batch, eval_every=steps)
rate = Rate(1e-4, relative=False)
training = Training(trained, None, windows, windows[:batch], settings, rate, Accelerator(cpu=True))
for _ in range(steps):
    loss = training.step()
numbers = sum(p.numel() for p in trained.parameters.values())
print(json.dumps({"loaded": loaded, "peak": memory("VmHWM") - before, "trained": numbers, "loss": loss}))
"""


def write_models(root: Path, options: argparse.Namespace) -> None:
    """`root/dense` and `root/factors`, both in 4 bits, packed; their linears never all in memory in another form."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from compress import families
    from compress.models.loading import empty_model
    from compress.models.packing import quantization_config
    from compress.models.storage import Storage, empty_linear
    from compress.numerics.grids import QuantizationArgs
    from compress.own_model.configuration_compress import CompressConfig

    storage = Storage("packed", QuantizationArgs(num_bits=4, group_size=GROUP))
    llama = LlamaConfig(
        vocab_size=4096,
        hidden_size=options.hidden,
        intermediate_size=11 * options.hidden // 4,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=options.seq_len,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        dense = empty_model(llama)
    blocks = [name for name, each in dense.named_modules() if isinstance(each, torch.nn.Linear) and name != "lm_head"]
    rank = int(options.rank_frac * options.hidden) // GROUP * GROUP
    entry = {"rank": rank, "form": "factors", "bias": False}
    factors, structure = dict.fromkeys(blocks, entry), families.find(llama).structure()
    thin = CompressConfig(text_config=llama, structure=structure, factors=factors, dtype="bfloat16")
    factored = empty_model(thin)
    for name, model, config in (("dense", dense, llama), ("factors", factored, thin)):
        folder = root / name
        folder.mkdir()
        linears = [(path, each) for path, each in model.named_modules() if isinstance(each, torch.nn.Linear)]
        for path, linear in linears:
            if not path.endswith("lm_head"):
                n, m = linear.in_features, linear.out_features
                model.set_submodule(path, empty_linear(storage, n, m, bias=False, dtype=torch.bfloat16))
        tensors = {key: drawn(each) for key, each in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        described = config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
        described["quantization_config"] = quantization_config({"": storage}, ["lm_head"])
        (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")


def drawn(tensor: Any) -> Any:
    import torch

    if tensor.dtype == torch.int32:
        return torch.randint(-(2**31), 2**31, tensor.shape, dtype=torch.int32)
    if tensor.dtype == torch.int64:
        return tensor.clone() if not tensor.is_meta else torch.zeros(tensor.shape, dtype=torch.int64)
    scale = 1e-3 if tensor.ndim == 2 else 1.0
    return torch.full(tensor.shape, scale, dtype=torch.bfloat16)


def measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    numbers = (options.lora_rank, options.batch, options.seq_len, options.steps, int(options.checkpointing))
    command = [sys.executable, "-c", CHILD, str(folder), *map(str, numbers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rank-frac", type=float, default=0.4)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_models(Path(scratch), options)
        found = {name: measured(Path(scratch) / name, options) for name in ("dense", "factors")}
    text = table(found, options)
    print(text)
    if options.write is not None:
        marked.write(text, options.write, "qlora")


def table(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    said = " ".join(
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(options).items()
        if name not in ("write", "checkpointing")
    )
    rows = [
        f"| {name} | {each['trained']:,} | {each['loaded'] / 1e6:.0f} MB | {each['peak'] / 1e6:.0f} MB |"
        for name, each in (("dense in 4 bits", found["dense"]), ("factors in 4 bits", found["factors"]))
    ]
    saved = 1 - found["factors"]["peak"] / found["dense"]["peak"]
    return (
        f"Date: {date.today().isoformat()}. Python {platform.python_version()}, torch {version('torch')}, no GPU.\n\n"
        f"    python benchmarks/qlora_memory.py {said}{' --checkpointing' if options.checkpointing else ''}\n\n"
        "| LoRA over | trained | loaded | at most |\n|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"Over the factors it takes {saved:.1%} less.\n"
    )


if __name__ == "__main__":
    main()
