"""A checkpoint onto the hub: nothing but its own files, and only after it has been verified."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.checkpoints.card import CARD
from compress.checkpoints.files import ADAPTER_WEIGHTS, COPIED
from compress.checkpoints.integrity import check_integrity
from compress.checkpoints.metadata import METADATA, Metadata
from compress.checkpoints.quality import QUALITY, read_quality
from compress.checkpoints.run_folder import own_metadata
from compress.errors import Unavailable, UsageError
from compress.models.tensor_files import ADAPTER, INDEX
from compress.models.untrusted import one_line
from compress.progress import Progress, Steps, silent
from compress.version import __version__

# What the hub answers to a request that it refuses, by the status.
REFUSED = {
    401: "The hub does not know you: run `hf auth login`, or set HF_TOKEN to a token that may write.",
    403: "Your token may not write {}. Give HF_TOKEN one that may, or name another owner.",
    404: "The hub has no owner of {}, or your token may not see it. Check the name.",
}
WRITTEN = (
    "config.json",
    METADATA,
    INDEX,
    CARD,
    QUALITY,
    "configuration_*.py",
    "modeling_*.py",
    "*.gguf",
    "plots/*.png",
)


def push(
    folder: Path, repository: str, *, private: bool = True, overwrite: bool = False, progress: Progress = silent
) -> str:
    """The address at which the checkpoint is then.

    private: whether only its owner sees a new repository. overwrite: replace what one that exists holds.
    Raises CheckpointError for a folder that is not as it was written, UsageError for one that is no output of ours and
    for a repository that cannot be, Unavailable where the hub does not answer or does not allow it.
    """
    metadata = own_metadata(folder, "pushed")
    check_integrity(folder, metadata, checksums=True, progress=progress)
    read_quality(folder)
    files = own_files(folder, metadata)
    steps = Steps(progress, "uploading files", len(files))
    steps.begin(f"to {repository}")
    with telling(repository):
        address = upload(folder, repository, files, private=private, overwrite=overwrite)
    steps.end()
    return address


def check_repository(name: str) -> None:
    """Raises UsageError where no repository can have this name; asks nobody."""
    from huggingface_hub.utils import validate_repo_id

    with telling(name):
        validate_repo_id(name)


def own_files(folder: Path, metadata: Metadata) -> list[str]:
    """What of a folder is the checkpoint's. Raises UsageError for a link, which may lead anywhere."""
    beside = [f"{ADAPTER}/adapter_config.json", ADAPTER_WEIGHTS] if metadata.adapter else []
    named = {
        str(file.relative_to(folder))
        for pattern in (*WRITTEN, *COPIED)
        for file in folder.glob(pattern)
        if file.is_file()
    }
    found = sorted({*named, *metadata.parts, *beside})
    links = [name for name in found if (folder / name).is_symlink() or (folder / name).parent.is_symlink()]
    if links:
        raise UsageError(f"{folder / links[0]} is a link and could lead anywhere. Put the file itself in its place.")
    return found


def upload(folder: Path, repository: str, files: list[str], *, private: bool, overwrite: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi(library_name="compress", library_version=__version__)
    made: Any = api.create_repo(repository, private=private, exist_ok=overwrite)
    if overwrite and private and not api.model_info(made.repo_id).private:
        raise UsageError(f"{repository} is there and everybody can see it. Say --public, or name another repository.")
    api.upload_folder(
        repo_id=made.repo_id,
        folder_path=folder,
        allow_patterns=[glob.escape(file) for file in files],
        # What was there before and is no part of this checkpoint.
        delete_patterns=["*"] if overwrite else None,
        commit_message=f"{folder.resolve().name}, made by compress {__version__}",
    )
    return str(made)


@contextmanager
def telling(repository: str) -> Iterator[None]:
    """What the hub has against it, in a line that says what to do."""
    from huggingface_hub import errors

    # Its bases are what the HTTP library, whichever it is, raises for a connection that fails.
    failures: tuple[type[Exception], ...] = (errors.HfHubHTTPError, *errors.HfHubHTTPError.__bases__)
    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(f"The hub has no place for {repository!r}: names are NAME or OWNER/NAME.") from error
    except errors.LocalTokenNotFoundError as error:
        raise Unavailable("The hub asks who you are: run `hf auth login`, or set HF_TOKEN.") from error
    except errors.OfflineModeIsEnabled as error:
        raise Unavailable("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it.") from error
    except failures as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 409:
            raise UsageError(
                f"The hub has {repository!r} already. Name another repository, or replace it: --overwrite."
            ) from error
        if status in REFUSED:
            raise Unavailable(REFUSED[status].format(repr(repository))) from error
        raise Unavailable(
            f"{repository!r} could not be pushed ({one_line(error)}). "
            "Push again with --overwrite, should it be there in part."
        ) from error
