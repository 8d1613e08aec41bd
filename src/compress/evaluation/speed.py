"""Two models in turns: seconds of the same work, of prefill, of decoding, and of linears by themselves.

Prefill is the prompt's pass, up to the first new token of every row; decoding the passes after it, one token of every
row each, greedy, over the cache of keys and values. Linears are timed as SLiM reports speed (arXiv 2410.09615,
section 4), but over a model's own: those of one name and shape are called one after another, each with its own weights,
so that a weight small enough for the caches is not found there. What is found is a dict, as `--json` prints it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import psutil
import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils.benchmark import Timer, timer
from transformers import PreTrainedModel

from compress.models.soundness import free_memory
from compress.models.storage import Form, linears_of

SEED = 0
QUARTILES = torch.tensor((0.5, 0.25, 0.75), dtype=torch.float64)
LEAST = 10e-3  # seconds of a measured stretch of linears
T = TypeVar("T")


def in_turns(dense: Callable[[], T], compressed: Callable[[], T], rounds: int) -> list[tuple[T, T]]:
    """Both once a round, the first of the round by turns; one round before them warms up and is not counted.

    So neither has the caches, the clock rate or the neighbors of a better moment to itself.
    """
    dense(), compressed()
    pairs = []
    for number in range(rounds):
        if number % 2:
            second = compressed()
            pairs.append((dense(), second))
        else:
            pairs.append((dense(), compressed()))
    return pairs


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make it the device whose work `seconds` waits for."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def seconds(work: Callable[[], object]) -> float:
    """The clock is read when all that the current device was given is done, before the work and after it."""
    start = timer()
    work()
    return timer() - start


def compared(pairs: Iterable[tuple[float, float]], tokens: int = 0) -> dict[str, Any]:
    """Of pairs of seconds for the same work, and of its tokens a second.

    speedup: dense / compressed, of each pair; above 1, compressed is faster.
    """
    dense, other = zip(*pairs, strict=True)
    times = {"dense": spread(dense), "compressed": spread(other)}
    turned = {"median": "median", "low": "high", "high": "low"}  # the longest time is the lowest rate
    rates = {side: {name: tokens / each[of] for name, of in turned.items()} for side, each in times.items()}
    speedup = spread([one / two for one, two in zip(dense, other, strict=True)])
    return {"seconds": times, **({"tokens_per_second": rates} if tokens else {}), "speedup": speedup}


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles, so that the middle half lies between low and high."""
    quartiles = torch.tensor(values, dtype=torch.float64).quantile(QUARTILES).tolist()
    return dict(zip(("median", "low", "high"), quartiles, strict=True))


# Memory that work may not find.


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def attempted(work: Callable[[], T]) -> T | None:
    """What work gives, or None where the device's memory does not hold it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        pass
    # Not before the exception is gone: its traceback holds the tensors.
    free_memory()
    return None


def has_room(model: PreTrainedModel, batch: int, length: int) -> bool:
    """On the CPU, where a system out of memory ends the process: whether half of what is free holds the workload.

    Elsewhere always: there it can be tried out (`attempted`). Counted are, about, keys and values of `length` tokens a
    row, which are copied as they grow, and one position's logits.
    """
    if model.device.type != "cpu":
        return True
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * heads * head * length
    return 2 * batch * model.dtype.itemsize * (cache + text.vocab_size) < free_bytes(model.device) / 2


# Generation.


@dataclass(frozen=True)
class Workload:
    """Rows, tokens of each row's prompt, and passes of decoding after it."""

    batch: int
    prompt: int
    new: int


class Decoding:
    """Rows that grow by a token a step, whatever these are. ids: the prompts."""

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
    ids = prompts(model, workload)

    @torch.inference_mode()
    def run() -> tuple[float, float]:
        rows = decoding(model, ids)
        return seconds(rows.prefill), seconds(lambda: rows.steps(workload.new))

    return run


def compare_generation(
    dense: PreTrainedModel, compressed: PreTrainedModel, workload: Workload, *, rounds: int, decoding: Kind = Decoding
) -> dict[str, Any]:
    """Time two models in turns. prefill, decode: None where a model and the workload did not fit into memory."""
    run, other = (runner(model, workload, decoding) for model in (dense, compressed))
    length = workload.prompt + workload.new
    room = all(has_room(model, workload.batch, length) for model in (dense, compressed))
    pairs = attempted(lambda: in_turns(run, other, rounds)) if room else None
    prefill = decode = None
    if pairs is not None:
        prefill = compared([(one[0], two[0]) for one, two in pairs], workload.batch * workload.prompt)
        decode = compared([(one[1], two[1]) for one, two in pairs], workload.batch * workload.new)
    return {**asdict(workload), "prefill": prefill, "decode": decode}


# Linears by themselves.

Recorder = Callable[[Callable[[], object], torch.device], Callable[[], object]]


@dataclass(frozen=True)
class Place:
    """Linears of one name, shape and way to be stored, and what stands in their places."""

    name: str
    dense: Sequence[Any]
    compressed: Sequence[Any]

    @property
    def forms(self) -> tuple[Form, list[Form]]:
        """Of the dense ones, which have one; and of the others, whose sizes and ranks may differ by block."""
        return Form.of(self.dense[0]), [Form.of(linear) for linear in self.compressed]


@dataclass(frozen=True)
class Matched:
    """Linears by place. missing: dense ones in whose place there is none. added: those in no dense one's place."""

    places: list[Place]
    missing: list[str]
    added: list[str]


def matched(dense: nn.Module, compressed: nn.Module) -> Matched:
    """What stands where in both models: our own architecture keeps the names of the stock one."""
    own, stored = dict(linears_of(dense)), dict(linears_of(compressed))
    groups: dict[Any, list[tuple[Any, Any]]] = defaultdict(list)
    for path, linear in own.items():
        if path in stored:
            key = path.rpartition(".")[2], Form.of(linear), Form.of(stored[path]).kind
            groups[key].append((linear, stored[path]))
    places = [Place(name, *zip(*pairs, strict=True)) for (name, _, _), pairs in groups.items()]
    return Matched(places, [path for path in own if path not in stored], [path for path in stored if path not in own])


def compare_linears(
    place: Place,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rounds: int,
    record: Recorder = lambda work, _device: work,
) -> dict[str, Any]:
    """Seconds of one linear, the mean over the place's, on random inputs; None where memory did not hold it.

    record: gives what does the same work, such as a replay of it as a CUDA graph.
    """

    def pairs() -> list[tuple[float, float]]:
        # A graph reads the inputs that it was recorded with: they live as long as the pairs are measured.
        widths = {linear.in_features for linear in (*place.dense, *place.compressed)}
        inputs = {width: torch.randn(tokens, width, dtype=dtype, device=device) for width in widths}
        dense, compressed = (caller(linears, inputs, device, record) for linears in (place.dense, place.compressed))
        return in_turns(dense, compressed, rounds)

    found = attempted(pairs)
    dense, stored = place.forms
    return {
        "name": place.name,
        "linears": len(stored),
        "tokens": tokens,
        "dense": asdict(dense),
        "compressed": [asdict(form) for form in dict.fromkeys(stored)],
        **({"seconds": None, "speedup": None} if found is None else compared(found)),
    }


@torch.inference_mode()
def caller(
    linears: Sequence[Any], inputs: dict[int, torch.Tensor], device: torch.device, record: Recorder
) -> Callable[[], float]:
    """What takes the mean seconds of one of the linears, again with every call."""

    @torch.inference_mode()
    def once() -> None:
        for linear in linears:
            linear(inputs[linear.in_features])

    calls = {"all_of_them": record(once, device)}
    timed = Timer("all_of_them()", globals=calls, num_threads=torch.get_num_threads())
    # Each time after two calls at least that are not counted: kernels are chosen, tables made.
    count = max(1, math.ceil(LEAST / timed.timeit(1).mean))
    return lambda: timed.timeit(count).mean / len(linears)
