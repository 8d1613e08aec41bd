"""Perplexity by the convention of GPTQ (arXiv 2210.17323), SparseGPT and SliceGPT.

    ppl = exp(mean over windows of the window's loss),    loss = mean over its L - 1 shifted targets of -ln p(target)

L tokens a window, natural logarithm, so the loss is in nats per token. The windows do not see one another, and the
first token of each is not predicted. Perplexities compare only between models with one tokenizer, at one L.

The standard error is that of the mean over windows, brought to the perplexity by the delta method:
ppl * std(losses, ddof=1) / sqrt(windows). For one window it is None.

The reference codes take the loss in the model's dtype; ours moves the logits to float32 first (float64 stays).
"""

import time
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from compress.checkpoints.quality import Perplexity
from compress.errors import UsageError
from compress.evaluation._inference import device_of, evaluating, finite, ignore, mean_and_error, on_text


def perplexity(
    model: nn.Module,
    windows: Int64[Tensor, "windows seq_len"],
    *,
    dataset: str,
    batch_size: int,
    on_batch: Callable[[int], None] = ignore,
) -> Perplexity:
    """The model's perplexity on the windows. `on_batch` is told the number of windows in each batch done."""
    if windows.shape[1] < 2:
        raise UsageError(f"Perplexity needs windows of at least 2 tokens, --seq-len is {windows.shape[1]}.")
    start = time.perf_counter()
    losses: list[float] = []
    with evaluating(model):
        for batch in windows.split(batch_size):
            ids = batch.to(device_of(model))
            losses += finite(window_losses(model, ids), dataset, len(losses), model, ids)
            on_batch(len(batch))
    nll, error = mean_and_error(losses)
    ppl = torch.tensor(nll, dtype=torch.float64).exp().item()
    standard_error = None if error is None else ppl * error
    return Perplexity(ppl=ppl, nll=nll, standard_error=standard_error, **on_text(dataset, windows, start))


def window_losses(model: nn.Module, batch: Int64[Tensor, "batch seq_len"]) -> list[float]:
    """The loss of each window, in nats per token."""
    logits = model(input_ids=batch, use_cache=False).logits
    # One window at a time: the float32 copy of a whole batch would be twice the size of its logits.
    return [mean_nll(window_logits, window).item() for window_logits, window in zip(logits, batch, strict=True)]


def mean_nll(logits: Float[Tensor, "seq_len vocab"], tokens: Int64[Tensor, "seq_len"]) -> Float[Tensor, ""]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return nn.functional.cross_entropy(logits[:-1].to(wide), tokens[1:])
