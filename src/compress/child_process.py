"""Run a script in a child process that is killed when its parent exits, however the parent exits.

    python FLAG child_process.py SCRIPT ARGUMENTS...

The child watches its standard input, a pipe whose other end only its parent has, and which closes with the parent.
"""

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence


def run_in_child(
    flag: str, script: str, arguments: Sequence[str], variables: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """
    flag: Python's, -I or -P. variables: added to the environment.
    """
    reading, writing = os.pipe()
    command = [sys.executable, flag, __file__, script, *arguments]
    try:
        return subprocess.run(
            command, stdin=reading, env=os.environ | variables, capture_output=True, text=True, check=False
        )
    finally:
        os.close(reading)
        os.close(writing)


def exit_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=exit_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
