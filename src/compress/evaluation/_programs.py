"""Programs of a stranger's, a few at a time, each in a process and a folder of its own (`_sandbox.py`)."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from compress.errors import CompressError, UsageError
from compress.evaluation import _sandbox

# What a supervisor may take beyond its program's time to start and to clear up.
GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Limits:
    """seconds: by the clock, and as many of a core's time. memory: of address space. file: of each that is written."""

    seconds: float = 10.0
    memory_bytes: int = 2**30
    file_bytes: int = 2**24
    processes: int = 32
    open_files: int = 64

    def by_name(self) -> dict[str, int]:
        """As setrlimit calls them."""
        return {
            "RLIMIT_CPU": int(self.seconds) + 1,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class Outcome:
    """detail: `passed`, or why not. held: what kept the program in, by what it was kept from."""

    passed: bool
    detail: str
    held: dict[str, str]


def run_programs(
    programs: Sequence[str],
    limits: Limits | None = None,
    *,
    workers: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """How each program ended. One passes when its last line has been run, and in no other way.

    workers: run at a time, by default one a core. on_done: is told 1 for each.
    Raises UsageError where a program cannot be closed in.
    """
    if os.name != "posix":
        raise UsageError("Programs are only run on Linux and macOS: this system cannot limit what they take.")
    outcomes = []
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        try:
            for outcome in pool.map(lambda program: run_program(program, limits or Limits()), programs):
                outcomes.append(outcome)
                if on_done:
                    on_done(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


def run_program(program: str, limits: Limits) -> Outcome:
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="compress-program-") as folder:
        job = {"program": program, "token": token, "folder": folder}
        answer = supervised(job | {"seconds": limits.seconds, "limits": limits.by_name()}, limits.seconds)
    if "refused" in answer:
        raise UsageError(f"--humaneval: {answer['refused']}.")
    return judged(answer, token, limits)


def supervised(job: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What _sandbox.py answers. Its environment is empty; all of its process group is killed if it does not."""
    with subprocess.Popen(
        [sys.executable, "-I", _sandbox.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        start_new_session=True,
        text=True,
    ) as process:
        try:
            out, err = process.communicate(json.dumps(job), timeout=seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return {"said": "", "in_time": False, "ended": -signal.SIGKILL, "held": {}}
        finally:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError as error:
        reason = err.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise CompressError(f"A program could not be run: {reason[0]}.") from error
    return answer


def judged(answer: dict[str, Any], token: str, limits: Limits) -> Outcome:
    said, ended = str(answer["said"]), int(answer["ended"])
    if said == token:
        detail = "passed"
    elif not answer["in_time"]:
        detail = f"took more than {limits.seconds:g} seconds"
    elif said:
        detail = said.replace(token, "")
    elif ended < 0:
        detail = f"killed by signal {-ended}"
    else:
        detail = "ended before its last line"
    return Outcome(said == token, detail, answer["held"])
