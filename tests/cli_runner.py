"""The command line as the tests call it: in this process, as it is installed, or in a warm process that may be killed.

Run as a script it is that warm process: torch is imported once, and every command is a fork of it, so that a kill at a
chosen moment and the run after it cost a fraction of a second and not the seconds of an import.
"""

import atexit
import functools
import importlib
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

TESTS = Path(__file__).parent
INSTALLED = Path(sys.executable).with_name("compress")


@dataclass(frozen=True)
class Ran:
    """How a command ended: its exit code (minus the signal that killed it), what it printed where."""

    code: int
    out: str
    err: str

    @property
    def faults(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def invoke(*words: object) -> Ran:
    """A command in this process. What it does not report itself is raised here: a user would see a traceback."""
    from typer.testing import CliRunner

    from compress.cli import app

    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def succeeds(*words: object) -> Ran:
    ran = invoke(*words)
    assert ran.code == 0, ran.err
    assert not ran.faults
    return ran


def flat(text: str) -> str:
    """Text out of the boxes and line ends that rich draws around it."""
    return " ".join(text.replace("│", " ").split())


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes; folders have None."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """That nothing below a folder is written, changed or deleted meanwhile."""
    before = snapshot(folder)
    yield
    after = snapshot(folder)
    assert sorted(after) == sorted(before)
    assert after == before


def environment(**changes: str) -> dict[str, str]:
    """For a process of its own: no network, one thread, English and undecorated output."""
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "80"}
    kept = {name: value for name, value in os.environ.items() if name != "COMPRESS_DATA_DIR"}
    return kept | fixed | changes


def start_installed(*words: object, cwd: Path, **env: str) -> "subprocess.Popen[str]":
    """The installed command in a process of its own, to be asked with `finish`."""
    command = [str(INSTALLED), *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment(**env), stdout=pipe, stderr=pipe, text=True)


def finish(process: "subprocess.Popen[str]", timeout: float = 200) -> Ran:
    out, err = process.communicate(timeout=timeout)
    return Ran(process.returncode, out, err)


@dataclass(frozen=True)
class Disturbance:
    """What happens to a run, at the `call`-th call of `target`, a `module:attribute` as the calling module names it.

    kind: `signal` sends `number` to the process before the call, or after it; `tear` writes the first half of what is
        to be written and kills; `full` raises the error of a full disk.
    """

    target: str
    call: int = 1
    kind: str = "signal"
    number: int = int(signal.SIGKILL)
    after: bool = False


@dataclass(frozen=True)
class Request:
    """A command of the warm process.

    verify: whether the written checkpoint is really reloaded; otherwise that is taken for granted.
    write_event: the process is killed at this one of the events by which Python announces that it is about to change
        files below `cwd`, counted from 1. At 0 it is not, and their number is the last line of stderr.
    max_file_bytes: no file may grow larger, as on a disk that is full.
    """

    words: Sequence[str]
    cwd: str
    disturbance: Disturbance | None = None
    verify: bool = False
    write_event: int | None = None
    max_file_bytes: int | None = None
    env: dict[str, str] = field(default_factory=dict)


def run_warm(requests: Sequence[Request]) -> list[Ran]:
    """Commands side by side, each in a fork of the warm process."""
    process = warm_process()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([asdict(request) for request in requests]) + "\n")
    process.stdin.flush()
    return [Ran(**answer) for answer in json.loads(process.stdout.readline())]


@functools.cache
def warm_process() -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__))], env=environment(), stdin=pipe, stdout=pipe, text=True
    )

    def end() -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.wait()
        process.stdout.close()

    atexit.register(end)
    return process


def serve() -> None:
    import_all()
    for line in sys.stdin:
        requests = json.loads(line)
        answers: list[Any] = [None] * len(requests)
        waiting = list(range(len(requests)))
        running: dict[int, tuple[int, tuple[Any, Any]]] = {}
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                number = waiting.pop(0)
                files = (tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+"))  # noqa: SIM115 (closed below)
                running[fork(requests[number], files)] = (number, files)
            pid, status = os.wait()
            number, files = running.pop(pid)
            out, err = map(read_back, files)
            answers[number] = {"code": os.waitstatus_to_exitcode(status), "out": out, "err": err}
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


def import_all() -> None:
    import compress

    for module in pkgutil.walk_packages(compress.__path__, "compress."):
        importlib.import_module(module.name)
    importlib.import_module("transformers.models.opt.modeling_opt")


def read_back(file: IO[Any]) -> str:
    with file:
        file.seek(0)
        text: str = file.read()
        return text


def fork(request: dict[str, Any], files: tuple[IO[Any], IO[Any]]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            for number, file in enumerate(files, 1):
                os.dup2(file.fileno(), number)
            code = run_forked(request)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def run_forked(request: dict[str, Any]) -> int:
    import compress.cli
    import compress.pipeline
    import compress.tuning.tuner

    # Tests that run in the background of a shell inherit that Ctrl-C is ignored; a user at a terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    if not request["verify"]:
        for writer in (compress.pipeline, compress.tuning.tuner):
            vars(writer)["verify"] = lambda *_arguments, **_options: 0.0
    if request["disturbance"]:
        disturb(Disturbance(**request["disturbance"]))
    if request["max_file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"],) * 2)
    events = watch_writes(Path.cwd(), request["write_event"]) if request["write_event"] is not None else None
    sys.argv = ["compress", *request["words"]]
    try:
        compress.cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    if events is not None:
        sys.stderr.write(f"{len(events)}\n")
    return code


def disturb(disturbance: Disturbance) -> None:
    module_name, _, path = disturbance.target.partition(":")
    owner = importlib.import_module(module_name)
    *between, attribute = path.split(".")
    for name in between:
        owner = getattr(owner, name)
    setattr(owner, attribute, disturbed(getattr(owner, attribute), disturbance))


def disturbed(original: Callable[..., Any], disturbance: Disturbance) -> Callable[..., Any]:
    calls = 0

    @functools.wraps(original)
    def stand_in(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != disturbance.call:
            return original(*arguments, **options)
        if disturbance.kind == "full":
            raise OSError(28, os.strerror(28))
        if disturbance.kind == "tear":
            tear(arguments)
        if not disturbance.after:
            os.kill(os.getpid(), disturbance.number)
        result = original(*arguments, **options)
        if disturbance.after:
            os.kill(os.getpid(), disturbance.number)
        return result

    return stand_in


def tear(arguments: tuple[Any, ...]) -> None:
    """The first half of what `save_file(tensors, file)` or `write_line(file, entry)` would write."""
    first, second = arguments[:2]
    if isinstance(first, dict):
        from safetensors.torch import save

        whole = save(first)
        Path(second).write_bytes(whole[: len(whole) // 2])
    else:
        text = json.dumps(second)
        first.write(text[: len(text) // 2])
        first.flush()


def watch_writes(folder: Path, fatal: int) -> list[str]:
    events: list[str] = []
    root = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile", "os.truncate"}
        paths = [str(Path(path).absolute()) for path in arguments[:2] if isinstance(path, str | os.PathLike)]
        if writes and any(path.startswith(root) for path in paths):
            events.append(event)
            if len(events) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return events


if __name__ == "__main__":
    serve()
