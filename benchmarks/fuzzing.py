"""Bad input by the thousand: which files are spoiled, what the commands then do with them, and what may not happen.

A `Target` is a file of a prepared home and what reads it. A `Fuzzer` spoils it, lets the commands read it behind the
command line's own boundary, and puts it back. An input ends well when the command succeeds or refuses it: an exit code
from 1 to 4 and lines that begin with `error: ` and can be printed. Anything else is told in the `Verdict`.
"""

import contextlib
import functools
import gc
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import typer
from spoiling import (
    Spoil,
    spoiled_card,
    spoiled_gguf,
    spoiled_json,
    spoiled_lines,
    spoiled_prose,
    spoiled_safetensors,
    spoiled_yaml,
    zipped,
)

from cli_runner import succeeds
from compress import presets
from compress.cli.console import quiet_libraries, reporting_errors
from outputs import write_outputs
from tiny import FAMILIES, tiny_config, write_model

PRESETS = presets.FOLDER
SECONDS = 10.0  # of computing that an input may take
GROWTH = 2**28  # bytes by which the process may grow meanwhile
ALLOWANCE = 2**30  # bytes of address space for data beyond what is there, before an allocation fails
LONGEST = 4000  # characters of a message
# What no input may bring about, as Python announces it.
FORBIDDEN = {"pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"}
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}


@dataclass(frozen=True)
class Target:
    """
    file: below the home. spoil: how it is changed. read: what commands do with the home; it may choose among several.
    seeds: files that its content is taken from, its own where none are named. writes: files that may change meanwhile.
    weight: how many inputs it gets beside others.
    """

    name: str
    file: str
    spoil: Spoil
    read: Callable[[Path, Random], None]
    seeds: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """
    code: the exit code; None where the command did not end by itself. fault: what should not have happened, or None.
    seconds: of computing.
    growth: bytes by which the most memory in use was above what was in use before.
    """

    code: int | None
    fault: str | None
    seconds: float
    growth: int
    said: str = ""


# What commands do with it.


def plan(home: Path, choose: Random) -> None:
    """The commands that compress, as far as config.json goes."""
    from compress.cli.quantize import slim_model
    from compress.cli.slice_lord import factorize_model, slice_model

    options: dict[str, Any] = {"model": str(home / "opt"), "dry_run": True, "device": "cpu"}
    commands = [
        lambda: slice_model(**options, ratio="0.25"),
        lambda: slice_model(**options, ratio="0.25", method="slicegpt"),
        lambda: slice_model(**options, keep_params=0.7, json=True),
        lambda: factorize_model(**options, rank_frac=0.5),
        lambda: slim_model(**options, sparsity="none", adapter_rank=0.0),
    ]
    choose.choice(commands)()


def look_at_model(home: Path, choose: Random) -> None:
    """The commands that measure a model, before they read its weights; and `inspect`."""
    from compress.cli.inspect import inspect_outputs
    from compress.evaluation.bench import look_at_pair, workloads
    from compress.evaluation.evaluate import Request, prepare
    from compress.models.hub import ModelSource

    folder = home / "opt"
    pair = (ModelSource("dense", folder), ModelSource("opt", folder))
    commands = [
        lambda: workloads(None, None, None, look_at_pair(pair, trust_remote_code=False)[1]),
        lambda: prepare("opt", folder, Request(texts=(str(home / "text.txt"),), limit=2)),
        lambda: inspect_outputs([folder], fast=True),
    ]
    choose.choice(commands)()


def read_config(home: Path, choose: Random) -> None:
    choose.choice([plan, plan, look_at_model])(home, choose)


def read_weights(home: Path, choose: Random) -> None:
    from compress.calibration.weights import LazyWeights
    from compress.cli.inspect import inspect_outputs
    from compress.models.loading import load_model

    folder = home / "llama"
    commands = [
        lambda: list(LazyWeights(folder).samples()),
        lambda: LazyWeights(folder).read(list(LazyWeights(folder).stored.tensors)),
        lambda: inspect_outputs([folder], linears=True),
        lambda: load_model(folder, dtype=torch.float32, device=torch.device("cpu")),
    ]
    choose.choice(commands)()


def evaluate_model(home: Path, name: str) -> None:
    from compress.cli.eval import evaluate

    evaluate(model=str(home / name), ppl=str(home / "text.txt"), seq_len=32, limit=2, device="cpu", json=True)


def read_generation_config(home: Path, choose: Random) -> None:
    from compress.models.stored_loading import load_stored

    load_stored(home / "packed", dtype=torch.float32, device=torch.device("cpu"))


def read_tokenizer(home: Path, choose: Random) -> None:
    from compress.datasets.windows import calibration_windows
    from compress.models.loading import check_vocabulary, load_config, load_tokenizer

    folder = home / "llama"
    tokenizer, source = load_tokenizer(folder), str(home / "text.txt")
    windows = calibration_windows(source, tokenizer, num_samples=2, seq_len=32, seed=0, data_dir=None)
    check_vocabulary(windows, load_config(folder), folder)


def run_recipe(home: Path, choose: Random) -> None:
    from compress.cli.compressing import run_recipe

    how: Any = choose.choice([{"show_recipe": True}, {"dry_run": True}])
    run_recipe(home / "recipe.yaml", model=str(home / "llama"), device="cpu", **how)


def inspect_packed(home: Path, choose: Random) -> None:
    from compress.cli.inspect import inspect_outputs

    inspect_outputs([home / "packed"], fast=choose.random() < 0.7, linears=choose.random() < 0.5)


def read_facts(home: Path, choose: Random) -> None:
    """All that read compress.json."""
    from compress.checkpoints.push import push
    from compress.cli.bench import base_of
    from compress.cli.compressing import run_recipe
    from compress.cli.inspect import inspect_outputs
    from compress.evaluation.bench import Named, facts_of, other_source
    from compress.models.hub import find_model

    folder = home / "packed"

    def pushed() -> None:
        with patch("compress.checkpoints.push.upload", lambda *_arguments, **_options: "nowhere"):
            push(folder, "me/model")

    def compared() -> None:
        facts_of(folder)
        base_of(find_model(str(folder)))
        other_source(Named("dense", home / "llama"), Named("packed", folder))

    commands = [
        lambda: run_recipe(folder, model=choose.choice([None, str(home / "llama")]), dry_run=True, device="cpu"),
        lambda: inspect_packed(home, choose),
        lambda: inspect_outputs([folder], fast=True, card=True),
        lambda: evaluate_model(home, "packed"),
        pushed,
        compared,
    ]
    choose.choice(commands)()


def read_stored(home: Path, choose: Random) -> None:
    """A checkpoint of ours from its files, packed, with its adapter."""
    choose.choice([inspect_packed, inspect_packed, read_generation_config])(home, choose)


def read_texts(home: Path, file: str) -> None:
    from compress.datasets.windows import evaluation_windows

    tokenizer = byte_tokenizer(home / "llama")
    evaluation_windows(str(home / file), tokenizer, seq_len=32, data_dir=None, limit=2)


@functools.cache
def byte_tokenizer(folder: Path) -> Any:
    from compress.models.loading import load_tokenizer

    return load_tokenizer(folder)


def read_rows(home: Path, choose: Random) -> None:
    read_texts(home, "rows.jsonl")


def read_text(home: Path, choose: Random) -> None:
    read_texts(home, "prose.txt")


def read_task(home: Path, choose: Random) -> None:
    from compress.datasets.texts import read_documents
    from compress.evaluation.tasks import fitted, piqa

    for number, document in enumerate(read_documents(home / "data" / "tasks" / "piqa.jsonl"), 1):
        fitted(piqa, number, document)


def read_problems(home: Path, choose: Random) -> None:
    from compress.datasets.texts import load_problems
    from compress.evaluation.generation import program_of

    for problem in load_problems(home / "data"):
        program_of(problem, "    pass\n")


def read_quality(home: Path, choose: Random) -> None:
    from compress.checkpoints.quality import Quality, save_quality
    from compress.cli.inspect import inspect_outputs

    commands = [
        lambda: inspect_outputs([home / "packed"], fast=True, json=choose.random() < 0.5),
        lambda: inspect_outputs([home / "packed"], fast=True, card=True),
        lambda: save_quality(home / "packed", Quality()),
    ]
    choose.choice(commands)()


def read_run(home: Path, choose: Random) -> None:
    from compress.checkpoints.run_folder import resumed
    from compress.cli.inspect import inspect_outputs

    def again() -> None:
        resumed(home / "run.partial", {"recipe": {"seed": 1}, "device": "cpu"})

    choose.choice([lambda: inspect_outputs([home / "run"]), again, again])()


def read_card(home: Path, choose: Random) -> None:
    from compress.checkpoints.card import model_card, read_origin
    from compress.checkpoints.metadata import Metadata, read_metadata

    found = read_metadata(home / "packed").to_dict()
    model_card(Metadata.model_validate(found | {"origin": read_origin(home / "llama")}))


def read_gguf(home: Path, choose: Random) -> None:
    from compress.calibration.weights import LazyWeights
    from compress.models.gguf_weights import gguf_folder
    from compress.models.loading import load_config, load_tokenizer
    from compress.models.stored_loading import open_model

    folder = gguf_folder(home / "model.gguf")
    commands = [
        lambda: load_config(folder),
        lambda: load_tokenizer(folder),
        lambda: list(LazyWeights(folder).samples()),
        lambda: open_model(folder, dtype=torch.float32, device=torch.device("cpu")),
    ]
    try:
        choose.choice(commands)()
    finally:
        shutil.rmtree(folder.parent)


PART = "model-00002-of-00005.safetensors"
TARGETS = [
    Target("config.json", "opt/config.json", spoiled_json, read_config, seeds=("configs/*.json",), weight=3),
    Target("config.json of a packed checkpoint", "packed/config.json", spoiled_json, read_stored),
    Target("safetensors index", "llama/model.safetensors.index.json", spoiled_json, read_weights),
    Target("safetensors header", "llama/model-00002-of-00007.safetensors", spoiled_safetensors, read_weights, weight=3),
    Target("generation_config.json", "packed/generation_config.json", spoiled_json, read_generation_config, weight=0.5),
    Target("tokenizer.json", "llama/tokenizer.json", spoiled_json, read_tokenizer),
    Target("tokenizer_config.json", "llama/tokenizer_config.json", spoiled_json, read_tokenizer),
    Target("recipe", "recipe.yaml", spoiled_yaml, run_recipe, seeds=("recipes/*.yaml",), weight=3),
    Target("compress.json", "packed/compress.json", spoiled_json, read_facts, writes=("packed/README.md",), weight=3),
    Target("adapter_config.json", "packed/adapter/adapter_config.json", spoiled_json, read_stored),
    Target("packed weights", f"packed/{PART}", spoiled_safetensors, read_stored),
    Target("text", "prose.txt", spoiled_prose, read_text, weight=0.5),
    Target("text as JSON lines", "rows.jsonl", spoiled_lines, read_rows),
    Target("task", "data/tasks/piqa.jsonl", spoiled_lines, read_task),
    Target("HumanEval", "data/humaneval/HumanEval.jsonl.gz", zipped(spoiled_lines), read_problems),
    Target(
        "quality.json",
        "packed/quality.json",
        spoiled_json,
        read_quality,
        writes=("packed/README.md", "packed/quality.json"),
    ),
    Target(
        "run.json",
        "run.partial/run.json",
        spoiled_json,
        read_run,
        writes=("run.partial/run.json", "run.partial/lock"),
    ),
    Target("model card", "llama/README.md", spoiled_card, read_card),
    Target("GGUF", "model.gguf", spoiled_gguf, read_gguf),
]


def write_home(home: Path) -> None:
    """A checkpoint of every kind that is spoiled, tiny, and the files beside."""
    import json

    from compress.checkpoints.gguf import write_gguf
    from compress.checkpoints.run_folder import checksum

    write_outputs(home, "packed")
    write_model(home / "opt", "opt", dtype=torch.float32)
    write_model(home / "plain", "llama", dtype=torch.float32, attention_bias=False, mlp_bias=False)
    write_gguf(home / "plain", home / "model.gguf")
    (home / "configs").mkdir()
    for model_type in FAMILIES:
        tiny_config(model_type).to_json_file(home / "configs" / f"{model_type}.json", use_diff=False)
    shutil.copytree(PRESETS, home / "recipes", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (home / "llama" / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\nlicense_name: x\n---\n# A model\n")
    (home / "recipe.yaml").write_bytes((PRESETS / "slim.yaml").read_bytes())
    (home / "prose.txt").write_bytes((home / "text.txt").read_bytes())
    lines = (home / "text.txt").read_text().splitlines()
    (home / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    documents = [{"query": "Question: a\n", "choices": ["b", "c"], "gold": 1} for _ in range(4)]
    problem = {"task_id": "x/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "", "test": "x"}
    (home / "data" / "tasks").mkdir(parents=True)
    (home / "data" / "humaneval").mkdir()
    (home / "data" / "tasks" / "piqa.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    (home / "data" / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzipped((json.dumps(problem) + "\n") * 3))
    with contextlib.chdir(home):
        text = ["--ppl", "text.txt", "--seq-len", 32, "--limit", 2, "--device", "cpu"]
        succeeds("eval", "--model", "packed", *text, "--kl", "llama", "--save")
    (home / "run.partial").mkdir()
    part = {"weights": {"file": "model-00001-of-00005.safetensors", "sha256": "0", "bytes": 1}, "report": {}}
    found = {"survey": {"data": {"x": 1}, "files": []}}
    run = {"identity": {"recipe": {"seed": 1}, "device": "cpu"}, "findings": found, "parts": [part]}
    (home / "run.partial" / "run.json").write_text(json.dumps({"run": run, "checksum": checksum(run)}))


def gzipped(text: str) -> bytes:
    import gzip

    return gzip.compress(text.encode(), mtime=0)


# Spoiling and watching.


class TimeUp(BaseException):
    """Past whatever catches an Exception."""


@dataclass
class Watch:
    """What this process does to the world while it is on."""

    is_on: bool = False
    allowed: tuple[str, ...] = ()
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments[:2]}")
        elif event in WRITES or (event == "open" and is_writing(arguments[2])):
            paths = [
                str(Path(os.fsdecode(path)).absolute())
                for path in arguments[:2]
                if isinstance(path, str | bytes | Path)
            ]
            foreign = [path for path in paths if not path.startswith(self.allowed)]
            if foreign and not (event == "open" and foreign == [os.devnull]):
                self.seen.append(f"{event} {foreign[0]}")


def is_writing(flags: Any) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


@functools.cache
def watch() -> Watch:
    """One for the process: an audit hook cannot be taken off."""
    hook = Watch()
    sys.addaudithook(hook)
    return hook


class Fuzzer:
    """
    home: from `write_home`, for this fuzzer alone. Everything that is written beside it goes into a folder `scratch`.
    """

    def __init__(self, home: Path, *, seconds: float = SECONDS) -> None:
        self.home, self.seconds = home.resolve(), seconds
        self.scratch = self.home.parent / f"{self.home.name}-scratch"
        self.scratch.mkdir(exist_ok=True)
        self.seeds = {target.name: self.contents(target) for target in TARGETS}
        quiet_libraries()

    def contents(self, target: Target) -> list[bytes]:
        files = [file for pattern in target.seeds for file in sorted(self.home.glob(pattern))]
        return [file.read_bytes() for file in files or [self.home / target.file]]

    def warm_up(self, target: Target) -> None:
        """Imports and caches, so that an input is not blamed for them; all readers of the valid input must succeed."""
        for seed in range(2):
            verdict = self.judge(target, self.seeds[target.name][0], Random(seed))
            assert verdict.fault is None or verdict.code == 0, (target.name, verdict)

    def spoil_and_judge(self, target: Target, choose: Random) -> Verdict:
        content = target.spoil(choose.choice(self.seeds[target.name]), choose)
        return self.judge(target, content, Random(choose.randrange(2**32)))

    def judge(self, target: Target, content: bytes, choose: Random) -> Verdict:
        """What becomes of a file's content, whatever it is. The home is as before afterwards."""
        file = self.home / target.file
        kept = {name: (self.home / name).read_bytes() for name in target.writes if (self.home / name).is_file()}
        original = file.read_bytes()
        file.write_bytes(content)
        try:
            before = listing(self.home)
            verdict, changes = self.watched(target, choose), []
            after = listing(self.home)
            changes = [path for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]
        finally:
            file.write_bytes(original)
            for name, data in kept.items():
                (self.home / name).write_bytes(data)
        for path in set(after) - set(before) - set(target.writes):
            remove(self.home / path)
        changes = [path for path in changes if path not in target.writes]
        if changes and verdict.fault is None:
            return Verdict(verdict.code, f"touched {changes[:3]}", verdict.seconds, verdict.growth, verdict.said)
        return verdict

    def watched(self, target: Target, choose: Random) -> Verdict:
        hook = watch()
        hook.seen.clear()
        hook.allowed = (str(self.home), str(self.scratch), "/dev/shm", "/proc/self")
        out, err = io.StringIO(), io.StringIO()
        in_use, start = reset_peak(), time.process_time()
        code, fault = None, None
        with in_folder(self.scratch), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                with limited_time(self.seconds), limited_memory():
                    hook.is_on = True
                    code = exit_code(target.read, self.home, choose)
            except TimeUp:
                fault = "hang: " + "; ".join(traceback.format_exc().splitlines()[-9:-1])
            except Exception as error:
                fault = f"traceback: {blame(error)}"
            finally:
                hook.is_on = False
        seconds, growth = time.process_time() - start, peak() - in_use
        said = err.getvalue()
        if fault is None:
            fault = complaint(code, said, growth)
        if fault is None and hook.seen:
            fault = f"did {hook.seen[:2]}"
        return Verdict(code, fault, seconds, growth, said)


def exit_code(read: Callable[[Path, Random], None], home: Path, choose: Random) -> int:
    """Behind the boundary that every command has."""
    try:
        reporting_errors(read)(home, choose)
    except typer.Exit as end:
        return int(end.exit_code)
    return 0


def complaint(code: int | None, said: str, growth: int) -> str | None:
    """What is wrong with the way a command ended."""
    faults = [line for line in said.split("\n") if line.startswith("error: ")]
    if code == 0:
        return f"an error and exit code 0: {faults[0][:200]}" if faults else too_large(growth)
    if code not in (1, 2, 3, 4):
        return f"exit code {code}"
    if not faults or "Traceback" in said:
        return f"no message: {said[:200]!r}"
    if not all(fault.isprintable() for fault in faults):
        return f"a message that cannot be printed: {said[:200]!r}"
    if sum(map(len, faults)) > LONGEST:
        return f"a message of {len(said)} characters: {said[:200]!r}"
    return too_large(growth)


def too_large(growth: int) -> str | None:
    return f"memory: {growth:,} bytes" if growth > GROWTH else None


def blame(error: BaseException) -> str:
    """The error, and where in the package it was let through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame
        for frame in frames
        if f"{os.sep}compress{os.sep}" in frame.filename and "site-packages" not in frame.filename
    ]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours[-3:]]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    said = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {said} [{' < '.join(reversed(places))}; {last}]"


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, its size and when it was written."""
    found: dict[str, tuple[int, int]] = {}
    for entry in os.scandir(folder):
        about = entry.stat(follow_symlinks=False)
        if entry.is_dir(follow_symlinks=False):
            found |= {f"{entry.name}/{name}": told for name, told in listing(Path(entry)).items()}
        found[entry.name] = (about.st_size, 0 if entry.is_dir() else about.st_mtime_ns)
    return found


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def in_folder(scratch: Path) -> Iterator[None]:
    """Relative paths and temporary files go there; warnings are for developers."""
    with contextlib.chdir(scratch), patch.object(tempfile, "tempdir", str(scratch)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Of computing: other processes' share of the machine is not blamed on the input."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)  # again, should something swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """An allocation far beyond what the process has fails, whether or not it would be used."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + ALLOWANCE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def status(name: str) -> int:
    """Bytes, as Linux counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak() -> int:
    return status("VmHWM")


def reset_peak() -> int:
    """Memory in use, from which the peak counts anew."""
    gc.collect(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")
