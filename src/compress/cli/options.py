"""Options that several commands have, in the same words, and how their values are read."""

import functools
import inspect
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from compress.datasets import data_directory
from compress.errors import Problems, UsageError, unknown_name
from compress.models.hub import ModelSource, find_model
from compress.numerics import DTYPES
from compress.process import launch

if TYPE_CHECKING:
    import torch


class Panel:
    """A heading of the help page; called, it gives an option under it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, help: str, flag: str | None = None, *, sets: Any = None, **rules: Any) -> Any:
        """Make an option under this heading.

        flag: the name of an option that has no --no- form. sets: the address in the recipe of what is typed; or that,
            and the value of a flag that is given, or what makes a value of the words that are typed.
        """
        option = typer.Option(*([flag] if flag else []), help=help, rich_help_panel=self.name, **rules)
        option.sets = (sets, None) if isinstance(sets, str) else sets
        return option


Amounts, Method, Data, Machine, Output = map(Panel, ("How much", "Method", "Data", "Machine", "Output"))
PROFILE = "Print on stderr where the time went, by function and by kind of work."
DATA_DIR = "Folder with data sets as plain files, for use offline."
DataDir = Annotated[Path | None, Data(DATA_DIR, envvar="COMPRESS_DATA_DIR")]
Json = Annotated[bool, Output("Print the result as JSON.", "--json")]
Save = Annotated[bool, Output("Keep the result in quality.json in the checkpoint's folder.", "--save")]
Device = Annotated[str | None, Machine("cuda, cuda:1, cpu. Default: a GPU if there is one.")]
Engine = Literal["transformers", "llamacpp"]
BatchSize = Annotated[int | None, Machine("Sequences per batch.", min=1)]
TrustRemoteCode = Annotated[bool, Machine("Run modeling code that the model brings along.", "--trust-remote-code")]


@dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """The options of every command that writes a checkpoint, as they were typed.

    typed: all that were. in_recipe: of those that set something there: the address, the value, the words that were
        typed.
    """

    data_dir: DataDir = None
    seed: Annotated[int | None, Data("Random seed. Default: 42.", min=0, sets="seed")] = None
    out: Annotated[Path | None, Output("Output folder. Default: ./compressed/MODEL-METHOD-AMOUNT.")] = None
    dtype: Annotated[str | None, Output("Dtype of the written weights. Default: the model's own.", sets="dtype")] = None
    resume: Annotated[bool, Output("Resume an interrupted run, if there is one.", "--resume")] = False
    overwrite: Annotated[bool, Output("Replace the output if it exists.", "--overwrite")] = False
    dry_run: Annotated[bool, Output("Show what would be done, and write nothing.", "--dry-run")] = False
    json: Json = False
    device: Device = None
    profile: Annotated[bool, Machine(PROFILE, "--profile")] = False
    typed: Mapping[str, Any] = field(default_factory=dict)
    in_recipe: Sequence[tuple[str, Any, str]] = ()

    def command(self, verb: str, **named: Any) -> str:
        """The command line that makes the same result: what was typed, without what does not change it.

        named: in place of what was typed, such as a model by its name and not by its folder.
        """
        told = {name: value for name, value in self.typed.items() if name not in WITHOUT_EFFECT}
        words = (words_of(name, value) for name, value in (named | told | named).items())
        return " ".join(["compress", verb, *(shlex.quote(word) for each in words for word in each)])


# Of the options above and of those that compress a model.
WITHOUT_EFFECT = (
    *("data_dir", "out", "resume", "overwrite", "dry_run", "json", "device", "profile"),
    *("push_to_hub", "show_recipe", "max_memory", "cache_memory", "recipe", "folder"),
)
TOLD = ("typed", "in_recipe")  # fields of a group that are no options


def with_options(group: type[Any], *, without: Sequence[str] = ()) -> Callable[..., Callable[..., None]]:
    """Give a command the options of a group besides its own; its function gets them as the first argument.

    An option of its own takes the place of the shared one of that name. without: shared ones that it lacks.
    """

    def decorated(body: Callable[..., None]) -> Callable[..., None]:
        own = dict(list(inspect.signature(body).parameters.items())[1:])
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        shared = {
            each.name: inspect.Parameter(each.name, kind, default=each.default, annotation=each.type)
            for each in fields(group)
            if each.name not in (*TOLD, *without)
        }
        # The model first, then what is the command's own, then what fewest commands share.
        declared = [name for each in group.__mro__ for name in inspect.get_annotations(each)]
        first = () if "model" in own else ("model",)
        order = [name for name in dict.fromkeys([*first, *own, *declared]) if name in shared | own]
        parameters = {name: (shared | own)[name] for name in order}
        signature = inspect.Signature([each.replace(kind=kind) for each in parameters.values()])

        @functools.wraps(body)
        def command(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            given = {
                name: value
                for name, value in bound.arguments.items()
                if value != parameters[name].default and value not in ([], ())
            }
            bound.apply_defaults()
            values, told = bound.arguments, dict[str, Any]()
            if issubclass(group, WritingOptions):
                settings = [setting_of(parameters[name].annotation, name, value) for name, value in given.items()]
                told = {"typed": given, "in_recipe": [each for each in settings if each is not None]}
            options = group(**{name: values[name] for name in shared}, **told)
            body(options, **{name: values[name] for name in own})

        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {name: each.annotation for name, each in parameters.items()}
        return command

    return decorated


def setting_of(annotation: Any, name: str, typed: Any) -> tuple[str, Any, str] | None:
    """The address in the recipe that an option sets, the value, and what was typed; None for one that sets none."""
    sets = getattr(get_args(annotation)[-1], "sets", None)
    if sets is None:
        return None
    address, value = sets
    typed_as = " ".join(words_of(name, typed))
    return address, (value(typed) if callable(value) else typed if value is None else value), typed_as


def flag_of(name: str) -> str:
    """What a parameter is called on the command line."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def words_of(name: str, value: Any) -> list[str]:
    """What is typed to give a parameter this value."""
    if isinstance(value, list):
        return [word for each in value for word in words_of(name, each)]
    if isinstance(value, bool):
        return [flag_of(name if value else f"no_{name}")]
    return [flag_of(name), str(int(value) if isinstance(value, float) and value.is_integer() else value)]


def names_in(text: str | None) -> list[str] | None:
    """The names between commas, once each."""
    if text is None:
        return None
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


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


@dataclass(frozen=True)
class Found:
    """What the options name. device: None where it cannot be used."""

    models: list[ModelSource]
    data_dir: Path | None
    device: Any


def look_at(
    problems: Problems,
    names: Sequence[str],
    *,
    data_dir: Path | None,
    device: str | None,
    dtype: str | None = None,
    check: Callable[[], object] | None = None,
) -> Found:
    """Models, data folder and device; what is wrong is noted.

    What can be seen without torch comes first, so that it comes at once. check: what else is looked at, with torch: not
    where that would hold up that a model is misspelt.
    """
    models = [model for name in names if (model := problems.check(find_model, name)) is not None]
    problems.check(check_dtype, dtype)
    folder = problems.check(data_directory, data_dir)
    if check is not None and (device is not None or len(models) == len(names)):
        problems.check(check)
    target = problems.check(pick_device, device) if device is not None or not problems.found else None
    return Found(models, folder, target)


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


def kept_in(source: ModelSource) -> Path:
    """The folder of a model's quality.json, of a GGUF file its checkpoint's. Raises UsageError where there is none."""
    beside = None if source.gguf is None else source.gguf.parent
    if beside is not None and (beside / "compress.json").is_file() and not (beside / "config.json").exists():
        return beside
    if source.folder is None or source.is_demo:
        raise UsageError(f"--save keeps quality.json in a checkpoint's folder; {source.name} is none of yours.")
    return source.folder


def usual_seq_len(config: object, asked: int | None, usual: int = 2048) -> int:
    """What was asked for, or 2048 tokens as in the papers, or all positions of a shorter model."""
    return asked if asked is not None else min(usual, getattr(config, "max_position_embeddings", usual))


def newest_output() -> Path | None:
    """The checkpoint last written under ./compressed."""
    found = [file.parent for file in Path("compressed").glob("*/compress.json")]
    outputs = [folder for folder in found if folder.suffix not in (".partial", ".replaced")]
    return max(outputs, key=lambda folder: (folder / "compress.json").stat().st_mtime) if outputs else None


def newest_or_refuse(command: str) -> Path:
    if (found := newest_output()) is None:
        raise UsageError(f"There is no output under ./compressed. Name a checkpoint: compress {command} OUT.")
    return found


def computing_dtype(asked: str | None, config: object, device: "torch.device") -> "torch.dtype":
    """What was asked for, or the model's own; on the CPU at least float32."""
    import torch

    if asked is not None:
        named: torch.dtype = getattr(torch, asked)
        return named
    own = getattr(config, "dtype", None) or torch.float32
    return torch.promote_types(own, torch.float32) if device.type == "cpu" else own
