"""What cards and reports are made of: measures, a tuning, and names that are not to break out of them."""

from typing import Any

NASTY = [
    "a\n---\nlicense: mit\n---\n# b",
    "x`y``z```w | <script>alert(1)</script><img src=x onerror=y>",
    "[click](javascript:x) ![i](http://x) **b** _i_ ~~s~~ $x$ &amp;",
    '\'; "quoted" # not a comment: {x} %y @z',
    "```\n\n# heading\n\n```python\nx\n```",
    "- a",
    "1. a\n===",
    "{{ 7 * 7 }} {% for x in y %}",
]
ON_TEXT = {"dataset": "wikitext2", "tokens": 9, "windows": 2, "seconds": 0.5}
MEASURED: dict[str, Any] = {
    "perplexity": [{**ON_TEXT, "ppl": 12.345, "standard_error": 0.067, "seq_len": 2048, "nll": 2.5}],
    "divergence": [
        {
            **ON_TEXT,
            **{"dataset": "c4", "kl": 0.5, "agreement": 0.75, "standard_error": None, "seq_len": 64, "dense": "x"},
        }
    ],
    "tasks": {
        "scores": [
            {"task": task, "source": "files", "documents": 9, "metrics": {"acc": {"value": value, "standard_error": e}}}
            for task, value, e in (("piqa", 0.7, 0.1), ("boolq", 0.5, None))
        ],
        "average": {"acc": 0.6, "acc_norm": None},
    },
    "humaneval": {
        "rates": {"pass@1": {"value": 0.25, "standard_error": 0.05}},
        **{"problems": 164, "samples": 1, "temperature": 0.0, "passed": 41, "failures": {"failed": 123}},
    },
}
TUNING: dict[str, Any] = {
    "command": "compress finetune x",
    "data": {
        **{"source": "alpaca", "repository": "owner/alpaca", "license": None, "fingerprint": "0"},
        **{"windows": 1000, "seq_len": 256},
    },
    "trained": "factors",
    "trained_parameters": 9,
    "lora": None,
    "distill": "logits",
    "teacher": "tiny",
    "learning_rate": 1e-4,
    "relative_rate": False,
    "batch_size": 16,
    "planned_steps": 1200,
    "steps": 1200,
    "best_step": 1100,
    "losses": [[0, 3.0], [1100, 2.0]],
    "held_out": {"windows": 64, "before": 3.0, "after": 2.0},
    "other_text": None,
    "compressed_parts": {},
}
