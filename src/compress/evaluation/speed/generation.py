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
from transformers import PreTrainedModel, StaticCache

from compress.errors import UnsupportedModel
from compress.evaluation.speed.memory import attempted, has_room
from compress.evaluation.speed.timing import Comparison, in_turns, seconds

SEED = 0
WARM_UP_STEPS = 3  # before a capture, as torch asks for


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
        # In place: the next step may be a recorded one, which reads what lies here.
        self.token.copy_(output.logits[:, -1:].argmax(-1))


class StaticDecoding(Decoding):
    """The same with a cache of fixed size and place, so that a step can be recorded once and run again."""

    def __init__(self, model: PreTrainedModel, ids: Int64[Tensor, "batch prompt"], new: int) -> None:
        super().__init__(model, ids)
        self.cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new)
        self.positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self.position = self.positions[:, -1:] + 1

    def prefill(self) -> None:
        self.cache.reset()
        self.position.fill_(self.ids.shape[1])
        self._advance(self.ids, position_ids=self.positions)

    def step(self) -> None:
        self._advance(self.token, position_ids=self.position)
        self.position.add_(1)


class GraphDecoding(StaticDecoding):
    """A step is a CUDA graph: one launch for all its kernels.

    Raises UnsupportedModel where the model does what a graph cannot hold.
    """

    def __init__(self, model: PreTrainedModel, ids: Int64[Tensor, "batch prompt"], new: int) -> None:
        super().__init__(model, ids, max(new, WARM_UP_STEPS + 1))
        self.prefill()
        try:
            self.replay = captured(super().step, ids.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise UnsupportedModel(
                f"A decoding step of {type(model).__name__} cannot be captured as a CUDA graph: {first} "
                "Leave out --cuda-graphs."
            ) from error

    def step(self) -> None:
        self.replay()


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Work as a CUDA graph. It is run a few times before, on a stream of its own.

    The graph reads and writes the tensors that it was recorded with: the caller keeps them.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    replay: Callable[[], None] = graph.replay
    return replay


def prompts(model: PreTrainedModel, workload: Workload) -> Int64[Tensor, "batch prompt"]:
    """Random tokens: what they are makes no difference to the time."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocabulary, (workload.batch, workload.prompt), generator=generator).to(model.device)


def runner(
    model: PreTrainedModel, workload: Workload, *, cuda_graphs: bool = False
) -> Callable[[], tuple[float, float]]:
    """What takes the seconds of the prefill and of the decoding, again with every call."""
    with torch.inference_mode():
        ids = prompts(model, workload)
        recorded = GraphDecoding(model, ids, workload.new) if cuda_graphs else None

    @torch.inference_mode()
    def run() -> tuple[float, float]:
        decoding = recorded or Decoding(model, ids)  # a new one takes its cache with it when it goes
        prefill = seconds(decoding.prefill, ids.device)
        return prefill, seconds(lambda: decoding.steps(workload.new), ids.device)

    return run


def compare_generation(
    dense: PreTrainedModel, compressed: PreTrainedModel, workload: Workload, *, rounds: int, cuda_graphs: bool = False
) -> Speeds:
    def pairs() -> list[tuple[tuple[float, float], tuple[float, float]]]:
        runs = [runner(model, workload, cuda_graphs=cuda_graphs) for model in (dense, compressed)]
        return in_turns(runs[0], runs[1], rounds)

    length = workload.prompt + workload.new
    room = all(has_room(model, workload.batch, length) for model in (dense, compressed))
    found = attempted(pairs) if room else None
    if found is None:
        return Speeds(workload, None, None)
    prefill, decode = (Comparison.of((one[part], other[part]) for one, other in found) for part in (0, 1))
    return Speeds(workload, prefill, decode)
