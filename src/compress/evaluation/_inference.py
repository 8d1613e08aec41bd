"""What the measures share: a model ready to be asked, and losses that must be numbers."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from compress.errors import NumericalError


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


def logits_at(
    model: nn.Module, ids: Int64[Tensor, "batch seq_len"], positions: range
) -> Float[Tensor, "batch positions vocab"]:
    """The logits at some positions; no others are computed where the model can leave them out."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
    kept: dict[str, Any] = {}
    if takes_any or any(parameter.name == "logits_to_keep" for parameter in parameters):
        kept["logits_to_keep"] = torch.tensor(positions, device=ids.device)
    logits: Tensor = model(input_ids=ids, use_cache=False, **kept).logits
    return logits if logits.shape[1] == len(positions) else logits[:, positions.start : positions.stop]
