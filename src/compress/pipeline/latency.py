"""The largest file that decodes fast enough on this machine, measured in llama.cpp before there are weights.

How long a token takes depends on the shapes and the types of a file's matrices, not on what is in them. So a file of
each size that is tried is written with random numbers for weights, and decodes in turns with the dense model's, written
so too.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import UsageError
from compress.evaluation.llamacpp import LlamaCpp
from compress.planning.prepare import Prepared

PROMPT, NEW, ROUNDS = 128, 32, 5  # tokens, and how often both files decode; the median ratio counts
TRIES = 6
NEAR = 0.01  # of the dense model's time: a size that leaves no more of what is allowed is taken


def largest_fast(least: int, most: int, target: float, measure: Callable[[int], float]) -> tuple[int, float]:
    """Find the largest size that takes at most `target` of the time that `most` takes, by `TRIES` measurements.

    measure: the share of the time that a size takes. Returns the size in bytes and its share.
    Raises UsageError where not even the least is fast enough.
    """
    fast, slow, size = (0, 0.0), (most, 1.0), max(least, int(target * most))
    for _ in range(TRIES):
        share = measure(size)
        if share <= target:
            fast = max(fast, (size, share))
        elif size == least:
            raise UsageError(
                f"Nothing that this model can be decodes in {target:g} of the dense model's time on this machine: the "
                f"smallest, of {least:,} bytes, takes {share:.2f}. Allow more."
            )
        else:
            slow = min(slow, (size, share))
        if target - NEAR <= fast[1]:
            break
        if fast[0]:
            along = (target - fast[1]) / (slow[1] - fast[1])
            size = fast[0] + int(along * (slow[0] - fast[0]))
        else:
            size = max(least, int(slow[0] * (target - NEAR / 2) / slow[1]))
    if not fast[0]:
        raise UsageError(f"No size was found in {TRIES} tries that decodes in {target:g} of the time. Allow more.")
    return fast


@contextmanager
def decode_shares(prepared: Prepared) -> Iterator[Callable[[Prepared], float]]:
    """Give what measures the time a token takes in a result to come, as a share of that in the dense model.

    Raises UsageError where xllamacpp is missing.
    """
    with tempfile.TemporaryDirectory(dir=prepared.job.partial) as scratch:
        dense = Decoding(prepared, prepared.config, {}, Path(scratch))

        def share(result: Prepared) -> float:
            spec = result.plan.spec
            types = {path: str(storage.block_type) for path, storage in spec.storage.items()}
            ours = Decoding(result, spec.config(), types, Path(scratch))
            return statistics.median(ours.seconds() / dense.seconds() for _ in range(ROUNDS))

        yield share


class Decoding:
    """A file of random weights in llama.cpp."""

    def __init__(self, prepared: Prepared, config: object, types: dict[str, str], scratch: Path) -> None:
        from compress.checkpoints.gguf import write_drawn

        file = scratch / "drawn.gguf"
        write_drawn(config, prepared.folder, file, types=types, dtype=prepared.written)
        self.prompt = max(1, min(PROMPT, prepared.config.max_position_embeddings - NEW))
        self.engine = LlamaCpp(file, context=self.prompt + NEW, vocabulary=prepared.config.vocab_size, exact=False)
        file.unlink()
        self.seconds()  # caches and pages

    def seconds(self) -> float:
        """Of one token."""
        return 1 / self.engine.speed(self.prompt, NEW)[1]
