"""LoRD as one would write it down, for comparison: the whole model in memory, hooks on every linear, one pass.

    python benchmarks/plain_lord.py --model MODEL --out OUT --rank-frac 0.6 --calib TEXT --samples 64 --seq-len 128

Each linear's outputs are gathered as a second moment (m, m) in float64, all of them at once; then every linear becomes
two by the eigenvectors of its outputs' covariance, and the model is saved. No stream is kept, nothing is proved.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from compress.datasets.windows import calibration_windows
from compress.models.loading import load_tokenizer


class Gatherer:
    def __init__(self, linear: nn.Linear) -> None:
        self.second = torch.zeros(linear.out_features, linear.out_features, dtype=torch.float64)
        self.total = torch.zeros(linear.out_features, dtype=torch.float64)
        self.tokens = 0
        self.handle = linear.register_forward_hook(self.gather)

    def gather(self, _module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        y = output.reshape(-1, output.shape[-1]).double()
        self.second.addmm_(y.T, y)
        self.total += y.sum(0)
        self.tokens += len(y)

    def components(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.total / self.tokens
        return torch.linalg.eigh(self.second / self.tokens - torch.outer(mean, mean))[1].flip(1), mean


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank-frac", type=float, default=0.6)
    parser.add_argument("--calib", default="stdlib")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=128)
    options = parser.parse_args()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    windows = calibration_windows(
        options.calib,
        load_tokenizer(options.model),
        num_samples=options.samples,
        seq_len=options.seq_len,
        seed=42,
        data_dir=None,
    )
    named = {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    gatherers = {name: Gatherer(linear) for name, linear in named.items()}
    for batch in windows.split(max(1, 8192 // options.seq_len)):
        model.model(input_ids=batch, use_cache=False)
    for name, linear in named.items():
        gatherers[name].handle.remove()
        parent, _, attribute = name.rpartition(".")
        setattr(model.model.get_submodule(parent), attribute, factorized(linear, gatherers[name], options.rank_frac))
    options.out.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, options.out / "model.safetensors"
    )
    print(json.dumps({"seconds": time.perf_counter() - start}))


def factorized(linear: nn.Linear, gatherer: Gatherer, share: float) -> nn.Module:
    m, n = linear.weight.shape
    rank = int(share * min(m, n))
    if rank * (m + n) >= m * n:
        return linear
    U, mean = gatherer.components()
    U = U[:, :rank]
    first, second = nn.Linear(n, rank, bias=False), nn.Linear(rank, m)
    first.weight.copy_(U.T @ linear.weight.double())
    second.weight.copy_(U)
    bias = 0.0 if linear.bias is None else linear.bias.double() @ U @ U.T
    second.bias.copy_(bias + mean - U @ (U.T @ mean))
    return nn.Sequential(first, second)


if __name__ == "__main__":
    main()
