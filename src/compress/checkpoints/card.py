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

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress  # registers the architecture; without it, pass trust_remote_code=True (the code is in this folder)

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

## Make it again

```
{facts["command"]}
```

compress.json holds the recipe, versions, fingerprints and a report on every point of the residual stream. The licence
is the base model's.
"""
