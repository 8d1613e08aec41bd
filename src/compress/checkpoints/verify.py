"""The proof that a written checkpoint is what was computed: reloaded in a clean process, same keys, same logits."""

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Float, Int64
from safetensors.torch import save_file
from torch import Tensor

from compress.checkpoints import reload
from compress.checkpoints.files import check_code
from compress.checkpoints.metadata import read_metadata
from compress.child_process import run_in_child
from compress.errors import VerificationError
from compress.models.gguf_opening import load_gguf_tokenizer
from compress.models.loading import load_config, load_tokenizer
from compress.models.storage import inputs_as_they_are
from compress.models.stored_loading import load_stored
from compress.models.untrusted import read_json

# Of the largest logit. Float32 against float32 is rounding; a model too large for that runs in its 16-bit dtype.
TOLERANCE = 1e-4
TOLERANCE_16_BIT = 0.05


def verify(
    folder: Path,
    ids: Int64[Tensor, "1 tokens"],
    logits: Float[Tensor, "1 tokens vocabulary"],
    *,
    memory: int,
    gguf_file: Path | None = None,
) -> float:
    """The largest difference of the reloaded model's logits, as a share of the largest logit.

    ids, logits: the probe, and what the walk computed for it from the rounded weights.
    memory: bytes the reloading may take; a larger model is loaded block by block. What stock code cannot read on this
        machine (`why_own`) this package's own reader does.
    gguf_file: read in the place of the folder that it was written from.
    Raises VerificationError on any other key or too large a difference.
    """
    written, kept = ("checkpoint", f"folder {folder}") if gguf_file is None else ("GGUF file", f"file {gguf_file}")
    # Beside the checkpoint: whatever ends this process, nothing is left elsewhere.
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as scratch:
        probe = Path(scratch) / "probe.safetensors"
        save_file({"ids": ids.cpu().contiguous(), "logits": logits.cpu().contiguous()}, probe)
        own = gguf_file is None and why_own(folder) is not None
        found = read_own(folder, ids, logits) if own else run_clean(folder, probe, memory, Path(scratch), gguf_file)
    for kind in ("missing", "unexpected", "mismatched"):
        if found[kind]:
            raise VerificationError(f"The written {written} has {kind} keys on reload: {', '.join(found[kind][:3])}.")
    difference = float(found["difference"]) / max(float(found["largest_logit"]), 1e-30)
    tolerance = TOLERANCE if found["bits"] >= 32 else TOLERANCE_16_BIT
    if not difference <= tolerance:
        raise VerificationError(
            f"The written {written} reloads with other logits: they differ by {difference:.1e} of the largest, "
            f"allowed is {tolerance:.0e}. Please report it; the {kept} is kept."
        )
    return difference


def verify_gguf(
    folder: Path,
    file: Path,
    ids: Int64[Tensor, "1 tokens"],
    logits: Float[Tensor, "1 tokens vocabulary"],
    *,
    memory: int,
) -> float:
    """The same of a GGUF file: transformers reads from it the folder's logits and the folder's tokens.

    memory: bytes the reading may take; a model that does not fit in float32 is read in its own dtype.
    """
    needed = 1.2 * file.stat().st_size
    if needed >= memory:
        raise VerificationError(
            f"Reading the GGUF file back takes {needed / 2**30:.1f} GiB of memory, {memory / 2**30:.1f} are free. "
            "Verify it on a larger machine."
        )
    difference = verify(folder, ids, logits, memory=memory, gguf_file=file)
    verify_tokens(folder, file)
    return difference


def why_own(folder: Path) -> str | None:
    """Why stock code cannot read packed weights here; None where it can, or where nothing is packed."""
    metadata = read_metadata(folder)
    if metadata.storage != "packed":
        return None
    wanted = (["compressed_tensors"] if metadata.quantized else []) + (["peft"] if metadata.adapter else [])
    absent = [name.replace("_", "-") for name in wanted if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} cannot be imported"
    unpacked, available = metadata.dense_size.bytes, psutil.virtual_memory().available
    if unpacked > available:
        return f"unpacked it takes {unpacked / 1e9:.0f} GB, and {available / 1e9:.0f} GB are free"
    return None


def read_own(folder: Path, ids: Tensor, logits: Tensor) -> dict[str, Any]:
    """What reload.py finds, by our own reader, which raises CheckpointError on any other key."""
    model = load_stored(folder, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode(), inputs_as_they_are(model):
        found: Tensor = model(input_ids=ids.cpu(), use_cache=False).logits
    return {
        **dict.fromkeys(("missing", "unexpected", "mismatched"), ()),
        "difference": float((found.double() - logits.cpu().double()).abs().max()),
        "largest_logit": float(logits.abs().max()),
        "bits": 32,
    }


# What tokenizers cut in different ways: spaces, digits, marks, scripts, code.
SAMPLE = "The year's 1st test: naïve façade, 東京 in 2024, don't  stop.\n\n\tdef f(x):\n    return x**2  # Привет 🙂"


def verify_tokens(source: Path, written: Path) -> None:
    """That a written tokenizer cuts text as before.

    The class of a copied one is chosen by config.json, whose model_type may be new; that of a GGUF file is put together
    from its lists.
    written: a folder or a GGUF file. Raises VerificationError with what differs.
    """
    before = load_tokenizer(source)
    after = load_tokenizer(written) if written.is_dir() else load_gguf_tokenizer(written)
    # Of special tokens that a class adds by default, the model may have none.
    size = load_config(source).get_text_config().vocab_size
    known = {token for token, number in before.get_vocab().items() if number < size}
    for text in (SAMPLE, *(f"a{token}" for token in before.all_special_tokens if token in known)):
        theirs, ours = (list(tokenizer(text)["input_ids"]) for tokenizer in (before, after))
        if theirs != ours:
            raise VerificationError(
                f"The tokenizer of {written} gives other tokens than that of {source}: {len(ours)} instead of "
                f"{len(theirs)} for {text[:20]!r}... Please report it; {written} is kept."
            )


def run_clean(folder: Path, probe: Path, memory: int, scratch: Path, gguf_file: Path | None = None) -> dict[str, Any]:
    """The JSON that reload.py prints in a process without this package; -I keeps the user's paths out.

    Code is run that we carried, no other, and cached in a folder of the run's own.
    """
    check_code(folder, read_json(folder / "config.json").get("auto_map"))
    arguments = [str(folder), str(probe), str(memory), str(scratch)] + ([str(gguf_file)] if gguf_file else [])
    variables = {
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = run_in_child("-I", reload.__file__, arguments, variables)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise VerificationError(f"The written {gguf_file or folder} does not load: {last[0]}. It is kept.")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if found["imported_compress"]:
        raise VerificationError("The reloading process imported this package; the proof would prove nothing.")
    return found
