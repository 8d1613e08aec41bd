"""Measure the KL divergence from the dense model's next-token distribution on held-out windows."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from compress.calibration.streams import Streams, rows
from compress.errors import NumericalError
from compress.models.branch import Branch
from compress.numerics.losses import kl_divergence

# Tokens whose logits are held at a time: a row of them is as wide as the vocabulary.
LOGITS_AT_ONCE = 256


def copy_linears(linears: Iterable[nn.Linear]) -> list[nn.Linear]:
    """Snapshot the linears. Weights are replaced and never written in place, so nothing is copied."""
    copies = []
    for linear in linears:
        with torch.device("meta"):
            copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        copy.weight, copy.bias = linear.weight, linear.bias
        copies.append(copy)
    return copies


def mean_divergence(head: Branch, dense_readers: Sequence[nn.Linear], streams: Streams) -> float | None:
    """Return KL(dense || compressed) of the next token in nats, averaged over held-out tokens; None without any."""
    if streams.dense is None:
        return None
    total, tokens = torch.zeros((), dtype=torch.float64, device=streams.decoder.device), 0
    (linear,), (dense_linear,) = head.readers.values(), dense_readers
    assert head.norm is not None
    logits_of = streams.decoder.logits_of
    for batch in (batch for batch in streams.batches if batch.held_out):
        compressed, dense = streams.now(batch)
        assert dense is not None
        for z, x in zip(*(rows(stream).split(LOGITS_AT_ONCE) for stream in (compressed, dense)), strict=True):
            total += kl_divergence(logits_of(dense_linear(head.norm(x))), logits_of(linear(head.norm(z)))).sum()
            tokens += len(x)
    streams.processes.add_up(total)
    tokens, divergence = streams.processes.total(tokens), float(total)
    if not math.isfinite(divergence):
        raise NumericalError("There is a NaN or Inf in the logits on held-out windows. Check the weights of the head.")
    return divergence / tokens if tokens else None
