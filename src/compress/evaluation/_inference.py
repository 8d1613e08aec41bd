"""What the measures share: a model in evaluation mode, its context length, and losses that must be numbers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from compress.errors import NumericalError

USUAL_CONTEXT = 2048
NO_LIMIT = 10**9  # transformers gives a larger number where a tokenizer has none


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; its modules are put back as they were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def finite(
    losses: list[float], dataset: str, first: int, where: Callable[[], str | None] = lambda: None
) -> list[float]:
    """The losses of windows from number `first` on, if none is NaN or Inf. where: the first such place in the model."""
    for window, loss in enumerate(losses, first):
        if not math.isfinite(loss):
            place = "" if (found := where()) is None else f": a NaN or Inf comes up first in {found}"
            raise NumericalError(
                f"The loss on {dataset!r}, window {window}, is {loss}{place}. "
                "Check the weights, or try --dtype float32."
            )
    return losses


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it, which knows no NaN: an unknown standard error is None."""
    return {key: None if value != value else value for key, value in values.items()}


def context_length(config: Any, tokenizer: Any) -> int:
    """Tokens that a model can read: of its config, else of its tokenizer, else 2048."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (length := getattr(config.get_text_config(), name, None)) is not None:
            return int(length)
    length = int(getattr(tokenizer, "model_max_length", None) or USUAL_CONTEXT)
    return length if length < NO_LIMIT else USUAL_CONTEXT
