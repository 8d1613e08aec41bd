"""How many numbers a model stores."""

from torch import nn

from compress.own_model.modeling_compress import AdaptedLinear


def num_parameters(module: nn.Module) -> int:
    """A tied weight counts once. Of a linear stored in fewer bits, what it keeps of its weight and adapter."""
    stored = [part for part in module.modules() if isinstance(part, AdaptedLinear)]
    counted = {id(parameter) for part in stored for parameter in part.parameters()}
    plain = (parameter.numel() for parameter in module.parameters() if id(parameter) not in counted)
    return sum(part.num_parameters for part in stored) + sum(plain)
