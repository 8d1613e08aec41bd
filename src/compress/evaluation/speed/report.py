"""All that is measured of two models, and the measuring in its order."""

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.errors import UsageError
from compress.evaluation.speed.footprint import Footprint, footprint
from compress.evaluation.speed.generation import Speeds, Workload, compare_generation
from compress.evaluation.speed.layerwise import Inputs, LinearSpeed, compare_linears, matched
from compress.evaluation.speed.memory import attempted, bytes_in_memory, free_bytes
from compress.evaluation.speed.timing import Comparison
from compress.models.soundness import check_sound, first_unsound
from compress.models.storage import num_parameters
from compress.models.stored_loading import open_model
from compress.progress import Progress, Steps, silent


@dataclass(frozen=True)
class Named:
    """A model's folder, and what to call it."""

    name: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Asked:
    """
    tokens: of linears by themselves; none of these without.
    """

    workloads: Sequence[Workload]
    rounds: int
    dtype: torch.dtype
    device: torch.device
    tokens: Sequence[int] = ()
    trust_remote_code: bool = False

    @property
    def largest(self) -> Workload:
        """At which memory is measured."""
        return max(self.workloads, key=lambda load: load.batch * (load.prompt + load.new))


@dataclass(frozen=True)
class Report:
    """
    models, parameters, footprints: of the dense one and the compressed one.
    machine: what it ran on.
    """

    models: tuple[Named, Named]
    parameters: tuple[int, int]
    footprints: tuple[Footprint, Footprint]
    asked: Asked
    machine: str
    speeds: list[Speeds]
    linears: list[LinearSpeed]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        sides = zip(("dense", "compressed"), self.models, self.parameters, self.footprints, strict=True)
        return {
            **{
                side: {"name": model.name, "parameters": parameters, **asdict(took)}
                for side, model, parameters, took in sides
            },
            "memory_at": asdict(self.asked.largest),
            "dtype": str(self.asked.dtype).removeprefix("torch."),
            "machine": self.machine,
            "rounds": self.asked.rounds,
            "generation": [generation_entry(speeds) for speeds in self.speeds],
            "linears": [linear_entry(each) for each in self.linears],
            "notes": self.notes,
        }


def generation_entry(speeds: Speeds) -> dict[str, Any]:
    load = speeds.workload
    return {
        **asdict(load),
        "prefill": rates(speeds.prefill, load.batch * load.prompt),
        "decode": rates(speeds.decode, load.batch * load.new),
    }


def rates(times: Comparison | None, tokens: int) -> dict[str, Any] | None:
    if times is None:
        return None
    spreads = {"dense": times.dense, "compressed": times.compressed}
    return {
        "seconds": {side: asdict(spread) for side, spread in spreads.items()},
        "tokens_per_second": {side: asdict(spread.inverse(tokens)) for side, spread in spreads.items()},
        "speedup": asdict(times.speedup),
    }


def linear_entry(speed: LinearSpeed) -> dict[str, Any]:
    dense, stored = speed.place.forms
    times = speed.times
    return {
        "name": speed.place.name,
        "linears": len(stored),
        "tokens": speed.tokens,
        "dense": asdict(dense),
        "compressed": [asdict(form) for form in dict.fromkeys(stored)],
        "seconds": None if times is None else {"dense": asdict(times.dense), "compressed": asdict(times.compressed)},
        "speedup": None if times is None else asdict(times.speedup),
    }


def measure(dense: Named, compressed: Named, asked: Asked, progress: Progress = silent) -> Report:
    """
    Raises UsageError where the two do not fit into memory together.
    """
    steps = Steps(progress, "measuring", 4 + len(asked.workloads))
    taken = []
    for model in (dense, compressed):
        steps.next(f"loading {model.name} in a clean process")
        taken.append(took(model, asked))
    with warnings_of_loading() as notes:
        models = open_both((dense, compressed), asked, steps)
    speeds = []
    for load in asked.workloads:
        steps.next(f"batch {load.batch}, prompt {load.prompt}")
        speeds.append(compare_generation(*models, load, rounds=asked.rounds))
    linears, further = layerwise(models, asked, steps) if asked.tokens else ([], [])
    steps.end()
    return Report(
        models=(dense, compressed),
        parameters=(num_parameters(models[0]), num_parameters(models[1])),
        footprints=(taken[0], taken[1]),
        asked=asked,
        machine=machine(asked.device),
        speeds=speeds,
        linears=linears,
        notes=[*notes, *further],
    )


def took(model: Named, asked: Asked) -> Footprint:
    trusted = asked.trust_remote_code
    return footprint(model.folder, asked.largest, dtype=asked.dtype, device=asked.device, trust_remote_code=trusted)


def open_both(named: tuple[Named, Named], asked: Asked, steps: Steps) -> tuple[PreTrainedModel, PreTrainedModel]:
    check_memory(named, asked)
    opened = []
    for model in named:
        steps.next(f"loading {model.name}")
        found = attempted(partial(opened_as, model, asked))
        if found is None:
            raise too_large(named, asked, free_bytes(asked.device))
        opened.append(found)
    return opened[0], opened[1]


def opened_as(model: Named, asked: Asked) -> PreTrainedModel:
    """Raises NumericalError for one that gives no numbers, whose speed says nothing."""
    trusted = asked.trust_remote_code
    opened = open_model(model.folder, dtype=asked.dtype, device=asked.device, trust_remote_code=trusted)
    run: Any = partial(opened, input_ids=torch.arange(2, device=asked.device)[None], use_cache=False)
    with torch.inference_mode():
        check_sound(run().logits, f"the logits of {model.name}", partial(first_unsound, opened, run))
    return opened


def check_memory(named: tuple[Named, Named], asked: Asked) -> None:
    """Raises UsageError where the weights of both are more than what is free."""
    free = free_bytes(asked.device)
    if sum(bytes_in_memory(model.folder, asked.dtype) for model in named) > free:
        raise too_large(named, asked, free)


def too_large(named: tuple[Named, Named], asked: Asked, free: int) -> UsageError:
    sizes = [bytes_in_memory(model.folder, asked.dtype) / 1e9 for model in named]
    dtype = str(asked.dtype).removeprefix("torch.")
    return UsageError(
        f"{named[0].name} ({sizes[0]:.1f} GB in {dtype}) and {named[1].name} ({sizes[1]:.1f} GB) are measured in turns "
        f"and do not fit together into the memory of {asked.device}, of which {free / 1e9:.1f} GB are free. "
        "Try --dtype bfloat16 or another --device."
    )


def layerwise(
    models: tuple[PreTrainedModel, PreTrainedModel], asked: Asked, steps: Steps
) -> tuple[list[LinearSpeed], list[str]]:
    """The linears' speeds, and what to know of those that are not among them."""
    found = matched(*models)
    steps.total += len(found.places) * len(asked.tokens)
    speeds = []
    for place in found.places:
        for tokens in asked.tokens:
            steps.next("linears by themselves")
            inputs = Inputs(tokens, asked.dtype, asked.device)
            speeds.append(compare_linears(place, inputs, rounds=asked.rounds))
    notes = []
    if found.missing:
        notes.append(f"Of the dense model's linears, {len(found.missing)} have no counterpart: {found.missing[0]}, ...")
    if found.added:
        notes.append(f"The compressed model has {len(found.added)} linears besides: {found.added[0]}, ...")
    return speeds, notes


@contextmanager
def warnings_of_loading() -> Iterator[list[str]]:
    """What this package warns of meanwhile, in a list."""
    notes: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    logger, handler = logging.getLogger("compress"), Noting(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield notes
    finally:
        logger.removeHandler(handler)


def machine(device: torch.device) -> str:
    versions = f"torch {torch.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {versions}"
    return f"{device.type} ({platform.machine()}), {torch.get_num_threads()} threads, {versions}"
