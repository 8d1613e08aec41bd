"""What of a checkpoint can be trained, and which linears those are: by how it is stored and by its family's table."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from compress import families
from compress.checkpoints.metadata import Metadata
from compress.errors import UsageError
from compress.models.storage import LoraLinear
from compress.own_model.modeling_compress import CompactLinear, LowRankLinear, PivotLinear
from compress.tuning.settings import What

HOW = "compress slim --adapter-rank 0.1"


def trainable(metadata: Metadata, model: nn.Module) -> tuple[What, ...]:
    """What can be trained without another form or another size, but for a LoRA's; the usual one first.

    model: it may be on the meta device. Raises UsageError where nothing can.
    """
    if metadata.storage == "compact":
        if not any(linear.first is not None for linear in compact_linears(model).values()):
            raise UsageError(
                "This compact checkpoint has no adapters, and its weights are kept as they are stored: nothing in it "
                f"can be trained. Make one with adapters: {HOW} --compact."
            )
        return ("adapters",)
    if metadata.adapter is not None:
        return ("adapters",)
    if metadata.storage == "packed":
        return ("lora",)
    return ("factors", "lora", "all") if any(thin_linears(model)) else ("lora", "all")


def why_not_merged(metadata: Metadata) -> str | None:
    """Why what a LoRA adds cannot go into the weights; None where it can."""
    if metadata.storage is not None:
        return "its weights are stored in few bits"
    if any(linear.pattern for linear in metadata.linears):
        return "its weights are pruned, and the sum would fill the zeros"
    if any(linear.bits for linear in metadata.linears):
        return "its weights lie on a grid of few bits, and the sum would not"
    if metadata.loads_without_our_code and any(linear.form for linear in metadata.linears):
        return "its weights are multiplied out from low ranks, and the sum would have others"
    return None


def block_linears(model: nn.Module, config: Any) -> dict[str, nn.Linear | LoraLinear]:
    """Every linear of the blocks by its path, shortcuts and the two of a product included."""
    start = f"{families.find(config.get_text_config()).blocks}."
    kinds = (nn.Linear, LoraLinear)
    return {
        path: module for path, module in model.named_modules() if path.startswith(start) and isinstance(module, kinds)
    }


def thin_linears(model: nn.Module) -> Iterator[tuple[str, LowRankLinear | PivotLinear]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LowRankLinear | PivotLinear))


def compact_linears(model: nn.Module) -> dict[str, CompactLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, CompactLinear)}


def adapted_linears(model: nn.Module) -> dict[str, LoraLinear]:
    found = {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}
    return {path: module for path, module in found.items() if module.lora_A is not None}


def chosen(asked: What | None, possible: tuple[What, ...]) -> What:
    """Raises UsageError for what this checkpoint has not."""
    if asked is None:
        return possible[0]
    if asked not in possible:
        raise UsageError(f"--train {asked} is not for this checkpoint. It has: {', '.join(possible)}.")
    return asked


def num_trained(what: What, model: nn.Module, config: Any, rank: int) -> int:
    """
    model: on the meta device.
    """
    if what == "lora":
        linears = block_linears(model, config).values()
        return sum(rank * (linear.in_features + linear.out_features) for linear in linears)
    if what == "adapters":
        packed = [part for each in adapted_linears(model).values() for part in (each.lora_A, each.lora_B)]
        compact = [part for each in compact_linears(model).values() for part in (each.first, each.second)]
        return sum(p.numel() for p in packed if p is not None) + sum(p.num_parameters for p in compact if p is not None)
    parameters = model.parameters() if what == "all" else thin_parameters(model)
    return sum(each.numel() for each in parameters)


def thin_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [each for _, thin in thin_linears(model) for each in thin.parameters()]
