"""The proof that a written checkpoint is what was computed: reloaded in a clean process, same keys, same logits."""

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Float, Int64
from safetensors.torch import save_file
from torch import Tensor

from compress.apart import run_apart
from compress.checkpoints import reload
from compress.checkpoints.facts import read_json
from compress.checkpoints.files import check_code
from compress.errors import VerificationError
from compress.models.loading import load_tokenizer
from compress.models.packed import inputs_as_they_are
from compress.models.stored_loading import load_stored

# Of the largest logit. Float32 against float32 is rounding; a model too large for that runs in its 16-bit dtype.
TOLERANCE = 1e-4
TOLERANCE_16_BIT = 0.05


def verify(
    folder: Path,
    ids: Int64[Tensor, "1 tokens"],
    logits: Float[Tensor, "1 tokens vocabulary"],
    *,
    memory: int,
) -> float:
    """The largest difference of the reloaded model's logits, as a share of the largest logit.

    ids, logits: the probe, and what the walk computed for it from the rounded weights.
    memory: bytes the reloading may take; a larger model is loaded block by block. What stock code cannot read on this
        machine (`why_own`) this package's own reader does.
    Raises VerificationError on any other key or too large a difference.
    """
    # Beside the checkpoint: whatever ends this process, nothing is left elsewhere.
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as scratch:
        probe = Path(scratch) / "probe.safetensors"
        save_file({"ids": ids.cpu().contiguous(), "logits": logits.cpu().contiguous()}, probe)
        own = why_own(folder) is not None
        found = read_own(folder, ids, logits) if own else run_clean(folder, probe, memory, Path(scratch))
    for kind in ("missing", "unexpected", "mismatched"):
        if found[kind]:
            raise VerificationError(f"The written checkpoint has {kind} keys on reload: {', '.join(found[kind][:3])}.")
    difference = float(found["difference"]) / max(float(found["largest_logit"]), 1e-30)
    tolerance = TOLERANCE if found["bits"] >= 32 else TOLERANCE_16_BIT
    if not difference <= tolerance:
        raise VerificationError(
            f"The written checkpoint reloads with other logits: they differ by {difference:.1e} of the largest, "
            f"allowed is {tolerance:.0e}. Please report it; the folder {folder} is kept."
        )
    return difference


def why_own(folder: Path) -> str | None:
    """Why stock code cannot read packed weights here; None where it can, or where nothing is packed."""
    facts = json.loads((folder / "compress.json").read_text(encoding="utf-8"))
    if facts["storage"] != "packed":
        return None
    wanted = (["compressed_tensors"] if facts["quantized"] else []) + (["peft"] if facts["adapter"] else [])
    absent = [name.replace("_", "-") for name in wanted if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} cannot be imported"
    unpacked, available = facts["dense_size"]["bytes"], psutil.virtual_memory().available
    if unpacked > available:
        return f"unpacked it takes {unpacked / 1e9:.0f} GB, and {available / 1e9:.0f} GB are free"
    return None


def read_own(folder: Path, ids: Tensor, logits: Tensor) -> dict[str, Any]:
    """What reload.py finds, by our own reader, which raises CheckpointError on any other key."""
    model = load_stored(folder, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode(), inputs_as_they_are(model):
        found: Tensor = model(input_ids=ids.cpu(), use_cache=False).logits
    difference = float((found.double() - logits.cpu().double()).abs().max())
    keys: dict[str, Any] = {"missing": [], "unexpected": [], "mismatched": []}
    return {**keys, "difference": difference, "largest_logit": float(logits.abs().max()), "bits": 32}


# What tokenizers cut in different ways: spaces, digits, marks, scripts, code.
SAMPLE = "The year's 1st test: naïve façade, 東京 in 2024, don't  stop.\n\n\tdef f(x):\n    return x**2  # Привет 🙂"


def verify_tokens(source: Path, written: Path) -> None:
    """That the copied tokenizer cuts text as before: its class is chosen by config.json, whose model_type may be new.

    Raises VerificationError with what differs.
    """
    before, after = (load_tokenizer(folder)(SAMPLE)["input_ids"] for folder in (source, written))
    if list(before) != list(after):
        raise VerificationError(
            "The tokenizer of the written checkpoint gives other tokens than the dense model's: "
            f"{len(after)} instead of {len(before)} for {SAMPLE[:20]!r}... "
            f"Please report it; the folder {written} is kept."
        )


def run_clean(folder: Path, probe: Path, memory: int, scratch: Path) -> dict[str, Any]:
    """What reload.py finds. Code is run that we carried, no other, and cached in a folder of the run's own."""
    check_code(folder, read_json(folder / "config.json").get("auto_map"))
    arguments = [str(folder), str(probe), str(memory), str(scratch)]
    modules = {"HF_MODULES_CACHE": str(scratch / "modules")}
    return run_script(reload.__file__, arguments, modules, written="checkpoint", kept=f"folder {folder}")


def run_script(
    script: str, arguments: list[str], variables: Mapping[str, str], *, written: str, kept: str
) -> dict[str, Any]:
    """The JSON that a script prints in a process without this package; -I keeps the user's paths out.

    variables: of the environment, beside ours. written, kept: say in an error what does not load and where it lies.
    """
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = run_apart("-I", script, arguments, {**variables, **quiet})
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise VerificationError(f"The written {written} does not load: {last[0]}. The {kept} is kept.")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if found["imported_compress"]:
        raise VerificationError("The reloading process imported this package; the proof would prove nothing.")
    return found
