"""Write docs/cli.md, the reference of all options, from what the commands say of themselves in their help.

python scripts/cli_reference.py
"""

import inspect
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from typer.models import ArgumentInfo

from compress.cli import app
from compress.cli.options import flag_of

FILE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# Options

Of every command, as `compress COMMAND --help` shows them. Written by scripts/cli_reference.py.

What a recipe has and no option reaches is set by `--set STAGE.FIELD=VALUE`
([recipes](recipes.md#fields-without-an-option)).
"""


def reference() -> str:
    return "\n".join([HEAD, *(section(str(each.name), each.callback) for each in app.registered_commands)])


def section(name: str, command: Any) -> str:
    """A command's summary, its example and its options, a table a heading of the help page; arguments come first."""
    summary, _, example = " ".join((command.__doc__ or "").split()).partition(" Example: ")
    panels: dict[str, list[str]] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind, info = get_args(parameter.annotation)
        panel = "Arguments" if isinstance(info, ArgumentInfo) else info.rich_help_panel or "Options"
        panels.setdefault(panel, []).append(row(parameter, kind, info))
    lines = [f"## compress {name}", "", summary, "", f"    {example}"]
    for panel in sorted(panels, key=lambda panel: panel != "Arguments"):
        lines += ["", f"| {panel} | | |", "|---|---|---|", *panels[panel]]
    return "\n".join([*lines, ""])


def row(parameter: inspect.Parameter, kind: Any, info: Any) -> str:
    (decided, *_) = [each for each in get_args(kind) or (kind,) if each is not NoneType]
    if isinstance(info, ArgumentInfo):
        names = info.metavar or parameter.name.upper()
    else:  # typer takes the first name for a default until the command is built
        names = info.default if isinstance(info.default, str) else flag_of(parameter.name)
    takes = ", ".join(map(str, choices(kind))) or info.metavar or ("" if decided is bool else plain_name(decided))
    default, text = parameter.default, info.help or ""
    if default not in (None, False, inspect.Parameter.empty) and "Default:" not in text:
        text += f" Default: {default}."
    return f"| `{names}` | {takes} | {text} |"


def choices(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((get_args(each) for each in get_args(kind) if get_origin(each) is Literal), ())


def plain_name(kind: Any) -> str:
    """`str`, `int`, `float`, `Path`; several of one kind as `str ...`."""
    return f"{get_args(kind)[0].__name__} ..." if get_origin(kind) is list else str(kind.__name__)


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
