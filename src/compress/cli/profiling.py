"""`--profile`: where a run's time went, on stderr: by function, as cProfile measures it, and by kind of work.

From Python 3.12 on cProfile sees every thread, and so the one that waits to report progress.
"""

import cProfile
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType

from compress.cli.tables import Row, print_rows
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
        {
            "function": name_of(entry.code, modules),
            "calls": f"{entry.callcount:,}",
            "own seconds": f"{entry.inlinetime:.2f}",
            "with callees": f"{entry.totaltime:.2f}",
        }
        for entry in found
    ]
    print_rows("Where the time went", rows, stderr=True)


def name_of(code: CodeType | str, modules: Mapping[str | None, str]) -> str:
    """`module:function`, or `type:method`."""
    if isinstance(code, str):
        return METHOD.sub(r"\2:\1", BUILT_IN.sub(r"\1:\2", code))
    return f"{modules.get(code.co_filename, code.co_filename)}:{code.co_qualname}"


def show_seconds(seconds: Mapping[str, float]) -> None:
    """By kind of work, as in the result: each kind without those inside it."""
    kinds = {kind: value for kind, value in seconds.items() if kind != "total"}
    kinds["the rest"] = seconds["total"] - sum(kinds.values())
    whole = seconds["total"] or 1.0  # 0 for a run that had nothing left to do
    rows: list[Row] = [
        {"kind": kind, "seconds": f"{value:.2f}", "share": f"{value / whole:.0%}"} for kind, value in kinds.items()
    ]
    rows += [{"kind": "total", "seconds": f"{seconds['total']:.2f}", "share": None}]
    print_rows("Seconds by kind of work", rows, stderr=True)
