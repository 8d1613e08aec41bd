"""Load checkpoints as a stranger would, run them and generate from them. Run as a script, without our package.

    python -I stock_probe.py REQUEST.json ANSWERS

REQUEST: by name of a model its `folder`, whether to `trust` the code in it, whether to `unpack` its weights, rows of
tokens by name in `ids` and, to generate from, in `prompt`. ANSWERS becomes a folder: logits.safetensors has each
model's logits as MODEL/NAME-OF-IDS, found.json all else.

transformers' RMSNorms compute in float32 whatever they are given; here those of a float64 model compute in float64, so
that what is asked about is the checkpoint and not the norm's rounding.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.utils import logging as transformers_logging

NEW_TOKENS = 4


def exact(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(norm: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            return stock(norm, x)
        is_plus_one = type(norm).__name__.startswith(("Gemma", "Qwen3_5"))
        gain = 1 + norm.weight if is_plus_one else norm.weight
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        return gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    return forward


def make_norms_exact(model: Any, done: set[type]) -> None:
    for kind in {type(module) for module in model.modules()} - done:
        if kind.__module__.startswith("transformers.") and kind.__name__.endswith("RMSNorm"):
            kind.forward = exact(kind.forward)
            done.add(kind)


def greedy(model: Any, prompt: Tensor) -> Tensor:
    """Without a cache, every prefix from its first token."""
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=prompt, use_cache=False).logits[:, -1].clone()
        logits[:, model.config.eos_token_id] = -torch.inf
        prompt = torch.cat([prompt, logits.argmax(-1, keepdim=True)], dim=1)
    return prompt


def generated(model: Any, prompt: Tensor) -> dict[str, Any]:
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 2}
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **options)
    return {"cached": cached.tolist(), "greedy": greedy(model, prompt).tolist()}


def look_at(entry: dict[str, Any], exact_kinds: set[type]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    options: dict[str, Any] = {}
    if entry.get("unpack"):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    if entry.get("float64_experts"):
        options["experts_implementation"] = "eager"  # torch's grouped products are not for float64
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        entry["folder"], trust_remote_code=entry["trust"], output_loading_info=True, local_files_only=True, **options
    )
    model, info = loaded
    make_norms_exact(model, exact_kinds)
    model.eval()
    logits = {
        name: model(input_ids=torch.tensor(ids), use_cache=False).logits.contiguous()
        for name, ids in entry["ids"].items()
    }
    found = {
        "info": {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys},
        "module": type(model).__module__,
    }
    return logits, found | generated(model, torch.tensor(entry["prompt"]))


@torch.no_grad()
def main(request_file: str, answers: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    all_logits: dict[str, Tensor] = {}
    found: dict[str, dict[str, Any]] = {}
    exact_kinds: set[type] = set()
    transformers_logging.disable_default_handler()
    transformers_logging.disable_progress_bar()
    for model, entry in request.items():
        logits, found[model] = look_at(entry, exact_kinds)
        all_logits |= {f"{model}/{name}": tensor for name, tensor in logits.items()}
    folder = Path(answers)
    folder.mkdir()
    save_file(all_logits, folder / "logits.safetensors")
    ours = sorted(module for module in sys.modules if module.split(".")[0] == "compress")
    (folder / "found.json").write_text(json.dumps({"models": found, "ours": ours}, default=str), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
