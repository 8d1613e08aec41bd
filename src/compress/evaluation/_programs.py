"""Run untrusted Python programs, each in a process with limits. docs/security.md says what these do not hold.

    python -I _programs.py SECONDS < PROGRAM

is that process: it limits itself, runs the program, and prints `passed` or why it did not pass.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

PASSED = "passed"
STARTUP_SECONDS = 10
MEMORY_BYTES = 2**30  # of address space
FILE_BYTES = 2**24  # of each file that is written
PROCESSES = 0  # that the program may start; the system does not hold root to it


def run_programs(
    programs: Sequence[str], *, seconds: int = 10, on_done: Callable[[int], None] | None = None
) -> list[str]:
    """How each program ended: `passed` if its last line has been run, else why not. `on_done` is told 1 for each."""
    outcomes = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for outcome in pool.map(lambda program: run_program(program, seconds), programs):
                outcomes.append(outcome)
                if on_done:
                    on_done(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


def run_program(program: str, seconds: int) -> str:
    """Without environment or input, in an empty folder. All of its process group is killed when it ends."""
    with (
        tempfile.TemporaryDirectory(prefix="compress-program-", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [sys.executable, "-I", __file__, str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        outcome = ""
        try:
            outcome, _ = process.communicate(program, timeout=seconds + STARTUP_SECONDS)
        except subprocess.TimeoutExpired:
            outcome = f"took more than {seconds} seconds"
        finally:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == -signal.SIGALRM:
        return f"took more than {seconds} seconds"
    ended = f"killed by signal {-process.returncode}" if process.returncode < 0 else "ended before its last line"
    return outcome or ended


def main(seconds: int) -> None:
    program = sys.stdin.read()
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    limit(seconds)
    try:
        exec(compile(program, "program.py", "exec"), {})
        outcome = PASSED
    except BaseException as error:
        outcome = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(": ")
    answer.write(outcome)
    answer.flush()
    os._exit(0)  # before what the program has left to be done at exit


def limit(seconds: int) -> None:
    """Of this process. The alarm also ends one whose parent has been killed."""
    import resource

    most = {"CPU": seconds + 1, "AS": MEMORY_BYTES, "FSIZE": FILE_BYTES, "NPROC": PROCESSES, "CORE": 0}
    for name, number in most.items():
        # macOS refuses some, and the user's own limit may be lower.
        with suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (number, number))
    signal.alarm(seconds)


if __name__ == "__main__":
    main(int(sys.argv[1]))
