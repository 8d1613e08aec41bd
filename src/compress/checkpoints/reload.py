"""Load a checkpoint as a stranger would and compare its logits. Run as a script, in a process without our package.

    python -I reload.py FOLDER PROBE.safetensors MEMORY_BYTES SCRATCH [GGUF_FILE]

Prints one JSON object: keys that were missing, unexpected or mismatched, and the largest difference of the logits
beside the largest logit. A stock model is loaded by stock code alone, any other by the modeling file it carries. Where
the model in float32 exceeds the memory given, it is loaded in its own dtype and its blocks stay on disk until they are
needed. An adapter beside the model is loaded by PEFT, as a user would. A GGUF file is read in the folder's place.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig


def main(folder: str, probe_file: str, memory: int, scratch: str, gguf_file: str = "") -> dict[str, object]:
    probe = load_file(probe_file)
    facts, config = (
        json.loads((Path(folder) / name).read_text(encoding="utf-8")) for name in ("compress.json", "config.json")
    )
    carries_code = "auto_map" in config
    is_packed = facts["storage"] == "packed"
    # Stock code unpacks what is packed, to as many weights as the dense model has.
    fits = facts["dense_size" if is_packed else "size"]["parameters"] * 4 * 1.5 < memory
    options: dict[str, Any] = {"dtype": torch.promote_types(torch.float32, probe["logits"].dtype)}
    bits = None
    source = folder
    if gguf_file:
        source, of_file = as_stranger(Path(gguf_file), Path(scratch), config)
        options = of_file | (options if fits else {"dtype": getattr(torch, config["dtype"])})
    elif not fits and not is_packed:
        options = {"device_map": "auto", "max_memory": {"cpu": memory // 4}, "offload_folder": scratch}
    elif not fits:
        options, bits = {"dtype": "auto"}, 8 * facts["itemsize"]  # packed weights cannot stay on disk
    if "quantization_config" in config and (not fits or facts["unpacks_while_loading"]):
        options["quantization_config"], bits = CompressedTensorsConfig(dequantize=True), 8 * facts["itemsize"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, trust_remote_code=carries_code, output_loading_info=True, local_files_only=True, **options
    )
    model, info = loaded
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            scheme.input_activations = None  # the probe was not rounded either
    if (Path(folder) / "adapter").is_dir():
        # What is packed is unpacked when it is first used, here in float32; PEFT looks for the weights.
        model(input_ids=probe["ids"], use_cache=False)
        model, unmatched = with_adapter(model, str(Path(folder) / "adapter"))
        info["unexpected_keys"] = {*info["unexpected_keys"], *unmatched}
    with torch.inference_mode():
        logits = model.eval()(input_ids=probe["ids"], use_cache=False).logits
    difference = (logits.double() - probe["logits"].double()).abs().max()
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
        "difference": float(difference),
        "largest_logit": float(probe["logits"].abs().max()),
        "bits": bits or 8 * model.dtype.itemsize,
        "imported_compress": "compress" in sys.modules,
    }


def as_stranger(file: Path, scratch: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A folder with a GGUF file alone, because transformers also reads what lies beside it, and how to read it there.

    transformers' reader leaves out biases and rotary scaling, unless it gets a config that has them; and that of
    Mistral's class, whose weights a file of the architecture `llama` holds too, it does not know.
    """
    import gguf

    alone = scratch / "alone"
    alone.mkdir()
    (alone / "model.gguf").symlink_to(file.resolve())
    header = gguf.GGUFReader(file)
    names = [*(tensor.name for tensor in header.tensors), *header.fields]
    options: dict[str, Any] = {"gguf_file": "model.gguf"}
    if any(name.endswith((".bias", "rope_freqs.weight", "rope.scaling.type")) for name in names):
        options["config"] = LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})
    return str(alone), options


def with_adapter(model: Any, folder: str) -> tuple[Any, set[str]]:
    """The model with its adapter, and the adapter's tensors that have not come to lie in it as they are."""
    from peft import PeftModel, get_peft_model_state_dict

    adapted = PeftModel.from_pretrained(model, folder)
    found = get_peft_model_state_dict(adapted)
    written = load_file(f"{folder}/adapter_model.safetensors")
    same = {
        name
        for name in written.keys() & found.keys()
        if torch.equal(written[name], found[name].to(written[name].dtype))
    }
    return adapted, written.keys() - same


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])) + "\n")
