"""`--profile`: where a run's time went, on stderr: by function, as cProfile measures it, and by kind of work.

From Python 3.12 on cProfile sees every thread, and so the one that waits to report progress.
"""

import cProfile
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType

from compress.cli.reporting import print_table
from compress.launch import launch

SHOWN = 10  # functions
# What cProfile calls functions that are not Python's.
BUILT_IN = re.compile(r"<built-in method ([\w.]+)\.(\w+)>")
METHOD = re.compile(r"<method '(\w+)' of '([\w.]+)' objects>")


@contextmanager
def profiled(wanted: bool) -> Iterator[None]:
    """Print the functions that took most of the time, when what is inside is done. Of several processes the first's."""
    if not wanted or not launch().is_first:
        yield
        return
    profile = cProfile.Profile()
    with profile:
        yield
    show_functions(profile)


def show_functions(profile: cProfile.Profile) -> None:
    """By their own seconds; those of what they call are in the last column."""
    modules = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    found = sorted(profile.getstats(), key=lambda entry: entry.inlinetime, reverse=True)[:SHOWN]
    rows = [
        [name_of(entry.code, modules), f"{entry.callcount:,}", f"{entry.inlinetime:.2f}", f"{entry.totaltime:.2f}"]
        for entry in found
    ]
    print_table("Where the time went", ["function", "calls", "own seconds", "with callees"], rows, stderr=True)


def name_of(code: CodeType | str, modules: Mapping[str | None, str]) -> str:
    """`module:function`, or `type:method`."""
    if isinstance(code, str):
        return METHOD.sub(r"\2:\1", BUILT_IN.sub(r"\1:\2", code))
    return f"{modules.get(code.co_filename, code.co_filename)}:{code.co_qualname}"


def show_seconds(seconds: Mapping[str, float]) -> None:
    """By kind of work, as in the result: each kind without those inside it."""
    total = seconds["total"]
    rows = [[kind, f"{value:.2f}", f"{value / total:.0%}"] for kind, value in seconds.items() if kind != "total"]
    rest = total - sum(value for kind, value in seconds.items() if kind != "total")
    rows += [["the rest", f"{rest:.2f}", f"{rest / total:.0%}"], ["total", f"{total:.2f}", ""]]
    print_table("Seconds by kind of work", ["kind", "seconds", "share"], rows, stderr=True)
