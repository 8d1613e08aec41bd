"""How far a model's next-token distribution is from the dense model's.

KL(dense || model) in nats a token, the mean over the tokens that perplexity predicts, and the share of them for which
both models think the same token the likeliest. The standard error is that of the mean over windows, None for one.

The two models are never in memory together: of the dense one what its head reads is kept, one vector a token, and the
head. Softmax in float64, over a few tokens at a time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.checkpoints.quality import Divergence
from compress.errors import UnsupportedModel, UsageError
from compress.evaluation._inference import device_of, evaluating, finite, ignore, mean_and_error, on_text
from compress.numerics.losses import kl_divergence

# Numbers of a softmax that are held at a time: a row is as wide as the vocabulary.
LOGITS_AT_ONCE = 2**24
# Of the largest logit: the same head on the same states, but on other rows at a time.
HEAD_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Reference:
    """The dense model on some windows. states: what its head reads, on the CPU; head: is left on its device."""

    dense: str
    head: nn.Module
    states: Float[Tensor, "windows seq_len hidden"]


def remember(
    dense: PreTrainedModel,
    windows: Int64[Tensor, "windows seq_len"],
    *,
    name: str,
    batch_size: int,
    on_batch: Callable[[int], None] = ignore,
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
    windows: Int64[Tensor, "windows seq_len"],
    *,
    dataset: str,
    batch_size: int,
    on_batch: Callable[[int], None] = ignore,
) -> Divergence:
    """The model's divergence from the remembered one on the same windows."""
    start = time.perf_counter()
    means: list[float] = []
    agreed = 0
    tokens = windows.shape[1] - 1
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
        agreement=agreed / (tokens * len(means)),
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
    """The states that the head reads, in its dtype."""
    with passing_on(head):
        states: Tensor = model(input_ids=batch.to(device_of(model)), use_cache=False).logits
    return states.to(next((p.dtype for p in head.parameters() if p.is_floating_point()), states.dtype))


@contextmanager
def passing_on(head: nn.Module) -> Iterator[None]:
    """The head gives what it reads, so that the model's logits are never all there at once."""
    own = head.__dict__.get("forward")
    vars(head)["forward"] = lambda states: states
    try:
        yield
    finally:
        if own is None:
            del vars(head)["forward"]
        else:
            vars(head)["forward"] = own
