"""`compress push`: a checkpoint onto the hub."""

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.options import Json
from compress.cli.progress import progress_bar
from compress.cli.reporting import reporting_errors
from compress.cli.tables import print_json, print_lines


@reporting_errors
def push_output(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint's folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it. Otherwise you alone.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the repository holds.")] = False,
    json: Json = False,
) -> None:
    """Push a checkpoint to the hub, privately, once all its files are verified. The token is that of `hf auth login`.

    Example: compress push compressed/llama-2-7b-anchored-kp0.75 me/llama-2-5b
    """
    from compress.checkpoints.push import push

    with progress_bar("verifying") as progress:
        address = push(output, repository, private=not public, overwrite=overwrite, progress=progress)
    if json:
        print_json({"folder": str(output), "repository": repository, "address": address})
    else:
        print_lines([f"pushed {output} to {address}"])
