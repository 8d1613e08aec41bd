"""Decoding and linears as CUDA graphs, for gpu_bench.py: one launch for all kernels of a step."""

from collections.abc import Callable

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from compress.errors import UnsupportedModel
from compress.evaluation.speed import Decoding

WARM_UP_STEPS = 3  # before a capture, as torch asks for


def recorded(new: int) -> Callable[[PreTrainedModel, Tensor], Decoding]:
    """What decodes so many tokens for a model, recorded at its first call and replayed afterwards."""
    made: dict[int, GraphDecoding] = {}

    def of(model: PreTrainedModel, ids: Tensor) -> Decoding:
        if id(model) not in made:
            made[id(model)] = GraphDecoding(model, ids, new)
        return made[id(model)]

    return of


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
