"""Measures on windows of a text: perplexity, and how far a model's next-token distribution is from the dense model's.

Perplexity is by the convention of GPTQ (arXiv 2210.17323), SparseGPT and SliceGPT:

    ppl = exp(mean over windows of the window's loss),    loss = mean over its L - 1 shifted targets of -ln p(target)

L tokens a window, natural logarithm, so the loss is in nats per token. The windows do not see one another, and the
first token of each is not predicted. Perplexities compare only between models with one tokenizer, at one L. The
standard error is that of the mean over windows, brought to the perplexity by the delta method:
ppl * std(losses, ddof=1) / sqrt(windows). For one window it is None. The reference codes take the loss in the model's
dtype; ours moves the logits to float32 first (float64 stays).

Divergence is KL(dense || model) in nats a token, the mean over the tokens that perplexity predicts, and the share of
them for which both models think the same token the likeliest; its standard error that of the mean over windows. The two
models are never in memory together: of the dense one what its head reads is kept, one vector a token, and the head.
Softmax in float64, over a few tokens at a time.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.checkpoints.quality import Divergence, Perplexity
from compress.errors import UnsupportedModel, UsageError
from compress.models.soundness import device_of, evaluating, no_number
from compress.numerics.functional import kl_divergence

Ids = Int64[Tensor, "windows seq_len"]

# Numbers of a softmax that are held at a time: a row is as wide as the vocabulary.
LOGITS_AT_ONCE = 2**24
# Of the largest logit: the same head on the same states, but on other rows at a time.
HEAD_TOLERANCE = 1e-2

Windows = dict[str, Ids]


@dataclass(frozen=True)
class Subject:
    """A checkpoint that can be measured. Its weights have not been read."""

    name: str
    folder: Path
    config: Any
    tokenizer: Any
    windows: Windows


def ignore(_count: int) -> None:
    """Tell nobody."""


def perplexity(
    model: nn.Module, windows: Ids, *, dataset: str, batch_size: int, on_batch: Callable[[int], None] = ignore
) -> Perplexity:
    """The model's perplexity on the windows. `on_batch` is told the number of windows in each batch done."""
    if windows.shape[1] < 2:
        raise UsageError(f"Perplexity needs windows of at least 2 tokens, --seq-len is {windows.shape[1]}.")
    start = time.perf_counter()
    losses: list[float] = []
    with evaluating(model):
        for batch in windows.split(batch_size):
            ids = batch.to(device_of(model))
            logits = model(input_ids=ids, use_cache=False).logits
            # One window at a time: the float32 copy of a whole batch would be twice the size of its logits.
            wide = torch.promote_types(logits.dtype, torch.float32)
            pairs = zip(logits, ids, strict=True)
            found = [nn.functional.cross_entropy(each[:-1].to(wide), tokens[1:]).item() for each, tokens in pairs]
            losses += finite(found, dataset, len(losses), model, ids)
            on_batch(len(batch))
    return perplexity_of(losses, dataset, windows, start)


def perplexity_of(losses: list[float], dataset: str, windows: Ids, start: float) -> Perplexity:
    nll, error = mean_and_error(losses)
    ppl = torch.tensor(nll, dtype=torch.float64).exp().item()
    standard_error = None if error is None else ppl * error
    return Perplexity(ppl=ppl, nll=nll, standard_error=standard_error, **on_text(dataset, windows, start))


# Divergence.


@dataclass(frozen=True)
class Reference:
    """The dense model on some windows. states: what its head reads, on the CPU; head: is left on its device."""

    dense: str
    head: nn.Module
    states: Float[Tensor, "windows seq_len hidden"]


def remember(
    dense: PreTrainedModel, windows: Ids, *, name: str, batch_size: int, on_batch: Callable[[int], None] = ignore
) -> Reference:
    """What is needed of the dense model, which may then be freed."""
    if windows.shape[1] < 2:
        raise UsageError(f"Divergence needs windows of at least 2 tokens, --seq-len is {windows.shape[1]}.")
    states = []
    with evaluating(dense):
        head = checked_head(dense, windows[:1], name)
        for batch in windows.split(batch_size):
            states.append(read_by_head(dense, head, batch).cpu())
            on_batch(len(batch))
    return Reference(name, head, torch.cat(states))


def divergence(
    model: PreTrainedModel,
    reference: Reference,
    windows: Ids,
    *,
    dataset: str,
    batch_size: int,
    on_batch: Callable[[int], None] = ignore,
) -> Divergence:
    """The model's divergence from the remembered one on the same windows."""
    start, agreed, means = time.perf_counter(), 0, list[float]()
    with evaluating(model):
        head = checked_head(model, windows[:1], dataset)
        for batch, dense_states in zip(windows.split(batch_size), reference.states.split(batch_size), strict=True):
            for z, x in zip(read_by_head(model, head, batch), dense_states, strict=True):
                kl, same = compare(reference.head, head, x[:-1], z[:-1])
                means += finite([float(kl.mean())], dataset, len(means), model, batch.to(device_of(model)))
                agreed += int(same.sum())
            on_batch(len(batch))
    kl_mean, error = mean_and_error(means)
    return Divergence(
        dense=reference.dense,
        kl=kl_mean,
        standard_error=error,
        agreement=agreed / ((windows.shape[1] - 1) * len(means)),
        **on_text(dataset, windows, start),
    )


def compare(
    dense_head: nn.Module, head: nn.Module, x: Float[Tensor, "tokens dense_hidden"], z: Float[Tensor, "tokens hidden"]
) -> tuple[Float64[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
    """The divergence of each token, and whether both heads put the same token first. x: the dense head's states."""
    kl, same = [], []
    rows = max(1, LOGITS_AT_ONCE // int(head(z[:1]).shape[-1]))
    for few_x, few_z in zip(x.split(rows), z.split(rows), strict=True):
        p, q = dense_head(few_x.to(z.device)), head(few_z)
        same.append(p.argmax(-1) == q.argmax(-1))
        kl.append(kl_divergence(p.double(), q.double()))
    return torch.cat(kl), torch.cat(same)


def checked_head(model: PreTrainedModel, window: Int64[Tensor, "1 seq_len"], name: str) -> nn.Module:
    """The model's last linear, if the logits are what it gives. Raises UnsupportedModel where more follows it."""
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModel(f"The divergence of {name} cannot be measured: the model has no head.")
    ids = window.to(device_of(model))
    logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    finite([float(logits.double().sum())], name, 0, model, ids)
    ours = head(read_by_head(model, head, window)[0, -1])
    if not torch.allclose(logits.double(), ours.double(), rtol=0, atol=HEAD_TOLERANCE * float(logits.abs().max())):
        raise UnsupportedModel(
            f"The divergence of {name} cannot be measured: its logits are not what its head gives. Use --ppl."
        )
    return head


def read_by_head(
    model: PreTrainedModel, head: nn.Module, batch: Int64[Tensor, "batch seq_len"]
) -> Float[Tensor, "batch seq_len hidden"]:
    """The states that the head reads, in its dtype; it passes them on, so the logits are never all there at once."""
    own = dict(vars(head))
    vars(head)["forward"] = lambda states: states
    try:
        states: Tensor = model(input_ids=batch.to(device_of(model)), use_cache=False).logits
    finally:
        del vars(head)["forward"]
        vars(head).update(own)
    return states.to(next((p.dtype for p in head.parameters() if p.is_floating_point()), states.dtype))


# Of both.


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error: std(ddof=1) / sqrt(n), None for one value."""
    numbers = torch.tensor(values, dtype=torch.float64)
    error = numbers.std().item() / math.sqrt(len(numbers)) if len(numbers) > 1 else None
    return numbers.mean().item(), error


def finite(losses: list[float], dataset: str, first: int, model: nn.Module, ids: Tensor) -> list[float]:
    """The losses of windows from number `first` on, if none is NaN or Inf. ids: what the model was given for them."""
    for window, loss in enumerate(losses, first):
        if not math.isfinite(loss):
            raise no_number(f"The loss on {dataset!r}, window {window}, is {loss}", model, ids)
    return losses


def on_text(dataset: str, windows: Ids, start: float) -> dict[str, Any]:
    """What is said of every measure on a text. start: when it was begun, by `time.perf_counter`."""
    count, seq_len = windows.shape
    said = {"dataset": dataset, "tokens": count * (seq_len - 1), "windows": count, "seq_len": seq_len}
    return {**said, "seconds": time.perf_counter() - start}
