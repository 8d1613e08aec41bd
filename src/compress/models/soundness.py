"""Find where a NaN or an Inf first appears, once there is one."""

from collections.abc import Callable
from functools import partial

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
