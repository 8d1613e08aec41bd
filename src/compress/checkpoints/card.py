"""README.md of a checkpoint: what it is, how it was made, how to load it."""

import json
from collections.abc import Mapping
from typing import Any

from compress.checkpoints.adapter import VLLM_RANKS


def model_card(facts: Mapping[str, Any]) -> str:
    """
    facts: what compress.json holds.
    """
    size, dense = facts["size"], facts["dense_size"]
    calibration = facts["recipe"]["calibration"]
    removed = 1 - size["parameters"] / dense["parameters"]
    share = f"{removed:.1%} removed" if removed >= 0 else f"{-removed:.1%} added"
    return f"""---
base_model: {json.dumps(facts["base_model"], ensure_ascii=False)}
library_name: transformers
pipeline_tag: text-generation
tags: [compress, {facts["recipe"]["method"]}]
---
# {facts["name"]}

{facts["base_model"]}, made smaller by compress {facts["versions"]["compress"]} with the method
`{facts["recipe"]["method"]}`: one pass over {calibration["samples"]} windows of {calibration["seq_len"]} tokens of
`{calibration["source"]}`, no training.

| | parameters | bytes |
|---|---|---|
| dense | {dense["parameters"]:,} | {dense["bytes"]:,} |
| this model | {size["parameters"]:,} ({share}) | {size["bytes"]:,} |

Everything is counted: shortcut matrices, biases, scales, adapters, embeddings, a head that no longer shares the
embeddings' weights.
{storage(facts)}{quality(facts)}
## Load it

{loading(facts)}

## Make it again

```
{facts["command"]}
```

compress.json holds the recipe, versions, fingerprints and a report on every point of the residual stream. The licence
is the base model's.
"""


def quality(facts: Mapping[str, Any]) -> str:
    divergence = facts["held_out_divergence"]
    if divergence is None:
        return ""
    return f"""
On calibration windows that nothing was fitted on, its next-token distribution diverges from the dense model's by
{divergence:.3f} nats a token (Kullback-Leibler).
"""


def storage(facts: Mapping[str, Any]) -> str:
    """What of the stored linears, and what would take as many bytes."""
    if not facts["alternatives"]:
        return ""
    rows = "\n".join(
        f"| {each['name']} | {each['bits_per_weight']:.2f} | {each['bytes']:,} |" for each in facts["alternatives"]
    )
    return f"""
Of the linear layers that are stored in fewer bits, and what else takes about as many bytes:

| stored as | bits a weight, all counted | bytes of the model |
|---|---|---|
{rows}
"""


def loading(facts: Mapping[str, Any]) -> str:
    return adapted(facts) if facts["adapter"] else plain(facts)


def adapted(facts: Mapping[str, Any]) -> str:
    """For a checkpoint with an adapter beside it."""
    return f"""A plain `{facts["architecture"]}` and, in `adapter/`, a LoRA that corrects its error. Both in one
call, from the packed weights, with compress:

```python
import compress
from transformers import AutoTokenizer

model = compress.load("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

With transformers and peft, the weights unpacked:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM{", CompressedTensorsConfig" if facts["quantized"] else ""}

model = AutoModelForCausalLM.from_pretrained("PATH"{unpacking(facts)})
model = PeftModel.from_pretrained(model, "PATH/adapter")
```

{serving(facts)}"""


def unpacking(facts: Mapping[str, Any]) -> str:
    return ", quantization_config=CompressedTensorsConfig(dequantize=True)" if facts["quantized"] else ""


def serving(facts: Mapping[str, Any]) -> str:
    if facts["not_for_vllm"]:
        return f"vLLM cannot serve it: {facts['not_for_vllm']}."
    ranks = [facts["adapter"]["r"], *facts["adapter"]["rank_pattern"].values()]
    rank = next(rank for rank in VLLM_RANKS if rank >= max(ranks))
    return f"""With vLLM; requests name the model `corrected`:

```
vllm serve PATH --enable-lora --lora-modules corrected=PATH/adapter --max-lora-rank {rank}
```"""


def plain(facts: Mapping[str, Any]) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
    ]
    if facts["loads_without_our_code"]:
        said = f"A plain `{facts['architecture']}`: whatever loads that class loads this, transformers among them."
        if facts["unpacks_while_loading"]:
            lines[0] = "from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig"
            lines[2] = f'model = AutoModelForCausalLM.from_pretrained("PATH"{unpacking(facts)})'
        if facts["quantized"]:
            said += " For its packed weights transformers needs compressed-tensors. "
            said += f"vLLM cannot serve it: {facts['not_for_vllm']}." if facts["not_for_vllm"] else "vLLM has it."
    else:
        said = "In an architecture of its own, whose code is in this folder."
        if facts["architecture"].startswith("LowRank"):
            said += " For engines that know no factors, `--materialize` writes the stock model, multiplied out."
        lines[1:1] = ["import compress  # registers it; without the package, pass trust_remote_code=True"]
    return f"{said}\n\n```python\n" + "\n".join(lines) + "\n```"
