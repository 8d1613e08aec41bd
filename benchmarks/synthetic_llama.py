"""A Llama with random weights whose statistics are like a trained one's, made on the device in seconds.

White noise would be no test: its activations have no direction that matters more than another. Here embeddings are
correlated, so that the stream's covariance decays by a power law; so do the weights' spectra; and a few channels of
the stream are many times as large as the others.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compress.models.hub import find_model

DECAY = 0.6  # of singular values: (1 + i)^-DECAY
OUTLIERS = 0.002  # the share of channels, at least one
OUTLIER_SIZE = 20.0
TOKENIZER = "tokenizer.json", "tokenizer_config.json"


def write_llama(folder: Path, sizes: dict[str, int], device: torch.device) -> int:
    """A checkpoint in bfloat16 with the embedded model's tokenizer, whose vocabulary it has. Returns the parameters."""
    demo = find_model("demo").whole_folder()
    tokenizer = AutoTokenizer.from_pretrained(demo)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, dtype=torch.bfloat16, **ends, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device=device).to(torch.bfloat16)
    fill(model, torch.Generator(device).manual_seed(0))
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(demo / name, folder)
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def fill(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    depth = 2 * model.config.num_hidden_layers
    loud = outlier_channels(model.config.hidden_size, generator)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        weight = decaying(*parameter.shape, generator)
        if name.endswith("embed_tokens.weight"):
            weight[:, loud] *= OUTLIER_SIZE
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight /= depth**0.5  # so that the stream does not grow with depth
        parameter.copy_(weight)


def outlier_channels(width: int, generator: torch.Generator) -> Tensor:
    count = max(1, int(OUTLIERS * width))
    return torch.randperm(width, generator=generator, device=generator.device)[:count]


def decaying(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Of rank min(rows, columns), its singular values about as (1 + i)^-DECAY, its entries' mean square 1 / columns."""
    rank = min(rows, columns)
    device = generator.device
    left = torch.randn(rows, rank, generator=generator, device=device)
    right = torch.randn(rank, columns, generator=generator, device=device)
    spectrum = (1 + torch.arange(rank, device=device)) ** -DECAY
    weight = left * spectrum @ right
    return weight / (weight.square().mean() * columns).sqrt()
