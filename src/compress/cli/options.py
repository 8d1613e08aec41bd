"""Options that several commands have, in the same words, and how their values are read."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.errors import Faults, UsageError, unknown_name
from compress.launch import launch
from compress.numerics import DTYPES

if TYPE_CHECKING:
    import torch

    from compress.models.hub import ModelSource

Amounts = "How much"
Method = "Method"
Data = "Data"
Machine = "Machine"
Output = "Output"


def in_panel(panel: str, help: str, *, flag: str | None = None, **rules: Any) -> Any:
    """An option under a heading of the help page; `flag` is the name of one that has no --no- form."""
    return typer.Option(*([flag] if flag else []), help=help, rich_help_panel=panel, **rules)


Calibration = Annotated[
    str | None,
    in_panel(
        Data, "wikitext2, c4, ptb, alpaca, stdlib, or a .txt or .jsonl file. Default: wikitext2; stdlib for demo."
    ),
]
Samples = Annotated[int, in_panel(Data, "Calibration windows.", min=1)]
SeqLen = Annotated[int | None, in_panel(Data, "Tokens a window. Default: 2048, or what the model has.", min=2)]
DataDir = Annotated[
    Path | None,
    in_panel(Data, "Folder with data sets as plain files, for use offline.", envvar="COMPRESS_DATA_DIR"),
]
Seed = Annotated[int, in_panel(Data, "Of everything that is drawn at random.", min=0)]
Dtype = Annotated[str | None, in_panel(Output, "Of the written weights. Default: the model's own.")]
Json = Annotated[bool, in_panel(Output, "Print the result as JSON.", flag="--json")]
Device = Annotated[str | None, in_panel(Machine, "cuda, cuda:1, cpu; by default a GPU if there is one.")]
Profile = Annotated[
    bool, in_panel(Machine, "Print on stderr where the time went, by function and by kind of work.", flag="--profile")
]
BatchSize = Annotated[int | None, in_panel(Machine, "Windows at a time.", min=1)]

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", re.IGNORECASE)
SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_size(text: str, option: str) -> int:
    """Bytes from `8GB`, `500MB` or a plain number."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{option} takes a size such as 8GB or 500MB, got {text!r}.")
    return int(float(match[1]) * SCALES[match[2].lower()])


def check_dtype(name: str | None) -> None:
    if name is not None and name not in DTYPES:
        raise UsageError(unknown_name("dtype", name, DTYPES))


def look_at(
    faults: Faults, *, model: str, dtype: str | None, data_dir: Path | None, device: str | None
) -> "tuple[ModelSource, Path | None, torch.device]":
    """The model, data folder and device that were named. What is wrong with them is told with the faults so far.

    What can be seen without torch comes first, so that it comes at once.
    """
    from compress.datasets import data_directory
    from compress.models.hub import find_model

    with faults.noted():
        source = find_model(model)
    with faults.noted():
        check_dtype(dtype)
    with faults.noted():
        data_folder = data_directory(data_dir)
    if device is not None or not faults.found:
        with faults.noted():
            target = pick_device(device)
    faults.report()
    return source, data_folder, target


def pick_device(name: str | None) -> "torch.device":
    """The device asked for, or the best there is. Raises UsageError where torch cannot use it."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and launch().count > 1:
        name = own_gpu(name, torch.cuda.device_count())
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here. Try --device cpu.") from error
    return device


def own_gpu(name: str, gpus: int) -> str:
    """The GPU of this one of several processes. Raises UsageError where it has none to itself."""
    here = launch()
    if name != "cuda":
        raise UsageError(f"--device {name} is one GPU for {here.count} processes. Leave its number out.")
    if here.local_rank >= gpus:
        raise UsageError(
            f"{here.local_count} processes are started on this machine, which has {gpus} GPUs. "
            "Start one for each GPU, or add --device cpu."
        )
    return f"cuda:{here.local_rank}"


def usual_seq_len(config: object, asked: int | None, usual: int = 2048) -> int:
    """What was asked for, or 2048 tokens as in the papers, or all positions of a shorter model."""
    return asked if asked is not None else min(usual, getattr(config, "max_position_embeddings", usual))


def printable(command: str, options: dict[str, object]) -> str:
    """The command line that gives these options; True is a bare flag, False and None are left out."""
    words = [command]
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {quoted(str(value))}"))
    return " ".join(words)


def quoted(text: str) -> str:
    return shlex.quote(text)
