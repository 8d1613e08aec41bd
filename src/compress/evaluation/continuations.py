"""How the dense and the compressed model go on with the same prompts: greedily, unedited, one prompt at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from compress.checkpoints.quality import Continuation, Continuations
from compress.errors import UsageError
from compress.evaluation._inference import context_length, evaluating
from compress.evaluation.evaluate import Subject
from compress.evaluation.humaneval import Sampling, Sound, continued, generation
from compress.progress import Progress, Steps

NEW_TOKENS = 48
# Prose and programs by turns, so that the first few suit any model.
PROMPTS = (
    "The capital of France is",
    'def is_prime(n):\n    """',
    "Once upon a time, there was a",
    "class Stack:\n    def __init__(self):\n",
    "Water boils at a temperature of",
    "import os\n\nfor name in os.listdir(",
    "The most important thing about learning is",
    "def read_lines(path):\n",
)


def compare(
    dense: Subject,
    compressed: Subject,
    prompts: Sequence[str],
    load: Callable[[Subject], PreTrainedModel],
    progress: Progress,
) -> Continuations:
    """One model in memory at a time, the dense one first.

    Raises UsageError for a prompt that leaves a model no room, NumericalError for logits that are no numbers.
    """
    steps, texts = Steps(progress, "writing on", 2 * len(prompts)), list[list[str]]()
    for subject in (dense, compressed):
        steps.begin(subject.name)
        texts.append(written(load(subject), subject, prompts, steps))
    steps.end()
    pairs = zip(prompts, *texts, strict=True)
    found = [Continuation(prompt=prompt, dense=one, compressed=other) for prompt, one, other in pairs]
    return Continuations(dense=dense.name, tokens=NEW_TOKENS, texts=found)


def written(model: PreTrainedModel, subject: Subject, prompts: Sequence[str], steps: Steps) -> list[str]:
    """What a model goes on with, up to its end of text or `NEW_TOKENS`. No chat template is applied."""
    anything: Any = model  # to its mixin `generate` is no method
    tokenizer, found = subject.tokenizer, list[str]()
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    with evaluating(model):
        for prompt in prompts:
            tokens: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
            most = context_length(model.config, tokenizer)
            if not 0 < len(tokens) < most:
                raise UsageError(
                    f"The prompt {prompt[:40]!r} has {len(tokens)} tokens, of which {subject.name} reads 1 to "
                    f"{most - 1}. Give another --prompt."
                )
            ids = torch.tensor([tokens], device=model.device)
            new = anything.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=generation(model, tokenizer, Sampling(), min(NEW_TOKENS, most - len(tokens)), pad),
                logits_processor=LogitsProcessorList([Sound(model)]),
            )
            found.append(continued(tokenizer, tokens, new[0, len(tokens) :].tolist()))
            steps.advance()
    return found
