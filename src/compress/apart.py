"""A script in a Python process of its own, which ends when this one does, however this one ends.

    python FLAG apart.py SCRIPT ARGUMENTS...

Beside its work that process reads its standard input, a pipe whose other end nobody has but its parent, and which ends
with the parent.
"""

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence


def run_apart(
    flag: str, script: str, arguments: Sequence[str], variables: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """flag: of Python, -I or -P. variables: of the environment, beside ours."""
    reading, writing = os.pipe()
    command = [sys.executable, flag, __file__, script, *arguments]
    try:
        return subprocess.run(
            command, stdin=reading, env=os.environ | variables, capture_output=True, text=True, check=False
        )
    finally:
        os.close(reading)
        os.close(writing)


def end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
