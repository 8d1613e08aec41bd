"""README.md of a checkpoint: what it is, how it was made, how to load it."""

import json
from collections.abc import Mapping
from typing import Any


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

Everything is counted: shortcut matrices, biases, embeddings, a head that no longer shares the embeddings' weights.
{quality(facts)}
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


def loading(facts: Mapping[str, Any]) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
    ]
    if facts["loads_without_our_code"]:
        said = f"A plain `{facts['architecture']}`: whatever loads that class loads this, transformers among them."
    else:
        said = "In an architecture of its own, whose code is in this folder."
        if facts["linears"]:
            said += " For engines that know no factors, `--materialize` writes the stock model, multiplied out."
        lines[1:1] = ["import compress  # registers it; without the package, pass trust_remote_code=True"]
    return f"{said}\n\n```python\n" + "\n".join(lines) + "\n```"
