"""Find where a NaN or an Inf first appears, once there is one."""

from collections.abc import Callable

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

    def watch(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if not found and (what := unsound_at(module, inputs, output)) is not None:
                found.append(what.format(name))

        return note

    parts = [(name, module) for name, module in root.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in parts]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return next(iter(found), None)


def unsound_at(module: nn.Module, inputs: tuple[object, ...], output: object) -> str | None:
    if not has_unsound(output):
        return None
    if any(map(has_unsound, module.parameters())):
        return "the weights of {}"
    if any(map(has_unsound, inputs)):
        return "what {} is given"
    assert isinstance(output, Tensor)
    return f"what {{}} gives in {str(output.dtype).removeprefix('torch.')}"


def has_unsound(value: object) -> bool:
    """Whether a tensor has a NaN or Inf; 8-bit floats are codes."""
    return isinstance(value, Tensor) and value.dtype.itemsize > 1 and not is_sound(value)
