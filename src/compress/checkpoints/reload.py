"""Load a checkpoint as a stranger would and compare its logits. Run as a script, in a process without our package.

    python -I reload.py FOLDER PROBE.safetensors MEMORY_BYTES SCRATCH

Prints one JSON object: keys that were missing, unexpected or mismatched, and the largest difference of the logits
beside the largest logit. A stock model is loaded by stock code alone, any other by the modeling file it carries. Where
the model in float32 exceeds the memory given, it is loaded in its own dtype and its blocks stay on disk until they are
needed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main(folder: str, probe_file: str, memory: int, scratch: str) -> dict[str, object]:
    probe = load_file(probe_file)
    stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    itemsize = json.loads((Path(folder) / "compress.json").read_text(encoding="utf-8"))["itemsize"]
    carries_code = "auto_map" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    fits = stored * 4 / itemsize * 1.5 < memory
    options: dict[str, Any]
    if fits:
        options = {"dtype": torch.promote_types(torch.float32, probe["logits"].dtype)}
    else:
        options = {"device_map": "auto", "max_memory": {"cpu": memory // 4}, "offload_folder": scratch}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=carries_code, output_loading_info=True, local_files_only=True, **options
    )
    model, info = loaded
    with torch.inference_mode():
        logits = model.eval()(input_ids=probe["ids"], use_cache=False).logits
    difference = (logits.double() - probe["logits"].double()).abs().max()
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
        "difference": float(difference),
        "largest_logit": float(probe["logits"].abs().max()),
        "bits": 8 * model.dtype.itemsize,
        "imported_compress": "compress" in sys.modules,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])) + "\n")
