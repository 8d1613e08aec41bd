"""Load a checkpoint as a stranger would and compare its logits. Run as a script, in a process without our package.

    python -I reload.py FOLDER PROBE.safetensors MEMORY_BYTES SCRATCH

Prints one JSON object: keys that were missing, unexpected or mismatched, and the largest difference of the logits
beside the largest logit; of weights in 16 bits the median token's. A stock model is loaded by stock code alone, any
other by the modeling file it carries. Where the model in float32 exceeds the memory given, its blocks stay on disk
until they are needed; a packed one, whose blocks cannot, is held in its own dtype. All compute in float32 at least, as
a CPU multiplies 16-bit floats far more slowly. An adapter beside the model is loaded by PEFT, as a user would.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def main(folder: str, probe_file: str, memory: int, scratch: str) -> dict[str, object]:
    probe = load_file(probe_file)
    facts, config = (
        json.loads((Path(folder) / name).read_text(encoding="utf-8")) for name in ("compress.json", "config.json")
    )
    carries_code = "auto_map" in config
    is_packed = facts["form"] == "packed"
    # Stock code unpacks what is packed, to as many weights as the dense model has.
    fits = fits_in_float32(facts["dense_size" if is_packed else "size"]["parameters"], memory)
    computing = torch.promote_types(torch.float32, probe["logits"].dtype)
    options: dict[str, Any] = {"dtype": computing}
    bits = 8 * computing.itemsize
    if not fits and not is_packed:
        options |= {"device_map": "auto", "max_memory": {"cpu": memory // 4}, "offload_folder": scratch}
    elif not fits:
        options = {"dtype": "auto"}  # packed weights cannot stay on disk
    # While it loads them transformers unpacks all linears by one type; of several, it does when they are first used.
    is_mixed = len(config.get("quantization_config", {}).get("config_groups", ())) > 1
    if is_mixed and not fits:
        bits = 8 * facts["itemsize"]
    elif "quantization_config" in config and (not fits or facts["unpacks_while_loading"]):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        # 4-bit floats times a power of two or a few bits more are exact in any dtype.
        bits = bits if "fp4" in config["quantization_config"]["format"] else 8 * facts["itemsize"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=carries_code, output_loading_info=True, local_files_only=True, **options
    )
    model, info = loaded
    if not fits and is_packed:
        if is_mixed:
            model(input_ids=probe["ids"][:, :1], use_cache=False)
        compute_in(model, computing)
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
    differences = (logits.double() - probe["logits"].double()).abs().amax(-1)
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
        # Weights rounded to 16 bits move a token of massive activations, an attention sink, far more than all others.
        "difference": float(differences.max() if bits >= 32 else differences.median()),
        "largest_logit": float(probe["logits"].abs().max()),
        "bits": bits,
        "imported_compress": "compress" in sys.modules,
    }


def fits_in_float32(parameters: int, memory: int) -> bool:
    """Whether a model of float32 computes in so many bytes, which takes half as much again."""
    return parameters * 4 * 1.5 < memory


def compute_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let modules whose tensors are held in 16 bits compute in `dtype`: each has them converted while it runs."""
    for module in model.modules():
        if any(is_narrow(tensor) for tensor in (*module.parameters(False), *module.buffers(False))):
            vars(module)["forward"] = functools.partial(converted, module, module.forward, dtype)


def converted(module: Any, forward: Any, dtype: torch.dtype, *args: Any, **options: Any) -> Any:
    """What forward gives for inputs, parameters and buffers in `dtype`."""
    held = [(table, dict(table)) for table in (module._parameters, module._buffers)]
    wide = functools.partial(
        tree_map_only, torch.Tensor, lambda tensor: tensor.to(dtype) if is_narrow(tensor) else tensor
    )
    try:
        for table, tensors in held:
            table.update(wide(tensors))
        return forward(*wide(args), **wide(options))
    finally:
        for table, tensors in held:
            table.update(tensors)


def is_narrow(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def with_adapter(model: Any, folder: str) -> tuple[Any, set[str]]:
    """The model with its adapter, and the adapter's tensors that have not come to lie in it as they are."""
    from peft import PeftModel, get_peft_model_state_dict

    adapted = PeftModel.from_pretrained(model, folder)
    found = get_peft_model_state_dict(adapted)
    written = load_file(f"{folder}/adapter_model.safetensors")
    return adapted, {
        name
        for name, tensor in written.items()
        if name not in found or not torch.equal(tensor, found[name].to(tensor.dtype))
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])) + "\n")
