"""What llama.cpp's arithmetic adds to a GGUF file's perplexity: it rounds the inputs of quantized linears to 8 bits.

    python benchmarks/llamacpp_arithmetic.py --data-dir DATA --files F16.gguf Q4_0.gguf [--windows 1]

Of each file of a Llama: the perplexity of its dequantized weights by transformers, the same with inputs rounded as
ggml's types Q8_0 and Q8_K round them, and llama.cpp's, on the first windows of 512 tokens of WikiText-2's test text.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from compress.datasets.windows import evaluation_windows
from compress.evaluation.llamacpp import LlamaCpp
from compress.evaluation.windows import perplexity
from compress.models.gguf_header import tensor_names
from compress.models.hub import find_model
from compress.models.loading import load_tokenizer
from compress.models.stored_loading import open_model

SEQ_LEN = 512
PLAIN = ("F32", "F16", "BF16")


def rounded(block: int, _module: nn.Module, given: tuple[Any, ...]) -> Tensor:
    """The input in 8 bits, a scale a block; Q8_0's, of 32 numbers, is stored in float16."""
    x = given[0].unflatten(-1, (-1, block))
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((x / scale).round() * (scale.half().float() if block == 32 else scale)).flatten(-2)


def round_inputs(model: Any, file: Path) -> None:
    """Round the inputs of all linears whose weights the file has in block types."""
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    names = tensor_names("llama", model.config.num_hidden_layers)
    for path, module in model.named_modules():
        kind = types.get(f"{names.get_name(path)}.weight", types["token_embd.weight"])  # a tied head has no other
        if isinstance(module, nn.Linear) and kind not in PLAIN:
            module.register_forward_pre_hook(partial(rounded, 256 if kind.endswith(("_K", "_XS")) else 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--files", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=1)
    options = parser.parse_args()
    print("| file | transformers | with inputs in 8 bits | llama.cpp |\n|---|---|---|---|")
    for file in options.files:
        folder = find_model(str(file)).whole_folder()
        text: dict[str, Any] = {"seq_len": SEQ_LEN, "limit": options.windows, "data_dir": options.data_dir}
        windows = evaluation_windows("wikitext2", load_tokenizer(folder), **text)
        model: Any = open_model(folder, dtype=torch.float32, device=torch.device("cpu"))
        found = [perplexity(model, windows, dataset="wikitext2", batch_size=1).ppl]
        round_inputs(model, file)
        found.append(perplexity(model, windows, dataset="wikitext2", batch_size=1).ppl)
        engine = LlamaCpp(file, context=SEQ_LEN, vocabulary=model.config.vocab_size)
        found.append(torch.tensor([engine.loss(window) for window in windows]).mean().exp().item())
        print(f"| {file.stem} | {' | '.join(f'{each:.3f}' for each in found)} |", flush=True)


if __name__ == "__main__":
    main()
