"""The proof that a GGUF file is its folder: read in a clean process, same keys, same logits, same tokens."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors.torch import save_file
from torch import Tensor

from compress.checkpoints.gguf import reload
from compress.checkpoints.gguf.llama import Model
from compress.checkpoints.gguf.readers import dropped_by_transformers
from compress.checkpoints.verify import SAMPLE, TOLERANCE, TOLERANCE_16_BIT, run_script
from compress.errors import VerificationError
from compress.models.loading import load_tokenizer

PROBE_TOKENS = 64


def verify_gguf(
    folder: Path,
    file: Path,
    ids: Int64[Tensor, "1 tokens"] | None = None,
    logits: Float[Tensor, "1 tokens vocabulary"] | None = None,
    *,
    memory: int,
    text: str = SAMPLE,
) -> float:
    """The largest difference of the logits of `file`, read by transformers, as a share of the largest logit.

    ids, logits: a probe; without logits the folder's are computed. Both in a clean process.
    memory: bytes the reading may take; a model that does not fit in float32 is held in its own dtype.
    text: is cut by the tokenizers of both, as is every special token after a letter.
    Raises VerificationError on other keys, too large a difference or other tokens.
    """
    model = Model(folder)
    dtype = reading_dtype(model, memory)
    probe = {"ids": ids if ids is not None else spread_ids(model.config)}
    probe |= {"logits": logits} if logits is not None else {}
    tokenizer = load_tokenizer(folder)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as scratch:
        alone, saved = Path(scratch) / "alone" / "model.gguf", Path(scratch) / "probe.safetensors"
        alone.parent.mkdir()
        alone.symlink_to(file.resolve())
        task = {
            "folder": str(folder.resolve()),
            "file": str(alone),
            "probe": str(saved),
            "texts": [text, *(f"a{token}" for token in tokenizer.all_special_tokens)],
            "dtype": str(dtype).removeprefix("torch."),
            "needs_config": bool(dropped_by_transformers(model)),
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in probe.items()}, saved)
        found = read_clean(file, task, Path(scratch))
    return judged(found, file, TOLERANCE if dtype == torch.float32 else TOLERANCE_16_BIT)


def reading_dtype(model: Model, memory: int) -> torch.dtype:
    """Float32 where the model fits so, else the dtype of most of its weights."""
    parameters = sum(entry.shape.numel() for entry in model.entries)
    if parameters * torch.float32.itemsize * 1.5 < memory:
        return torch.float32
    needed = parameters * model.usual_dtype.itemsize * 1.2
    if needed >= memory:
        raise VerificationError(
            f"Reading the GGUF file back takes {needed / 2**30:.1f} GiB of memory, {memory / 2**30:.1f} are free. "
            "Verify it on a larger machine."
        )
    return model.usual_dtype


def spread_ids(config: Any) -> Int64[Tensor, "1 tokens"]:
    """Tokens from all over the vocabulary."""
    count = min(PROBE_TOKENS, config.max_position_embeddings, config.vocab_size)
    return torch.linspace(0, config.vocab_size - 1, count).long()[None]


def read_clean(file: Path, task: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """What reload.py finds."""
    (scratch / "task.json").write_text(json.dumps(task), encoding="utf-8")
    arguments = [str(scratch / "task.json")]
    return run_script(reload.__file__, arguments, {}, written="GGUF file", kept=f"file {file}")


def judged(found: Mapping[str, Any], file: Path, tolerance: float) -> float:
    for kind in ("missing", "unexpected", "mismatched"):
        if found[kind]:
            raise VerificationError(f"The written GGUF file has {kind} keys: {', '.join(found[kind][:3])}.")
    difference = float(found["difference"]) / max(float(found["largest_logit"]), 1e-30)
    if not difference <= tolerance:
        raise VerificationError(
            f"The written GGUF file gives other logits: they differ by {difference:.1e} of the largest, allowed is "
            f"{tolerance:.0e}. Please report it; the file {file} is kept."
        )
    if found["cut_otherwise"]:
        raise VerificationError(
            f"The tokenizer of the written GGUF file gives other tokens for {found['cut_otherwise'][0]!r}. "
            f"Please report it; the file {file} is kept."
        )
    return difference
