"""What the measures share: a model in evaluation mode, losses that must be numbers, their mean and its error."""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import NumericalError
from compress.models.soundness import first_unsound

USUAL_CONTEXT = 2048
NO_LIMIT = 10**9  # transformers gives a larger number where a tokenizer has none


def ignore(_count: int) -> None:
    """Tell nobody."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients; its modules are put back as they were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def free_memory() -> None:
    """Free the memory of what nobody holds any more."""
    gc.collect()
    torch.cuda.empty_cache()


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def no_number(what: str, model: nn.Module, ids: Tensor) -> NumericalError:
    """The error that says where in the model's pass over `ids` a NaN or Inf comes up first."""
    found = first_unsound(model, partial(model, input_ids=ids, use_cache=False))
    place = "" if found is None else f": a NaN or Inf comes up first in {found}"
    return NumericalError(f"{what}{place}. Check the weights, or try --dtype float32.")


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error: std(ddof=1) / sqrt(n), None for one value."""
    numbers = torch.tensor(values, dtype=torch.float64)
    error = numbers.std().item() / math.sqrt(len(numbers)) if len(numbers) > 1 else None
    return numbers.mean().item(), error


def context_length(config: Any, tokenizer: Any) -> int:
    """Tokens that a model can read: of its config, else of its tokenizer, else 2048."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (length := getattr(config.get_text_config(), name, None)) is not None:
            return int(length)
    length = int(getattr(tokenizer, "model_max_length", None) or USUAL_CONTEXT)
    return length if length < NO_LIMIT else USUAL_CONTEXT
