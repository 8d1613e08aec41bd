"""`compress bench`: speed, memory and size of a compressed model beside the dense one's, in one run."""

import re
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.bench_tables import show
from compress.cli.options import (
    Device,
    Json,
    Machine,
    Method,
    TrustRemoteCode,
    check_dtype,
    computing_dtype,
    in_panel,
    newest_output,
    pick_device,
)
from compress.cli.progress import progress_bar
from compress.cli.reporting import print_json, quiet_libraries, reporting_errors
from compress.errors import CompressError, Problems, UsageError

if TYPE_CHECKING:
    from compress.evaluation.speed.generation import Workload
    from compress.evaluation.speed.report import Named
    from compress.models.hub import ModelSource

OUT = "A compressed model, or any other. Default: the newest under ./compressed."
AGAINST = "The model to compare with. Default: the base model of OUT, where it is found by its name."
BATCH_SIZES = "Sequences per batch; several with commas. Default: 1,8."
PROMPT = "Prompt length in tokens; several with commas. Default: 128."
NEW = "New tokens per sequence. Default: 32."
ROUNDS = "Repetitions of each measurement, the two models alternating."
LAYERWISE = "Time single linear layers too, as SLiM reports speed."
TOKENS = "Tokens per call of a linear layer, with --layerwise. Default: 1,16,128."
DTYPE = "Dtype of both models. Default: OUT's own, on the CPU at least float32."
PROMPT_TOKENS, NEW_TOKENS = 128, 32  # by default


@reporting_errors
def bench(
    out: Annotated[str | None, typer.Argument(help=OUT, show_default=False)] = None,
    against: Annotated[str | None, typer.Option(help=AGAINST, show_default=False)] = None,
    batch_sizes: Annotated[str | None, in_panel(Method, BATCH_SIZES)] = None,
    prompt: Annotated[str | None, in_panel(Method, PROMPT)] = None,
    new: Annotated[int | None, in_panel(Method, NEW, min=1)] = None,
    rounds: Annotated[int, in_panel(Method, ROUNDS, min=1)] = 7,
    layerwise: Annotated[bool, in_panel(Method, LAYERWISE, flag="--layerwise")] = False,
    tokens: Annotated[str | None, in_panel(Method, TOKENS)] = None,
    dtype: Annotated[str | None, in_panel(Machine, DTYPE)] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Measure speed, memory and size of a compressed model beside the dense one, in turns.

    Example: compress bench compressed/opt-125m-anchored-kp0.75 --against opt-125m
    """
    problems, lists = Problems(), {"batch-sizes": batch_sizes, "prompt": prompt, "tokens": tokens}
    numbers = {name: parse_numbers(problems, name, text) for name, text in lists.items() if text is not None}
    with problems.collect():
        if tokens is not None and not layerwise:
            raise UsageError("--tokens has no effect without --layerwise. Add it, or leave --tokens out.")
    with problems.collect():
        check_dtype(dtype)
    pair = find_pair(problems, out, against)
    if device is not None or not problems.found:
        with problems.collect():
            target = pick_device(device)
    problems.report()

    from compress.evaluation.speed.report import Asked, measure

    quiet_libraries()
    dense, compressed = named_pair(problems, pair)
    configs = look_at_pair(problems, (dense, compressed), trust_remote_code=trust_remote_code)
    with problems.collect():
        loads = workloads(numbers, new, shortest(configs))
    problems.report()
    asked = Asked(
        workloads=loads,
        rounds=rounds,
        dtype=computing_dtype(dtype, configs[1], target),
        device=target,
        tokens=numbers.get("tokens", [1, 16, 128]) if layerwise else [],
        trust_remote_code=trust_remote_code,
    )
    with progress_bar("preparing") as progress:
        report = measure(dense, compressed, asked, progress)
    report.notes.extend(other_source(dense, compressed))
    if json:
        print_json(report.to_dict())
    else:
        show(report)


def parse_numbers(problems: Problems, option: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    with problems.collect():
        if not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
            raise UsageError(f"--{option} takes whole numbers from 1 on, with commas between, got {text!r}. Try 1,8.")
        return list(dict.fromkeys(map(int, words)))
    return []


def find_pair(problems: Problems, out: str | None, against: str | None) -> "list[ModelSource]":
    """The dense model and the compressed one, as far as they are found."""
    from compress.models.hub import find_model

    found = []
    with problems.collect():
        name = out or newest_output()
        if name is None:
            raise UsageError("There is no output under ./compressed. Name a model: compress bench OUT.")
        found.append(find_model(str(name)))
    with problems.collect():
        if against is not None:
            found.insert(0, find_model(against))
        elif found:
            found.insert(0, base_of(found[0]))
    return found


def base_of(source: "ModelSource") -> "ModelSource":
    from compress.models.hub import find_model

    name = facts_of(source.folder).get("base_model") if source.folder else None
    if not isinstance(name, str):
        raise UsageError(f"{source.name} does not say what it was made from. Name a model: --against M.")
    try:
        return find_model(name)
    except UsageError as error:
        raise UsageError(
            f"{source.name} was made from {name!r}, which is no folder here, no alias and no id of the hub. "
            "Say where it is: --against FOLDER."
        ) from error


def facts_of(folder: Path) -> dict[str, Any]:
    """What compress.json says; nothing where there is none, or where it is damaged."""
    from compress.checkpoints.metadata import METADATA
    from compress.models.untrusted import read_json

    with suppress(CompressError):
        return read_json(folder / METADATA)
    return {}


def named_pair(problems: Problems, pair: "list[ModelSource]") -> "tuple[Named, Named]":
    from compress.evaluation.speed.report import Named

    found = []
    for source in pair:
        with problems.collect():
            found.append(Named(source.name, source.whole_folder()))
    problems.report()
    return found[0], found[1]


def look_at_pair(problems: Problems, pair: "tuple[Named, Named]", *, trust_remote_code: bool) -> list[Any]:
    """Both configs, when nothing speaks against measuring the two together."""
    from compress.evaluation.speed.memory import bytes_on_disk
    from compress.models.loading import load_config

    configs = []
    for model in pair:
        with problems.collect():
            configs.append(load_config(model.folder, trust_remote_code=trust_remote_code))
        with problems.collect():
            bytes_on_disk(model.folder)
    problems.report()
    sizes = [config.get_text_config().vocab_size for config in configs]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{pair[1].name} has a vocabulary of {sizes[1]:,} tokens and {pair[0].name} one of {sizes[0]:,}: "
            "a token of one is not a token of the other. Name the model it was made from: --against M."
        )
    return configs


def shortest(configs: list[Any]) -> int | None:
    """Positions that both models have; None where neither says."""
    counts = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs]
    return min((count for count in counts if count is not None), default=None)


def workloads(numbers: dict[str, list[int]], new: int | None, positions: int | None) -> "list[Workload]":
    """What was asked for. Defaults make way for a model with few positions, what was typed does not."""
    from compress.evaluation.speed.generation import Workload

    most = positions or PROMPT_TOKENS + NEW_TOKENS
    decoded = new or max(1, min(NEW_TOKENS, most // 4))
    lengths = numbers.get("prompt") or [max(1, min(PROMPT_TOKENS, most - decoded))]
    if positions is not None and max(lengths) + decoded > positions:
        raise UsageError(
            f"A prompt of {max(lengths)} and {decoded} new tokens are more than the model's {positions} positions. "
            f"Use --prompt {max(1, positions // 2)} --new {max(1, positions // 4)}, or less."
        )
    return [
        Workload(batch, length, decoded) for length, batch in product(lengths, numbers.get("batch-sizes") or [1, 8])
    ]


def other_source(dense: "Named", compressed: "Named") -> list[str]:
    """A note where the compressed model was made from other weights than those that it is compared with."""
    from compress.calibration.weights import LazyWeights
    from compress.checkpoints.metadata import input_fingerprint

    made_from = facts_of(compressed.folder).get("fingerprints", {}).get("model")
    if made_from is None:
        return []
    with suppress(CompressError):
        if input_fingerprint(dense.folder, LazyWeights(dense.folder)) == made_from:
            return []
    return [f"{compressed.name} was not made from {dense.name} as it is here."]
