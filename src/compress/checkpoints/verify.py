"""The proof that a written checkpoint is what was computed: reloaded in a clean process, same keys, same logits.

A GGUF file is read back in this process, by the package's own reader.
"""

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

from compress import families
from compress.calibration.weights import LazyWeights, PartLoader
from compress.checkpoints import reload
from compress.checkpoints.files import check_code
from compress.checkpoints.metadata import read_metadata
from compress.errors import VerificationError
from compress.models.decoder import Decoder
from compress.models.gguf_weights import gguf_folder, load_gguf_tokenizer
from compress.models.loading import load_config, load_tokenizer
from compress.models.storage import inputs_as_they_are
from compress.models.stored_loading import load_stored
from compress.models.untrusted import read_json
from compress.process import run_in_child

# Of the largest logit. Float32 against float32 is rounding, for all tokens; where stock code rounds what it unpacks to
# 16 bits, or holds the model in them, the median token counts.
TOLERANCE = 1e-4
TOLERANCE_16_BIT = 0.02


def verify(
    folder: Path, ids: Int64[Tensor, "1 tokens"], logits: Float[Tensor, "1 tokens vocabulary"], *, memory: int
) -> float:
    """The largest difference of the reloaded model's logits, or the median token's, as a share of the largest logit.

    ids, logits: the probe, and what the walk computed for it from the rounded weights.
    memory: bytes the reloading may take; a larger model is loaded block by block. What stock code cannot read on this
        machine (`why_own`) this package's own reader does.
    Raises VerificationError on any other key or too large a difference.
    """
    if why_own(folder) is not None:
        return within(TOLERANCE, difference(read_own(folder, ids), logits), "checkpoint", f"folder {folder}")
    # Beside the checkpoint: whatever ends this process, nothing is left elsewhere.
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as scratch:
        probe = Path(scratch) / "probe.safetensors"
        save_file({"ids": ids.cpu().contiguous(), "logits": logits.cpu().contiguous()}, probe)
        found = run_clean(folder, probe, memory, Path(scratch))
    for kind in ("missing", "unexpected", "mismatched"):
        if found[kind]:
            raise VerificationError(f"The written checkpoint has {kind} keys on reload: {', '.join(found[kind][:3])}.")
    share = found["difference"] / max(found["largest_logit"], 1e-30)
    return within(TOLERANCE if found["bits"] >= 32 else TOLERANCE_16_BIT, share, "checkpoint", f"folder {folder}")


def difference(found: Tensor, logits: Tensor) -> float:
    """The largest, as a share of the largest logit."""
    return float((found.double() - logits.cpu().double()).abs().max()) / max(float(logits.abs().max()), 1e-30)


def within(tolerance: float, share: float, written: str, kept: str) -> float:
    """The share. Raises VerificationError where it is above the tolerance."""
    if not share <= tolerance:
        raise VerificationError(
            f"The written {written} reloads with other logits: they differ by {share:.1e} of the largest, "
            f"allowed is {tolerance:.0e}. Please report it; the {kept} is kept."
        )
    return share


def verify_gguf(
    folder: Path, file: Path, ids: Int64[Tensor, "1 tokens"], logits: Float[Tensor, "1 tokens vocabulary"]
) -> float:
    """The same of a GGUF file, whose header and weights are read back, and the folder's tokens from its tokenizer.

    Blocks are read one by one, by gguf's own decoder. transformers would parse the header, with its hundred thousand
    tokens, several times, which takes longer than all else.
    """
    source = gguf_folder(file)
    config, weights = load_config(source), LazyWeights(source)
    if config.model_type == "compress":  # with blocks that are not alike
        found = read_own(source, ids)
    else:
        dtype = torch.promote_types(torch.float32, logits.dtype)  # a CPU multiplies 16-bit floats far more slowly
        decoder = Decoder(config, families.find(config), dtype=dtype, device=torch.device("cpu"))
        head = [f"{decoder.family.head}.weight"] if config.tie_word_embeddings else []
        weights.check_against(decoder.parameter_shapes(), may_miss=head)
        loader = PartLoader(decoder, weights)
        with torch.inference_mode():
            with loader.embeddings():
                stream, arguments = decoder.embed(ids.cpu())
            for index, block in enumerate(decoder.blocks):
                with loader.block(index):
                    stream = block(stream, **arguments[index])
            with loader.head():
                found = decoder.logits(stream)
    verify_tokens(folder, file)
    return within(TOLERANCE, difference(found, logits), "GGUF file", f"file {file}")


def why_own(folder: Path) -> str | None:
    """Why stock code cannot read packed weights here; None where it can, or where nothing is packed."""
    metadata = read_metadata(folder)
    if metadata.form != "packed":
        return None
    wanted = (["compressed_tensors"] if metadata.quantized else []) + (["peft"] if metadata.adapter else [])
    absent = [name.replace("_", "-") for name in wanted if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} cannot be imported"
    unpacked, available = metadata.dense_size.bytes, psutil.virtual_memory().available
    if unpacked > available:
        return f"unpacked it takes {unpacked / 1e9:.0f} GB, and {available / 1e9:.0f} GB are free"
    return None


def read_own(folder: Path, ids: Tensor) -> Tensor:
    """The logits by our own reader, which raises CheckpointError on any other key."""
    model = load_stored(folder, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode(), inputs_as_they_are(model):
        found: Tensor = model(input_ids=ids.cpu(), use_cache=False).logits
    return found


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


def run_clean(folder: Path, probe: Path, memory: int, scratch: Path) -> dict[str, Any]:
    """The JSON that reload.py prints in a process without this package; -I keeps the user's paths out.

    Code is run that we carried, no other, and cached in a folder of the run's own.
    """
    check_code(folder, read_json(folder / "config.json").get("auto_map"))
    arguments = [str(folder), str(probe), str(memory), str(scratch)]
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
        raise VerificationError(f"The written {folder} does not load: {last[0]}. It is kept.")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if found["imported_compress"]:
        raise VerificationError("The reloading process imported this package; the proof would prove nothing.")
    return found
