"""The command line. typer and rich are used here and nowhere else.

Commands import torch and transformers when they run, so that help and usage errors come at once.
"""

import signal
import sys
from typing import Annotated

import typer

from compress.cli.bench import bench
from compress.cli.compressing import run_recipe
from compress.cli.console import INTERRUPTED, INTERRUPTS
from compress.cli.eval import evaluate
from compress.cli.finetune import finetune
from compress.cli.inspect import inspect_outputs, push_output, write_report
from compress.cli.quantize import auto_model, quantize_model, slim_model
from compress.cli.slice_lord import factorize_model, slice_model
from compress.version import __version__

app = typer.Typer(
    name="compress",
    help="Make a language model smaller in one shot, without training.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)
app.command("auto")(auto_model)
app.command("slice")(slice_model)
app.command("lord")(factorize_model)
app.command("slim")(slim_model)
app.command("quantize")(quantize_model)
app.command("run")(run_recipe)
app.command("finetune")(finetune)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.command("inspect")(inspect_outputs)
app.command("report")(write_report)
app.command("push")(push_output)


def show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"compress {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and end.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Make a language model smaller in one shot, without training.

    Exit codes: 0 done, 1 failed, 2 usage, 3 model not supported, 4 data or hub not reachable, 130 interrupted.
    """


def main() -> None:
    # A polite kill, or a terminal that is closed, ends like Ctrl-C: files closed, the unfinished run kept for --resume.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup, or by a shell for what runs in its background
            signal.signal(number, INTERRUPTS)
    try:
        app()
    except KeyboardInterrupt:  # before any command has begun
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
