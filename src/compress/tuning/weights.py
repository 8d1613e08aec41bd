"""Weights of floats that are trained themselves: the factors of thin linears, or every one that a model has."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compress.tuning.lora import Settled
from compress.tuning.structure import thin_linears


class Weights:
    """
    parameters: by their names in the model, tied ones once.
    """

    def __init__(self, model: PreTrainedModel, parameters: dict[str, nn.Parameter]) -> None:
        model.requires_grad_(False)
        self.model: Any = model
        self.parameters = parameters
        for parameter in parameters.values():
            parameter.requires_grad_()

    def settled(self) -> Settled:
        return Settled({name: parameter.detach() for name, parameter in self.parameters.items()}, {})


def all_weights(model: PreTrainedModel) -> Weights:
    return Weights(model, {name: each for name, each in model.named_parameters() if each.is_floating_point()})


def factors(model: PreTrainedModel) -> Weights:
    """Of every thin linear both, with their biases."""
    found = {f"{path}.{name}": each for path, thin in thin_linears(model) for name, each in thin.named_parameters()}
    return Weights(model, found)
