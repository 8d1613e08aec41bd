"""The most tokens a second, by the protocol of SliceGPT (arXiv 2401.15024, table 11).

    python benchmarks/slicegpt_throughput.py COMPRESSED DENSE [--device cuda] [--dtype bfloat16]

Sequences of 128 tokens are decoded a token at a time over the cache of keys and values, from the first one on. A step's
time is the median of all; throughput is the batch by that. The batch is doubled until memory does not hold it or
throughput drops, and the best is the model's.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from compress.evaluation.speed import Decoding, Workload, attempted, current, has_room, prompts, seconds
from compress.models.stored_loading import open_model

LENGTH = 128  # tokens
ROUNDS = 3  # of every batch, the models in turns; the paper's own code has one


@dataclass
class Climb:
    """A model's way up. times: by batch, the median step's seconds in each round. ended: what ended the doubling."""

    model: PreTrainedModel
    times: dict[int, list[float]] = field(default_factory=dict)
    ended: Literal["memory", "throughput"] | None = None

    def throughput(self, batch: int) -> float:
        """Tokens a second."""
        return batch / statistics.median(self.times[batch])

    @property
    def best(self) -> int | None:
        """The batch with the most; None where not one row fits."""
        return max(self.times, key=self.throughput, default=None)

    def run(self, batch: int, length: int) -> None:
        if self.ended is not None:
            return
        fits = has_room(self.model, batch, length)
        taken = attempted(lambda: median_step(self.model, batch, length)) if fits else None
        if taken is None:
            self.times.pop(batch, None)
            self.ended = "memory"
        else:
            self.times.setdefault(batch, []).append(taken)

    def judge(self, batch: int) -> None:
        if self.ended is None and self.best != batch:
            self.ended = "throughput"


def most_throughput(
    models: Sequence[PreTrainedModel], *, length: int = LENGTH, on_batch: Callable[[int], None] = lambda batch: None
) -> list[Climb]:
    """Each model's climb, in turns as long as they climb. `on_batch` is told each batch before it is run."""
    climbs = [Climb(model) for model in models]
    batch = 1
    while any(climb.ended is None for climb in climbs):
        on_batch(batch)
        for number in range(ROUNDS):
            for climb in climbs if number % 2 else reversed(climbs):
                climb.run(batch, length)
        for climb in climbs:
            climb.judge(batch)
        batch *= 2
    return climbs


@torch.inference_mode()
def median_step(model: PreTrainedModel, batch: int, length: int) -> float:
    """Seconds."""
    ids = prompts(model, Workload(batch, length, 0))
    decoding = Decoding(model, ids[:, :1])
    times = []
    for place in range(length):
        decoding.token.copy_(ids[:, place : place + 1])
        times.append(seconds(decoding.step))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path, metavar=("COMPRESSED", "DENSE"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    models = [open_model(folder, dtype=dtype, device=device) for folder in options.folders]
    print("| model | batch | tokens/s | no larger batch |\n|---|---|---|---|")
    with current(device):
        climbs = most_throughput(models)
    for folder, climb in zip(options.folders, climbs, strict=True):
        best = climb.best
        cells = ["no room", ""] if best is None else [f"{best}", f"{climb.throughput(best):,.0f}"]
        print(f"| {folder.name} | {' | '.join(cells)} | {climb.ended} |")


if __name__ == "__main__":
    main()
