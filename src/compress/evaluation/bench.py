"""Two models that are measured beside one another: that they can be, what is measured, and in which order."""

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.calibration.weights import LazyWeights
from compress.checkpoints.metadata import METADATA, input_fingerprint
from compress.errors import CompressError, Problems, UsageError
from compress.evaluation.footprint import bytes_in_memory, bytes_on_disk, footprint
from compress.evaluation.speed import (
    Workload,
    attempted,
    compare_generation,
    compare_linears,
    current,
    free_bytes,
    matched,
)
from compress.models.hub import ModelSource
from compress.models.loading import load_config
from compress.models.soundness import check_sound, first_unsound
from compress.models.storage import num_parameters
from compress.models.stored_loading import open_model
from compress.models.untrusted import read_json
from compress.progress import Progress, Steps, silent

PROMPT_TOKENS, NEW_TOKENS = 128, 32  # by default


@dataclass(frozen=True)
class Named:
    """A model's folder, and what to call it."""

    name: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be timed. tokens: of linears by themselves; none of these without."""

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

    @property
    def options(self) -> dict[str, Any]:
        """How models are loaded."""
        return {"dtype": self.dtype, "device": self.device, "trust_remote_code": self.trust_remote_code}


# Before a weight is read.


def facts_of(folder: Path) -> dict[str, Any]:
    """What compress.json says; nothing where there is none, or where it is damaged."""
    with suppress(CompressError):
        return read_json(folder / METADATA)
    return {}


def look_at_pair(sources: Sequence[ModelSource], *, trust_remote_code: bool) -> tuple[tuple[Named, Named], list[Any]]:
    """Folders and configs of both, when nothing speaks against measuring the two together."""
    problems, configs = Problems(), []
    pair: list[Named] = []
    for source in sources:
        with problems.collect():
            pair.append(Named(source.name, source.whole_folder()))
            bytes_on_disk(pair[-1].folder)
        with problems.collect():
            configs.append(load_config(source.config_folder(), trust_remote_code=trust_remote_code))
    problems.report()
    sizes = [config.get_text_config().vocab_size for config in configs]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{pair[1].name} has a vocabulary of {sizes[1]:,} tokens and {pair[0].name} one of {sizes[0]:,}: "
            "a token of one is not a token of the other. Name the model it was made from: --against M."
        )
    return (pair[0], pair[1]), configs


def workloads(
    batches: Sequence[int] | None, prompts: Sequence[int] | None, new: int | None, configs: Sequence[Any]
) -> list[Workload]:
    """What was asked for. Defaults make way for a model with few positions, what was typed does not."""
    counts = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs]
    positions = min((count for count in counts if count is not None), default=None)
    most = positions or PROMPT_TOKENS + NEW_TOKENS
    decoded = new or max(1, min(NEW_TOKENS, most // 4))
    lengths = prompts or [max(1, min(PROMPT_TOKENS, most - decoded))]
    if positions is not None and max(lengths) + decoded > positions:
        raise UsageError(
            f"A prompt of {max(lengths)} and {decoded} new tokens are more than the model's {positions} positions. "
            f"Use --prompt {max(1, positions // 2)} --new {max(1, positions // 4)}, or less."
        )
    return [Workload(batch, length, decoded) for length in lengths for batch in batches or (1, 8)]


def other_source(dense: Named, compressed: Named) -> list[str]:
    """A note where the compressed model was made from other weights than those that it is compared with."""
    made_from = facts_of(compressed.folder).get("fingerprints", {}).get("model")
    if made_from is None:
        return []
    with suppress(CompressError):
        if input_fingerprint(dense.folder, LazyWeights(dense.folder)) == made_from:
            return []
    return [f"{compressed.name} was not made from {dense.name} as it is here."]


# Measuring.


def measure(dense: Named, compressed: Named, asked: Asked, progress: Progress = silent) -> dict[str, Any]:
    """The report, as `--json` prints it. Raises UsageError where the two do not fit into memory together."""
    steps, dtype = Steps(progress, "measuring", 4 + len(asked.workloads)), str(asked.dtype).removeprefix("torch.")
    named, sides, models = (dense, compressed), list[dict[str, Any]](), list[PreTrainedModel]()
    for model in named:
        steps.next(f"loading {model.name} in a clean process")
        sides.append({"name": model.name, **footprint(model.folder, asked.largest, **asked.options)})
    with warnings_of_loading() as notes, current(asked.device):
        needed = [bytes_in_memory(model.folder, asked.dtype) for model in named]
        for model in named if sum(needed) <= free_bytes(asked.device) else ():
            steps.next(f"loading {model.name}")
            if (opened := attempted(partial(open_sound, model, asked))) is not None:
                models.append(opened)
        if len(models) < len(named):
            of = [f"{each.name} ({count / 1e9:.1f} GB in {dtype})" for each, count in zip(named, needed, strict=True)]
            raise UsageError(
                f"{' and '.join(of)} are measured in turns and do not fit together into the memory of {asked.device}, "
                f"of which {free_bytes(asked.device) / 1e9:.1f} GB are free. Try --dtype bfloat16 or another --device."
            )
        speeds = []
        for load in asked.workloads:
            steps.next(f"batch {load.batch}, prompt {load.prompt}")
            speeds.append(compare_generation(models[0], models[1], load, rounds=asked.rounds))
        linears = layerwise(models, asked, steps, notes) if asked.tokens else []
    steps.end()
    for side, opened in zip(sides, models, strict=True):
        side["parameters"] = num_parameters(opened)
    return {
        **dict(zip(("dense", "compressed"), sides, strict=True)),
        "memory_at": asdict(asked.largest),
        "dtype": dtype,
        "machine": machine(asked.device),
        "rounds": asked.rounds,
        "generation": speeds,
        "linears": linears,
        "notes": notes,
    }


def open_sound(model: Named, asked: Asked) -> PreTrainedModel:
    """Raises NumericalError for one that gives no numbers, whose speed says nothing."""
    opened = open_model(model.folder, **asked.options)
    run: Any = partial(opened, input_ids=torch.arange(2, device=asked.device)[None], use_cache=False)
    with torch.inference_mode():
        check_sound(run().logits, f"the logits of {model.name}", partial(first_unsound, opened, run))
    return opened


def layerwise(models: Sequence[PreTrainedModel], asked: Asked, steps: Steps, notes: list[str]) -> list[dict[str, Any]]:
    """The linears' speeds; to the notes, what is not among them."""
    found = matched(models[0], models[1])
    steps.total += len(found.places) * len(asked.tokens)
    speeds = []
    for place in found.places:
        for tokens in asked.tokens:
            steps.next("linears by themselves")
            speeds.append(compare_linears(place, tokens, asked.dtype, asked.device, rounds=asked.rounds))
    if found.missing:
        notes.append(f"Of the dense model's linears, {len(found.missing)} have no counterpart: {found.missing[0]}, ...")
    if found.added:
        notes.append(f"The compressed model has {len(found.added)} linears besides: {found.added[0]}, ...")
    return speeds


@contextmanager
def warnings_of_loading() -> Iterator[list[str]]:
    """What this package warns of meanwhile, in a list."""
    notes: list[str] = []
    logger, handler = logging.getLogger("compress"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
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
