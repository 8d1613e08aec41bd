"""What models write: functions of HumanEval, judged by their tests, and continuations of prompts.

HumanEval is how many of 164 functions a model writes that pass their tests (Chen et al., arXiv 2107.03374):

    pass@k = mean over problems of 1 - C(n - c, k) / C(n, k)      (section 2.1)

for n samples of a problem of which c pass: without bias for n >= k. The standard error is that of the mean over
problems, None for one. A completion ends before the first of the paper's stop strings.

Continuations are of the dense and the compressed model, greedy, unedited, one prompt at a time.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)

from compress.checkpoints.quality import Continuation, Continuations, HumanEval, Metric
from compress.errors import UsageError
from compress.evaluation._programs import PASSED, run_programs
from compress.evaluation.windows import Subject, mean_and_error
from compress.models.soundness import check_sound, context_length, evaluating, first_unsound
from compress.progress import Progress, Steps

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
TOP_P = 0.95
Problem = Mapping[str, str]


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; above it, as in the paper, from the tokens that make up 95% of the probability."""

    samples: int = 1
    temperature: float = 0.0
    ks: tuple[int, ...] = (1,)
    seed: int = 0
    max_new_tokens: int = 512


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that k of the samples, drawn without putting back, have a correct one among them."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def program_of(problem: Problem, completion: str) -> str:
    """As the paper's code puts it together: its tests run when `check` is called, on the last line."""
    return f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"


def check_can_run() -> None:
    """Raises UsageError where not even an empty program passes, so that no score would mean anything."""
    outcome = run_programs([""])[0] if os.name == "posix" else "cannot be limited"
    if outcome != PASSED:
        raise UsageError(f"--humaneval cannot run programs on this system: an empty one {outcome}. Use Linux or macOS.")


def measure(
    problems: Sequence[Problem],
    model: PreTrainedModel,
    tokenizer: Any,
    sampling: Sampling,
    *,
    batch_size: int,
    on_progress: Callable[[str, int], None],
) -> HumanEval:
    """Writes the programs, then runs them. `on_progress` is told `writing` or `running`, and how many more are done."""
    programs = []
    for problem, completion in completions(problems, model, tokenizer, sampling, batch_size):
        programs.append(program_of(problem, completion))
        on_progress("writing", 1)
    return judged(run_programs(programs, on_done=partial(on_progress, "running")), sampling)


def judged(outcomes: Sequence[str], sampling: Sampling) -> HumanEval:
    """Compute pass@k. outcomes: of all samples of the first problem, then of the second, ..."""
    n = sampling.samples
    correct = [outcomes[i : i + n].count(PASSED) for i in range(0, len(outcomes), n)]
    rates = {k: mean_and_error([pass_at_k(n, each, k) for each in correct]) for k in sampling.ks}
    failures = Counter(outcome.partition(":")[0] for outcome in outcomes if outcome != PASSED)
    return HumanEval(
        rates={f"pass@{k}": Metric(value=value, standard_error=error) for k, (value, error) in rates.items()},
        problems=len(correct),
        samples=n,
        temperature=sampling.temperature,
        passed=sum(correct),
        failures=dict(failures),
    )


def completions(
    problems: Sequence[Problem], model: PreTrainedModel, tokenizer: Any, sampling: Sampling, batch_size: int
) -> Iterator[tuple[Problem, str]]:
    """All samples of the first problem, then of the second, ...; the generator of torch is left as it was."""
    wanted = [problem for problem in problems for _ in range(sampling.samples)]
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices):
        torch.manual_seed(sampling.seed)
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            texts = complete([problem["prompt"] for problem in batch], model, tokenizer, sampling)
            yield from zip(batch, texts, strict=True)


def complete(prompts: Sequence[str], model: PreTrainedModel, tokenizer: Any, sampling: Sampling) -> list[str]:
    """The texts that the model goes on with, up to a stop sequence."""
    encoded = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    length = max(map(len, encoded))
    room = context_length(model.config, tokenizer) - length
    if room < 1:
        raise UsageError(f"--humaneval: a problem has {length} tokens, which is all that the model can read or more.")
    stopping, most = StoppingCriteriaList([StopInCompletion(tokenizer, length)]), min(sampling.max_new_tokens, room)
    texts = generate(encoded, model, tokenizer, sampling, most, stopping_criteria=stopping)
    return [cut_at_stop(text) for text in texts]


def generate(
    encoded: Sequence[list[int]], model: PreTrainedModel, tokenizer: Any, sampling: Sampling, most: int, **options: Any
) -> list[str]:
    """What the model adds to prompts of tokens, `most` new ones at most. options: more for transformers' `generate`."""
    length = max(map(len, encoded))
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    blanks = [length - len(each) for each in encoded]
    ids = [[pad] * blank + each for blank, each in zip(blanks, encoded, strict=True)]
    mask = [[0] * blank + [1] * (length - blank) for blank in blanks]
    anything: Any = model  # to its mixin `generate` is no method
    found = anything.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=generation_config(model, tokenizer, sampling, most, pad),
        logits_processor=LogitsProcessorList([Sound(model)]),
        **options,
    )
    return [continued(tokenizer, *each) for each in zip(encoded, found[:, length:].tolist(), strict=True)]


def generation_config(
    model: PreTrainedModel, tokenizer: Any, sampling: Sampling, max_new_tokens: int, pad: int
) -> GenerationConfig:
    """Nothing of the model's own: its defaults may sample, or punish repetition."""
    drawn = {"temperature": sampling.temperature, "top_p": TOP_P, "top_k": 0} if sampling.temperature > 0 else {}
    ends = getattr(model.generation_config, "eos_token_id", None)
    return GenerationConfig(
        do_sample=bool(drawn),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends if ends is not None else tokenizer.eos_token_id,
        **drawn,
    )


def continued(tokenizer: Any, tokens: list[int], new: list[int]) -> str:
    """What the new tokens add to the text of the others: alone, some tokenizers' lose the space before them."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = tokenizer.decode(tokens, **options), tokenizer.decode([*tokens, *new], **options)
    return str(whole)[len(before) :]


def cut_at_stop(text: str) -> str:
    return text[: min(place if (place := text.find(stop)) >= 0 else len(text) for stop in STOPS)]


class Sound(LogitsProcessor):  # type: ignore[misc,unused-ignore]
    """Raises NumericalError before a token is chosen by what is no number."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        again = partial(self.model, input_ids=input_ids, use_cache=False)
        # What may not be drawn has a score of -inf.
        check_sound(scores.clamp_min(0), "the logits of the next token", partial(first_unsound, self.model, again))
        return scores


class StopInCompletion(StopStringCriteria):  # type: ignore[misc,unused-ignore]
    """The stop strings, without the prompt: each of HumanEval's ends in the line end that they begin with."""

    def __init__(self, tokenizer: Any, prompt_tokens: int) -> None:
        super().__init__(tokenizer, list(STOPS))
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        done: Tensor = super().__call__(input_ids[:, self.prompt_tokens :], scores, **options)
        return done


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
    """One model in memory at a time, the dense one first, each up to its end of text; no chat template is applied.

    Raises UsageError for a prompt that leaves a model no room, NumericalError for logits that are no numbers.
    """
    steps, texts = Steps(progress, "writing on", 2 * len(prompts)), list[list[str]]()
    for subject in (dense, compressed):
        steps.begin(subject.name)
        texts.append([])
        with evaluating(model := load(subject)):
            for prompt in prompts:
                tokens: list[int] = subject.tokenizer(prompt, verbose=False)["input_ids"]
                most = context_length(model.config, subject.tokenizer)
                if not 0 < len(tokens) < most:
                    raise UsageError(
                        f"The prompt {prompt[:40]!r} has {len(tokens)} tokens, of which {subject.name} reads 1 to "
                        f"{most - 1}. Give another --prompt."
                    )
                new = min(NEW_TOKENS, most - len(tokens))
                texts[-1] += generate([tokens], model, subject.tokenizer, Sampling(), new)
                steps.advance()
        del model
    steps.end()
    pairs = zip(prompts, *texts, strict=True)
    found = [Continuation(prompt=prompt, dense=one, compressed=other) for prompt, one, other in pairs]
    return Continuations(dense=dense.name, tokens=NEW_TOKENS, texts=found)
