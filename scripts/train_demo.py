"""Train the embedded `demo` model: a small OPT that has read the running Python's standard library.

    python scripts/train_demo.py                 # about 40 minutes on two CPU cores, seeded
    python scripts/train_demo.py --steps 20 --out /tmp/demo     # a quick look at the machinery
    python scripts/train_demo.py --architecture gpt_bigcode --steps 5000 --out bigcode-py  # StarCoder, not shipped
    python scripts/train_demo.py --architecture llama --steps 800 --out llama-256  # K-quants, not shipped

The library's test packages, where the distribution installs them, are trained on too (they triple the text); the
held-out splits of the dataset `stdlib` never are. The weights are written in float16, which is what is shipped.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTBigCodeConfig,
    LlamaConfig,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from compress.datasets.texts import library_root, stdlib

ASSETS = Path(__file__).parents[1] / "src" / "compress" / "assets"
VOCAB_SIZE = 1024
SEQ_LEN = 256
BATCH = 16
PEAK_LR = 3e-3
WARMUP_STEPS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--architecture", choices=CONFIGS, default="opt")
    parser.add_argument("--out", type=Path, default=ASSETS / "demo")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    text = stdlib("train") + library_tests()
    tokenizer = train_tokenizer(text)
    tokens = encode(tokenizer, text)
    held_out = encode(tokenizer, stdlib("validation"))
    model = AutoModelForCausalLM.from_config(CONFIGS[options.architecture]())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} training tokens", flush=True)
    train(model, tokens, held_out, steps=options.steps)

    if isinstance(model, OPTForCausalLM):
        forget_untrained_positions(model)
    model.half().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    report = {
        "steps": options.steps,
        "seed": options.seed,
        "training_tokens": len(tokens),
        "validation_ppl": round(perplexity(model.float(), held_out), 4),
    }
    print(json.dumps(report))


def forget_untrained_positions(model: OPTForCausalLM) -> None:
    """Cut the position table to the length that was trained: what lies past it is noise."""
    positions = model.model.decoder.embed_positions
    positions.weight = torch.nn.Parameter(positions.weight[: SEQ_LEN + positions.offset].clone())
    model.config.max_position_embeddings = SEQ_LEN


def library_tests() -> list[str]:
    root = library_root()
    paths = sorted((root / "test").rglob("*.py"))
    # What encoded mail headers spell is no language.
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths if "encoded" not in path.name]


def bigcode_config() -> PretrainedConfig:
    return GPTBigCodeConfig(
        vocab_size=VOCAB_SIZE,
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_positions=SEQ_LEN,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def demo_config() -> PretrainedConfig:
    # Widths that stay multiples of 8 at the usual ratios: 160 -> 144, 128, 120, 112.
    return OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=160,
        word_embed_proj_dim=160,
        num_hidden_layers=4,
        num_attention_heads=5,
        ffn_dim=640,
        max_position_embeddings=512,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def llama_config() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQ_LEN,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


CONFIGS = {"opt": demo_config, "gpt_bigcode": bigcode_config, "llama": llama_config}


def train_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    bpe.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def encode(tokenizer: PreTrainedTokenizerFast, text: list[str]) -> torch.Tensor:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in ids for token in row])


def train(model: PreTrainedModel, tokens: torch.Tensor, held_out: torch.Tensor, *, steps: int) -> None:
    # Decay belongs on matrices; vectors (gains, biases) are left alone.
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    start, mean_loss = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        offsets = torch.randint(len(tokens) - SEQ_LEN - 1, (BATCH,)).tolist()
        batch = torch.stack([tokens[i : i + SEQ_LEN] for i in offsets])
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean_loss = 0.99 * mean_loss + 0.01 * loss.item() if step > 1 else loss.item()
        if step % 100 == 0:
            print(f"step {step:5d} loss {mean_loss:.4f} {time.monotonic() - start:6.0f} s", flush=True)
        if step % 1000 == 0:
            print(f"  held-out perplexity {perplexity(model, held_out):.3f}", flush=True)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    windows = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)[:400]
    losses = [model(batch, labels=batch).loss.item() * len(batch) for batch in windows.split(16)]
    return math.exp(sum(losses) / len(windows))


if __name__ == "__main__":
    main()
