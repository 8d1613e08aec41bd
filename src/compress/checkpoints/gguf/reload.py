"""Load a GGUF file as a stranger would and compare it with its folder. Run as a script, without our package.

    python -I reload.py TASK.json

The task names the folder, the file, alone in a folder of its own so that nothing beside it is read, a probe of tokens
with or without logits, texts, the dtype to hold weights in, and whether the file needs the folder's config. Logits are
computed in float32. Prints one JSON object: keys that were missing, unexpected or mismatched, the largest difference of
the logits beside the largest logit, and the texts that the file's tokenizer cuts otherwise.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

compute_in = runpy.run_path(str(Path(__file__).parents[1] / "reload.py"))["compute_in"]


def main(task: dict[str, Any]) -> dict[str, object]:
    probe = load_file(task["probe"])
    options = {"dtype": getattr(torch, task["dtype"]), "local_files_only": True}
    expected = probe.get("logits")
    if expected is None:
        expected = logits(AutoModelForCausalLM.from_pretrained(task["folder"], **options), probe["ids"])
    file = Path(task["file"])
    tokens = [AutoTokenizer.from_pretrained(task["folder"], local_files_only=True)]
    tokens += [AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)]
    if task["needs_config"]:
        # A file of the architecture llama holds Mistral's weights too; its reader does not know that class.
        theirs = AutoConfig.from_pretrained(task["folder"], local_files_only=True).to_dict()
        options["config"] = LlamaConfig(**{key: theirs[key] for key in theirs if key != "model_type"})
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, output_loading_info=True, **options
    )
    model, info = loaded
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
        "difference": float((logits(model, probe["ids"]) - expected).abs().max()),
        "largest_logit": float(expected.abs().max()),
        "cut_otherwise": [text for text in task["texts"] if tokens[0].encode(text) != tokens[1].encode(text)],
        "imported_compress": "compress" in sys.modules,
    }


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    compute_in(model, torch.float32)
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits.double()
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))) + "\n")
