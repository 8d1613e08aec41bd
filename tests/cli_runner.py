"""The command line as the tests call it: in this process, as it is installed, or in a warm process that may be killed.

Run as a script it is that warm process: torch is imported once, and every command is a fork of it, so that a kill at a
chosen moment and the run after it cost a fraction of a second and not the seconds of an import.
"""

import atexit
import errno
import functools
import importlib
import json
import os
import pkgutil
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

INSTALLED = Path(sys.executable).with_name("compress")
PROGRESS = re.compile(r"(.+?): (.* memory|.*took [\d:]+)")


@dataclass(frozen=True)
class Ran:
    """How a command ended: its exit code (minus the signal that killed it), what it printed where.

    left: how many processes it had started that lived on. seconds: how long it ran.
    """

    code: int
    out: str
    err: str
    left: int = 0
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def progress(self) -> list[tuple[str, str]]:
        """What all lines of stderr say of the run: the phase, and how it is."""
        lines = [PROGRESS.fullmatch(line) for line in self.err.splitlines()]
        assert None not in lines, self.err
        return [(line[1], line[2]) for line in lines if line]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def invoke(*words: object) -> Ran:
    """A command in this process. What it does not report itself is raised here: a user would see a traceback."""
    from typer.testing import CliRunner

    from compress.cli import app

    with patch("typer.testing._get_command", lambda _app: built_command()):
        result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


@functools.cache
def built_command() -> Any:
    """The command line, built once: Typer takes as long for that as a test's command takes."""
    from typer.main import get_command

    from compress.cli import app

    return get_command(app)


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


def same_files(folder: Path, expected: dict[str, bytes | None]) -> None:
    found = snapshot(folder)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


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


def environments(count: int) -> list[dict[str, str]]:
    """What torchrun gives each process on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{name: str(value) for name, value in (shared | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(count)]


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

    kind: `signal` sends `number` to the process before the call, or after it, or `delay` seconds after its start;
        `tear` writes the first half of what is to be written and kills; `full` raises the error of a full disk,
        `broken` that of one that cannot be read, `sealed` that of one that cannot be written; `act` does `action` to
        the files.
    """

    target: str
    call: int = 1
    kind: str = "signal"
    number: int = int(signal.SIGKILL)
    after: bool = False
    delay: float = 0.0
    action: Sequence[str] = ()


@dataclass(frozen=True)
class Request:
    """A command of the warm process.

    verify: whether the written checkpoint is really reloaded; otherwise that is taken for granted.
    write_event: the process is sent `number` at this one of the events by which Python announces that it is about to
        change files below `cwd`, to flush one or to start a process, counted from 1. At 0 it is not, and their number
        is the last line of stderr.
    signal_after: seconds after which it is sent `number`, wherever it is.
    max_file_bytes: no file may grow larger, as on a disk that is full.
    starts_after: seconds to wait first.
    max_data_growth: bytes of private memory that the process may take beside what the warm one has.
    """

    words: Sequence[str]
    cwd: str
    disturbance: Disturbance | None = None
    verify: bool = False
    write_event: int | None = None
    signal_after: float | None = None
    number: int = int(signal.SIGKILL)
    max_file_bytes: int | None = None
    starts_after: float = 0.0
    max_data_growth: int | None = None
    env: dict[str, str] = field(default_factory=dict)


def run_warm(requests: Sequence[Request], processes: int | None = None) -> list[Ran]:
    """Commands side by side, each in a fork of the warm process; as many at a time as there are cores."""
    process = warm_process()
    assert process.stdin is not None
    assert process.stdout is not None
    asked = {"requests": [asdict(request) for request in requests], "processes": processes or os.cpu_count() or 1}
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()
    return [Ran(**answer) for answer in json.loads(process.stdout.readline())]


@functools.cache
def warm_process() -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        # Of processes of one launch, those that outlive the first lose its store, of which torch would warn them.
        [sys.executable, str(Path(__file__))],
        env=environment(TORCH_CPP_LOG_LEVEL="ERROR"),
        stdin=pipe,
        stdout=pipe,
        text=True,
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
    vars(os)["fsync"] = lambda _descriptor: None  # what a kill leaves is whole without
    for line in sys.stdin:
        asked = json.loads(line)
        sys.stdout.write(json.dumps(answers(asked["requests"], asked["processes"])) + "\n")
        sys.stdout.flush()


@dataclass
class Running:
    """A fork at work. until: when it is to be sent its signal, by the clock of time.monotonic."""

    place: int
    request: dict[str, Any]
    files: tuple[IO[Any], IO[Any]]
    started: float
    until: float

    def signal_when_due(self, pid: int) -> None:
        if time.monotonic() >= self.until:
            self.until = float("inf")
            os.kill(pid, self.request["number"])

    def ended(self, pid: int, status: int) -> dict[str, Any]:
        seconds = time.monotonic() - self.started
        out, err = map(read_back, self.files)
        code, left = os.waitstatus_to_exitcode(status), len(end_session(pid))
        return {"code": code, "out": out, "err": err, "left": left, "seconds": seconds}


def answers(requests: list[dict[str, Any]], processes: int) -> list[Any]:
    found: list[Any] = [None] * len(requests)
    waiting, running = list(enumerate(requests)), dict[int, Running]()
    while waiting or running:
        # Processes of one launch wait for one another, so all must run.
        while waiting and (len(running) < processes or "RANK" in waiting[0][1]["env"]):
            place, request = waiting.pop(0)
            files = (tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+"))  # noqa: SIM115 (closed when read back)
            pid, now = fork(request, files), time.monotonic()
            after = request["signal_after"]
            running[pid] = Running(place, request, files, now, float("inf") if after is None else now + after)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ended = running.pop(pid)
            found[ended.place] = ended.ended(pid, status)
            continue
        for pid, each in running.items():
            each.signal_when_due(pid)
        time.sleep(0.002)
    return found


def end_session(leader: int, patience: float = 5.0) -> list[int]:
    """The processes of a session that do not end by themselves soon after its leader; they are killed."""
    deadline = time.monotonic() + patience
    while (left := living(leader)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in left:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return left


def living(session: int) -> list[int]:
    """The processes of a session, those that have ended and were not yet waited for left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def import_all() -> None:
    import compress

    for module in pkgutil.walk_packages(compress.__path__, "compress."):
        importlib.import_module(module.name)
    for name in ("transformers.models.opt.modeling_opt", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    importlib.import_module("matplotlib.backends.backend_agg")


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
            os.setsid()
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
    import compress.checkpoints.gguf
    import compress.cli
    import compress.pipeline
    import compress.tuning.tuner

    # Tests that run in the background of a shell inherit that Ctrl-C is ignored; a user at a terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    time.sleep(request["starts_after"])
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    tempfile.tempdir = None  # it is remembered from before
    if not request["verify"]:
        for writer in (compress.pipeline, compress.tuning.tuner):
            vars(writer)["verify"] = lambda *_arguments, **_options: 0.0
        vars(compress.checkpoints.gguf)["verify_gguf"] = lambda *_arguments, **_options: 0.0
    if request["disturbance"]:
        disturb(Disturbance(**request["disturbance"]))
    if request["max_file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"],) * 2)
    events = None
    if request["write_event"] is not None:
        events = watch_writes(Path.cwd(), request["write_event"], request["number"])
    if request["max_data_growth"] is not None:
        data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (int(data.split()[1]) * 1024 + request["max_data_growth"],) * 2)
    sys.argv = ["compress", *request["words"]]
    try:
        compress.cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    if request["write_event"] == 0:
        sys.stderr.write(f"{len(events or [])}\n")
    return code


ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "sealed": errno.EROFS}


def act(verb: str, name: str) -> None:
    """To a file or folder: create it, remove it, cut it in half, fill the disk with it, change a byte near its end."""
    path = Path(name)
    if verb == "create":
        path.mkdir()
    elif verb == "remove":
        (shutil.rmtree if path.is_dir() else os.remove)(path)
    elif verb == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif verb == "fill":
        with suppress(OSError), path.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    else:
        content = path.read_bytes()
        fresh = path.with_name(f"{path.name}.fresh")
        fresh.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        fresh.replace(path)


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
        if disturbance.kind in ERRORS:
            number = ERRORS[disturbance.kind]
            raise OSError(number, os.strerror(number))
        if disturbance.kind == "act":
            act(*disturbance.action)
            return original(*arguments, **options)
        if disturbance.kind == "tear":
            tear(arguments)
        if disturbance.delay:
            threading.Timer(disturbance.delay, os.kill, (os.getpid(), disturbance.number)).start()
            return original(*arguments, **options)
        if not disturbance.after:
            os.kill(os.getpid(), disturbance.number)
        result = original(*arguments, **options)
        if disturbance.after:
            os.kill(os.getpid(), disturbance.number)
        return result

    return stand_in


def tear(arguments: tuple[Any, ...]) -> None:
    """The first half of what `save_file(tensors, file)` would write."""
    from safetensors.torch import save

    whole = save(arguments[0])
    Path(arguments[1]).write_bytes(whole[: len(whole) // 2])


WRITING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile", "os.truncate", "os.symlink"}


def watch_writes(folder: Path, fatal: int, number: int) -> list[str]:
    """The events so far, in a list that grows; at the fatal one the process is sent the signal `number`."""
    events: list[str] = []
    root, flush = str(folder), os.fsync

    def happens(event: str) -> None:
        events.append(event)
        if len(events) == fatal:
            os.kill(os.getpid(), number)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            happens(event)
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in WRITING
        paths = [str(Path(path).absolute()) for path in arguments[:2] if isinstance(path, str | os.PathLike)]
        if writes and any(path.startswith(root) for path in paths):
            happens(event)

    def flushed(descriptor: int) -> None:
        happens("os.fsync")
        flush(descriptor)

    vars(os)["fsync"] = flushed
    sys.addaudithook(hook)
    return events


if __name__ == "__main__":
    serve()
