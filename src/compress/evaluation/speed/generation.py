"""Prefill and decoding, each for itself, greedy and for so many tokens whatever these are.

Prefill is the prompt's pass, up to the first new token of every row; decoding the passes after it, one token of every
row each, over the cache of keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from compress.evaluation.speed.memory import attempted, has_room
from compress.evaluation.speed.timing import Comparison, in_turns, seconds

SEED = 0


@dataclass(frozen=True)
class Workload:
    """Rows, tokens of each row's prompt, and passes of decoding after it."""

    batch: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Speeds:
    """None where a model and the workload did not fit into memory."""

    workload: Workload
    prefill: Comparison | None
    decode: Comparison | None


class Decoding:
    """Rows that grow by a token a step.

    ids: the prompts.
    """

    def __init__(self, model: PreTrainedModel, ids: Int64[Tensor, "batch prompt"]) -> None:
        self.model, self.ids = model, ids
        self.cache: Any = None
        self.token: Int64[Tensor, "batch 1"] = ids[:, -1:].clone()

    def prefill(self) -> None:
        self.cache = None
        self._advance(self.ids)

    def step(self) -> None:
        self._advance(self.token)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def _advance(self, ids: Tensor, **options: Any) -> None:
        anything: Any = self.model
        output = anything(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **options)
        self.cache = output.past_key_values
        # In place: a step that is recorded as a CUDA graph reads what lies here.
        self.token.copy_(output.logits[:, -1:].argmax(-1))


Kind = Callable[[PreTrainedModel, Tensor], Decoding]


def prompts(model: PreTrainedModel, workload: Workload) -> Int64[Tensor, "batch prompt"]:
    """Random tokens: what they are makes no difference to the time."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocabulary, (workload.batch, workload.prompt), generator=generator).to(model.device)


def runner(model: PreTrainedModel, workload: Workload, decoding: Kind = Decoding) -> Callable[[], tuple[float, float]]:
    """What takes the seconds of the prefill and of the decoding, again with every call.

    decoding: gives what runs, from the model and the prompts; a new one with every call takes its cache with it.
    """
    with torch.inference_mode():
        ids = prompts(model, workload)

    @torch.inference_mode()
    def run() -> tuple[float, float]:
        rows = decoding(model, ids)
        prefill = seconds(rows.prefill, ids.device)
        return prefill, seconds(lambda: rows.steps(workload.new), ids.device)

    return run


def compare_generation(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    workload: Workload,
    *,
    rounds: int,
    decoding: Kind = Decoding,
) -> Speeds:
    def pairs() -> list[tuple[tuple[float, float], tuple[float, float]]]:
        runs = [runner(model, workload, decoding) for model in (dense, compressed)]
        return in_turns(runs[0], runs[1], rounds)

    length = workload.prompt + workload.new
    room = all(has_room(model, workload.batch, length) for model in (dense, compressed))
    found = attempted(pairs) if room else None
    if found is None:
        return Speeds(workload, None, None)
    prefill, decode = (Comparison.of((one[part], other[part]) for one, other in found) for part in (0, 1))
    return Speeds(workload, prefill, decode)
