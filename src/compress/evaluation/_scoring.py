"""Log-likelihoods of continuations, computed as lm-evaluation-harness computes them (its HFLM).

Context and continuation are tokenized as one text and cut after as many tokens as the context alone has; spaces at the
context's end go to the continuation. Without a context the first token is the tokenizer's BOS, else its EOS. What is
longer than the model's context loses its first tokens. Log-probabilities are taken in float32 at least.

Texts are scored longest first, padded on the right, one forward pass a batch. Continuations that are read from the same
tokens, such as one-token answers to one question, share one row.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.errors import NumericalError, UsageError
from compress.evaluation._inference import evaluating, logits_at
from compress.models.soundness import first_unsound

USUAL_CONTEXT = 2048
NO_LIMIT = 10**9  # transformers says more than that where a tokenizer has none


class Request(NamedTuple):
    context: str
    continuation: str


class Likelihood(NamedTuple):
    """value: ln p(continuation | context). greedy: whether each of its tokens is the likeliest."""

    value: float
    greedy: bool


@dataclass(frozen=True)
class Encoded:
    """inputs: what the model reads, up to the token before the last. targets: the continuation's tokens."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def log_likelihoods(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    max_length: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """In the order of the requests. `on_batch` is told how many more are done.

    max_length: tokens that the model can read.
    Raises UsageError for a continuation that does not fit, NumericalError for one whose likelihood is no number.
    """
    by_inputs: dict[tuple[int, ...], list[tuple[int, Encoded]]] = defaultdict(list)
    for index, request in enumerate(requests):
        encoded = encode_pair(tokenizer, request, max_length)
        by_inputs[encoded.inputs].append((index, encoded))
    ordered = sorted(by_inputs, key=lambda inputs: (-len(inputs), inputs))
    found: dict[int, Likelihood] = {}
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            rows = [by_inputs[inputs] for inputs in ordered[start : start + batch_size]]
            scored = score_rows(model, rows)
            for index, likelihood in scored.items():
                check_likelihood(model, rows, requests[index], likelihood)
            found |= scored
            if on_batch:
                on_batch(len(scored))
    return [found[index] for index in range(len(requests))]


def check_likelihood(
    model: nn.Module, rows: Sequence[Sequence[tuple[int, Encoded]]], request: Request, found: Likelihood
) -> None:
    if found.value == found.value:
        return
    place = first_unsound(model, partial(score_rows, model, rows))
    raise NumericalError(
        f"The likelihood of {request.continuation[:40]!r} is no number"
        f"{'' if place is None else f': a NaN or Inf comes up first in {place}'}. "
        "Check the weights, or try --dtype float32."
    )


def score_rows(model: nn.Module, rows: Sequence[Sequence[tuple[int, Encoded]]]) -> dict[int, Likelihood]:
    """By the request's number. A row is one text with its continuations; the first row is the longest."""
    device = next(model.parameters()).device
    inputs = [row[0][1].inputs for row in rows]
    length = len(inputs[0])
    ids = torch.tensor([[*each, *[0] * (length - len(each))] for each in inputs], device=device)
    first = min(len(each.inputs) - len(each.targets) for row in rows for _, each in row)
    logits = logits_at(model, ids, range(first, length))
    found = {}
    for row, row_logits in zip(rows, logits, strict=True):
        for index, each in row:
            end = len(each.inputs) - first
            found[index] = likelihood(row_logits[end - len(each.targets) : end], each.targets)
    return found


def likelihood(logits: Tensor, targets: Sequence[int]) -> Likelihood:
    """logits: (targets, vocabulary)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    tokens = torch.tensor(targets, device=logits.device)
    log_p = logits.to(wide).log_softmax(-1)
    picked = log_p.gather(-1, tokens[:, None])
    return Likelihood(float(picked.sum()), bool((log_p.argmax(-1) == tokens).all()))


def encode_pair(tokenizer: Any, request: Request, max_length: int) -> Encoded:
    context, continuation = split_tokens(tokenizer, request)
    if not continuation:
        raise UsageError(f"The answer {request.continuation!r} has no token of its own. Correct the task's file.")
    if len(continuation) > max_length:
        raise UsageError(
            f"The answer {request.continuation[:40]!r}... has {len(continuation)} tokens, and the model reads "
            f"{max_length} at most. Leave the task out."
        )
    tokens = (context + continuation)[-(max_length + 1) :]
    return Encoded(tuple(tokens[:-1]), tuple(continuation))


def split_tokens(tokenizer: Any, request: Request) -> tuple[list[int], list[int]]:
    """The tokens of context and continuation."""
    beginning = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    context = request.context.rstrip()
    continuation = request.context[len(context) :] + request.continuation
    if context:
        whole = encode(tokenizer, context + continuation, beginning)
        alone = encode(tokenizer, context, beginning)
        return alone, whole[len(alone) :]
    tokens = tokenizer.encode(continuation, add_special_tokens=False)
    if tokens[:1] == [beginning]:
        return tokens[:1], tokens[1:]
    if beginning is None:
        raise UsageError("The tokenizer has neither BOS nor EOS to start an answer without a question.")
    return [beginning], tokens


def encode(tokenizer: Any, text: str, beginning: int | None) -> list[int]:
    """With the tokenizer's special tokens, unless the text begins with one already. Not verbose: it may be long."""
    begun = beginning is not None and text.startswith(tokenizer.decode([beginning]))
    special = {"add_special_tokens": False} if begun else {}
    tokens: list[int] = tokenizer(text, verbose=False, return_attention_mask=False, **special)["input_ids"]
    return tokens


def context_length(config: Any, tokenizer: Any) -> int:
    """Tokens that a model can read: of its config, else of its tokenizer, else 2048."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (length := getattr(config.get_text_config(), name, None)) is not None:
            return int(length)
    length = int(getattr(tokenizer, "model_max_length", None) or USUAL_CONTEXT)
    return length if length < NO_LIMIT else USUAL_CONTEXT
