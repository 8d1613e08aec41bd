"""A whole model that is run: in evaluation mode, and where a NaN or Inf first appears, once there is one."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import NumericalError


def is_sound(tensor: Tensor) -> bool:
    """Whether every number is finite. A finite sum proves it in one pass; an infinite one proves nothing."""
    return bool(tensor.sum().isfinite()) or bool(torch.isfinite(tensor).all())


def check_sound(found: Tensor, what: str, where: Callable[[], str | None] = lambda: None) -> None:
    """Raises NumericalError where a number is not finite. where: `first_unsound` of the pass that it came from."""
    if is_sound(found):
        return
    first = where()
    raise NumericalError(
        f"There is a NaN or Inf in {what}{'' if first is None else f', first in {first}'}. "
        "Check the weights before it and the text."
    )


def first_unsound(root: nn.Module, run: Callable[[], object]) -> str | None:
    """Describe the first place in a forward pass that has a NaN or Inf; None where there is none.

    run: makes the pass once more, with all modules below `root` that have no parts watched.
    """
    found: list[str] = []

    def note(name: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if found or not has_unsound(output):
            return
        assert isinstance(output, Tensor)
        if any(map(has_unsound, module.parameters())):
            found.append(f"the weights of {name}")
        elif any(map(has_unsound, inputs)):
            found.append(f"what {name} is given")
        else:
            found.append(f"what {name} gives in {str(output.dtype).removeprefix('torch.')}")

    parts = [(name, module) for name, module in root.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(partial(note, name)) for name, module in parts]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return next(iter(found), None)


def has_unsound(value: object) -> bool:
    """Whether a tensor has a NaN or Inf; 8-bit floats are codes."""
    return isinstance(value, Tensor) and value.dtype.itemsize > 1 and not is_sound(value)


USUAL_CONTEXT = 2048
NO_LIMIT = 10**9  # transformers gives a larger number where a tokenizer has none


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
    gc.collect()
    torch.cuda.empty_cache()


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def no_number(what: str, model: nn.Module, ids: Tensor) -> NumericalError:
    """The error that says where in the model's pass over `ids` a NaN or Inf comes up first."""
    found = first_unsound(model, partial(model, input_ids=ids, use_cache=False))
    place = "" if found is None else f": a NaN or Inf comes up first in {found}"
    return NumericalError(f"{what}{place}. Check the weights, or try --dtype float32.")


def context_length(config: Any, tokenizer: Any) -> int:
    """Tokens that a model can read: of its config, else of its tokenizer, else 2048."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (length := getattr(config.get_text_config(), name, None)) is not None:
            return int(length)
    length = int(getattr(tokenizer, "model_max_length", None) or USUAL_CONTEXT)
    return length if length < NO_LIMIT else USUAL_CONTEXT
