"""Block-by-block distillation: each block of a compressed model learns to come to the dense model's stream behind it.

    min over theta of  mean over tokens of  ||f(s; theta) - x||^2 / mean(x^2)

s is what the compressed model's tuned prefix gives the block, x the dense model's stream behind its block, theta all
that the block stores as floats (`blocks_trainable.py`). The last block is judged by what the heads make of the two
streams, the divergence of the next token: nothing behind it can make up for its errors. Adam with a cosine, early
stopping on windows held out. Of each model one block at a time has weights, and beside the last one the head, so a 7B
model takes the memory of a few of its blocks.

After the Transformer Matching of 3BASiL (arXiv 2603.01376) and after BEAM. Ours knows every form that is written,
weighs tokens as the next norm will, finds a sliced stream's coordinates, and judges every epoch by the weights as they
are rounded and stored: the untuned block is a candidate, so no block comes out worse on the windows held out.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from compress import families
from compress.errors import UnsupportedModel, UsageError
from compress.models.decoder import Decoder
from compress.models.loading import load_config
from compress.models.stored_loading import FLOATS
from compress.streaming.loader import PartLoader
from compress.streaming.memory import return_free_memory
from compress.streaming.streams import Batch, CacheFolder
from compress.streaming.weights import READABLE, LazyWeights
from compress.tuning.blocks import Student, text_config
from compress.tuning.blocks_files import block_file, keep_block, kept_block
from compress.tuning.blocks_streams import Coordinates, Stream, are_shared, fitted
from compress.tuning.blocks_trainable import stored, trainable
from compress.tuning.rates import Rate

Tensors = dict[str, Tensor]
BETAS = (0.9, 0.95)
TOKENS_PER_STEP = 1024


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """
    epochs: passes over the windows, at most. patience: epochs without a better block on the held-out windows until it
    is left. rate: Adam's, as a share of each tensor's root mean square; it goes to zero by a cosine.
    batch_size: windows a step; by default about 1024 tokens.
    cache_memory: bytes of activations to hold in memory; past it they lie in files.
    """

    epochs: int = 10
    patience: int = 3
    rate: float = 1e-2
    batch_size: int | None = None
    cache_memory: int = 2**31
    seed: int = 42
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class BlockTuned:
    """Of a block behind the tuned prefix, on the held-out windows, and which epoch was kept: 0 for none.

    before, after: the relative squared error of its stream; of the last block the divergence of the next token in nats.
    """

    before: float
    after: float
    epoch: int


@dataclass(frozen=True)
class BlocksTuned:
    blocks: tuple[BlockTuned, ...]


def tune_blocks(
    folder: Path,
    teacher: Path,
    windows: Int64[Tensor, "windows tokens"],
    held_out: Int64[Tensor, "held_out tokens"],
    out: Path,
    settings: BlockSettings,
    on_block: Callable[[int, int], None],
) -> BlocksTuned:
    """Tune the checkpoint `folder` towards the dense model `teacher`.

    out: a folder that is this run's alone. It gets the finished blocks (`blocks_files.py`); called again, the same run
    goes on behind them and comes to the same bits. on_block: is told how many of how many blocks are done.

    Raises UsageError where the two are not of one model, CheckpointError for what is damaged, OutputError for `out`.
    """
    distillation = Distillation(folder, teacher, windows, held_out, out, settings)
    tuned: list[BlockTuned] = []
    on_block(0, distillation.num_blocks)
    for block in distillation.blocks():
        tuned.append(block)
        on_block(len(tuned), distillation.num_blocks)
    return BlocksTuned(tuple(tuned))


class Distillation:
    """Both models, their streams between two blocks, and what is done with a block."""

    def __init__(
        self,
        folder: Path,
        teacher: Path,
        windows: Int64[Tensor, "windows tokens"],
        held_out: Int64[Tensor, "held_out tokens"],
        out: Path,
        settings: BlockSettings,
    ) -> None:
        self.out = out
        self.settings = settings
        weights, config = LazyWeights(teacher), load_config(teacher)
        dtype = computing_dtype(weights)
        self.dense = Decoder(config, families.find(config), dtype=dtype, device=settings.device)
        self.loader = PartLoader(self.dense, weights)
        self.student = Student(folder, dtype=dtype, device=settings.device)
        check_one_model(self.student, self.dense, folder, teacher)
        batch_size = settings.batch_size or max(1, TOKENS_PER_STEP // windows.shape[1])
        self.batches = split(windows, held_out, batch_size)
        caches = CacheFolder(self.dense, out)
        memory = settings.cache_memory // 2
        self.given = self._stream(caches, "stream", memory)
        self.wanted = self._stream(caches, "dense", memory)
        self.own = Coordinates(self.dense.family.norm == "layer", self.dense.family.epsilon(config))

    def _stream(self, caches: CacheFolder, name: str, memory: int) -> Stream:
        return Stream(self.batches, caches.new(name, self.batches, memory, copies=2), self.settings.device)

    @property
    def num_blocks(self) -> int:
        return len(self.student.blocks)

    def blocks(self) -> Iterator[BlockTuned]:
        """Tunes block after block."""
        with self.loader.embeddings():
            self.wanted.embed(self.dense)
        with self.student.embeddings():
            self.given.embed(self.student)
        first = self.batches[0]
        self.shared = are_shared(self.own, self.given.now(first), self.wanted.now(first))
        for index in range(self.num_blocks):
            with self.loader.block(index):
                self.wanted.advance(self.dense.blocks[index], index)
            with self.student.block(index) as untuned:
                yield self._block(index, untuned)
                self.given.advance(self.student.blocks[index], index)
            return_free_memory()

    def _block(self, index: int, untuned: Mapping[str, Tensor]) -> BlockTuned:
        """Tune a block in place, or take it as an earlier run has left it."""
        block, prefix = self.student.blocks[index], self.student.block_prefix(index)
        if not block_file(self.out, index).exists():
            tuned, report = self._tune(index, untuned)
            keep_block(self.out, index, {prefix + name: tensor for name, tensor in tuned.items()}, report)
        kept, report = kept_block(self.out, index)
        self.student.fill(block, {name.removeprefix(prefix): tensor for name, tensor in kept.items()})
        before, after, epoch = report.tolist()
        return BlockTuned(before, after, int(epoch))

    def _tune(self, index: int, untuned: Mapping[str, Tensor]) -> tuple[Tensors, Tensor]:
        """The best block found, as it will be stored, and (before, after, epoch)."""
        with self._lesson(index) as lesson:
            return self._taught(lesson, untuned)

    def _taught(self, lesson: "Lesson", untuned: Mapping[str, Tensor]) -> tuple[Tensors, Tensor]:
        block, settings = self.student.blocks[lesson.index], self.settings
        pupil = Pupil(block, untuned, settings, steps=settings.epochs * len(lesson.learned()))
        best, kept = 0, {name: untuned[name] for name in pupil.stored()}
        before = after = lesson.held_out_error(block)
        for epoch in range(1, settings.epochs + 1):
            pupil.learn(lesson)
            found = pupil.stored()
            self.student.fill(block, found)
            error = lesson.held_out_error(block)
            if error < after:
                best, kept, after = epoch, found, error
            elif epoch - best >= settings.patience:
                break
        return kept, torch.tensor([before, after, best], dtype=torch.float64)

    @contextmanager
    def _lesson(self, index: int) -> Iterator["Lesson"]:
        """For the last block with both models' heads at hand."""
        if index < self.num_blocks - 1:
            yield Lesson(index, self.given, self.wanted, self._coordinates(index).error)
        else:
            with self.loader.head(), self.student.head():
                yield Lesson(index, self.given, self.wanted, self._divergence)

    def _divergence(
        self, stream: Float[Tensor, "*tokens d"], dense: Float[Tensor, "*tokens D"]
    ) -> Float[Tensor, "*tokens"]:
        """KL(dense || compressed) of each token's next one, in nats."""
        with torch.no_grad():
            wanted = self.dense.logits(dense).log_softmax(-1)
        found = self.student.logits(stream).log_softmax(-1)
        return nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)

    def _coordinates(self, index: int) -> Coordinates:
        """Of the stream behind a block, from the untuned block."""
        if self.shared:
            return self.own
        block = self.student.blocks[index]
        learned = [batch for batch in self.batches if not batch.held_out]
        with torch.no_grad():
            pairs = ((self.given.through(block, index, batch), self.wanted.now(batch)) for batch in learned)
            return fitted(self.own, pairs, name=f"block {index}")


@dataclass(frozen=True)
class Lesson:
    """What a block is given, and what it is to come to.

    judge: finds each token's error from the stream behind the block and the dense model's.
    """

    index: int
    given: Stream
    wanted: Stream
    judge: Callable[[Tensor, Tensor], Tensor]

    def error(self, block: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """Mean over a batch's tokens."""
        stream = self.given.through(block, self.index, batch)
        return self.judge(stream, self.wanted.now(batch)).mean()

    def learned(self) -> list[Batch]:
        return [batch for batch in self.given.batches if not batch.held_out]

    @torch.no_grad()
    def held_out_error(self, block: nn.Module) -> float:
        batches = [batch for batch in self.given.batches if batch.held_out]
        total = sum(float(self.error(block, batch)) * len(batch.ids) for batch in batches)
        return total / sum(len(batch.ids) for batch in batches)


class Pupil:
    """A trainable copy of a block with its optimizer.

    untuned: the block's tensors as they are stored, by their names below it.
    """

    def __init__(self, block: nn.Module, untuned: Mapping[str, Tensor], settings: BlockSettings, steps: int) -> None:
        self.block = trainable(block)
        self.untuned = untuned
        self.order = torch.Generator().manual_seed(settings.seed)
        rate = Rate(settings.rate, relative=True)
        groups = [{"params": [p], "lr": rate.of(p)} for p in self.block.parameters()]
        self.adam = torch.optim.Adam(groups, betas=BETAS)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, steps)

    def learn(self, lesson: Lesson) -> None:
        """One pass over the windows."""
        batches = lesson.learned()
        for place in torch.randperm(len(batches), generator=self.order).tolist():
            self.step(lesson, batches[place])

    def step(self, lesson: "Lesson", batch: Batch) -> None:
        self.adam.zero_grad()
        lesson.error(self.block, batch).backward()
        self.adam.step()
        self.schedule.step()

    def stored(self) -> Tensors:
        """What the checkpoint would store of the block as it is now."""
        dtype = next(tensor.dtype for tensor in self.untuned.values() if tensor.dtype in FLOATS)
        found = stored(self.block, dtype).items()
        return {name: tensor.to("cpu", self.untuned[name].dtype) for name, tensor in found}


def split(windows: Tensor, held_out: Tensor, batch_size: int) -> list[Batch]:
    tagged = [(ids, False) for ids in windows.split(batch_size)] + [(ids, True) for ids in held_out.split(batch_size)]
    return [Batch(index, ids, is_held_out) for index, (ids, is_held_out) in enumerate(tagged)]


def computing_dtype(weights: LazyWeights) -> torch.dtype:
    """The weights' own, but not below float32."""
    dtype = torch.float32
    for stored_as in {tensor.dtype for tensor in weights.stored.tensors.values()}:
        dtype = torch.promote_types(dtype, READABLE.get(stored_as, dtype))
    return dtype


def check_one_model(student: Student, dense: Decoder, folder: Path, teacher: Path) -> None:
    """Raises UsageError where the one cannot come of the other, UnsupportedModel for one with experts."""
    if any(branch.experts for branch in dense.family.branches):
        # Its files hold experts one by one, the stock class fuses them.
        raise UnsupportedModel("A model with experts is not tuned block by block. Use --distill logits.")
    ours, theirs = text_config(student.model.config), dense.config
    for what, own, other in (
        ("blocks", len(student.blocks), len(dense.blocks)),
        ("tokens", ours.vocab_size, theirs.vocab_size),
    ):
        if own != other:
            raise UsageError(
                f"{folder} has {own} {what}, {teacher} has {other}. Name the dense model that it was made from."
            )
