"""What is to be measured, and the checkpoints it is measured of: all that can be checked before a weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from compress.calibration.weights import LazyWeights
from compress.datasets.tasks import local_tasks, read_documents
from compress.datasets.windows import evaluation_windows, fingerprint
from compress.errors import Problems, UsageError
from compress.evaluation.humaneval import Sampling
from compress.evaluation.tasks import LoadedTask, check_installed, load_hub_task, load_local_task
from compress.models import stored_loading
from compress.models.loading import check_positions, check_vocabulary, load_config, load_tokenizer
from compress.models.tensor_files import checkpoint_files

USUAL_SEQ_LEN = 2048
Windows = dict[str, Int64[Tensor, "windows seq_len"]]


@dataclass(frozen=True)
class Request:
    """
    texts: of perplexity; compared_on: of the divergence. limit: of windows a text, documents a task and problems.
    """

    texts: tuple[str, ...] = ()
    compared_on: tuple[str, ...] = ()
    tasks: Sequence[LoadedTask] = ()
    problems: Sequence[Mapping[str, str]] = ()
    sampling: Sampling = field(default_factory=Sampling)
    seq_len: int | None = None
    limit: int | None = None
    batch_size: int = 8
    data_dir: Path | None = None
    trust_remote_code: bool = False

    @property
    def windows_of(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.texts, *self.compared_on]))


def load_tasks(names: Sequence[str], data_dir: Path | None) -> list[LoadedTask]:
    """The tasks with their data, from a file where there is one, else from the hub. Raises all problems at once."""
    if not names:
        return []
    check_installed()
    files = local_tasks(data_dir)
    problems, loaded = Problems(), []
    for name in names:
        with problems.collect():
            if name in files:
                loaded.append(load_local_task(name, read_documents(files[name])))
            else:
                loaded += load_hub_task(name, sorted(files))
    problems.report()
    return loaded


@dataclass(frozen=True)
class Subject:
    """A checkpoint that can be measured. Its weights have not been read."""

    name: str
    folder: Path
    config: Any
    tokenizer: Any
    windows: Windows

    def load(self, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool) -> PreTrainedModel:
        return stored_loading.open_model(self.folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)

    @property
    def bytes(self) -> int:
        """Of the files that hold its weights, adapters included."""
        files = [*checkpoint_files(self.folder), *self.folder.glob("adapter/*.safetensors")]
        return sum(file.stat().st_size for file in files)


def prepare(name: str, folder: Path, request: Request) -> Subject:
    """The checkpoint with its texts cut into windows. Raises all problems of its config, files, tokenizer and texts."""
    problems = Problems()
    config = load_config(folder, trust_remote_code=request.trust_remote_code)
    text_config = config.get_text_config()
    length = request.seq_len or min(USUAL_SEQ_LEN, getattr(text_config, "max_position_embeddings", USUAL_SEQ_LEN))
    if request.windows_of:
        with problems.collect():
            check_positions(text_config, length)
    with problems.collect():
        LazyWeights(folder)
    windows: Windows = {}
    with problems.collect():
        tokenizer = load_tokenizer(folder, trust_remote_code=request.trust_remote_code)
        windows = read_windows(request, tokenizer, length)
        for each in windows.values():
            check_vocabulary(each, config, folder)
    problems.report()
    return Subject(name, folder, config, tokenizer, windows)


def read_windows(request: Request, tokenizer: Any, seq_len: int) -> Windows:
    problems, windows = Problems(), {}
    for name in request.windows_of:
        with problems.collect():
            windows[name] = evaluation_windows(
                name, tokenizer, seq_len=seq_len, data_dir=request.data_dir, limit=request.limit
            )
    problems.report()
    return windows


def check_same_tokens(dense: Subject, subjects: Sequence[Subject]) -> None:
    """That a divergence means something: the same vocabulary, and the texts cut alike."""
    problems = Problems()
    for subject in subjects:
        with problems.collect():
            sizes = [each.config.get_text_config().vocab_size for each in (dense, subject)]
            cut_alike = all(torch.equal(subject.windows[name], dense.windows[name]) for name in dense.windows)
            if sizes[0] != sizes[1] or not cut_alike:
                what = f"vocabularies of {sizes[0]:,} and {sizes[1]:,}" if sizes[0] != sizes[1] else "other tokens"
                raise UsageError(
                    f"--kl: {dense.name} and {subject.name} have {what} for the same text, so their next-token "
                    "distributions do not compare. Name the dense model that was compressed."
                )
    problems.report()


def cut_otherwise(subjects: Sequence[Subject]) -> list[str]:
    """Names of those whose tokens for the same texts are other ones than the first's: perplexities do not compare."""
    prints = [[fingerprint(each) for each in subject.windows.values()] for subject in subjects]
    return [subject.name for subject, each in zip(subjects, prints, strict=True) if each != prints[0]]
