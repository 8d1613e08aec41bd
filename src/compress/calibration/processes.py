"""Calibrate one model in several processes, each with its share of the batches (data parallel).

What adds up over tokens is added up over processes, in float64. Another number of processes adds in another order and
changes the result by rounding. What a stage makes of the sums is made by each process, and the first one's result then
stands for all: where two machines round differently, they still go on with one model. Processes talk over nccl about
what is on GPUs, over gloo about the rest, and in JSON over the launcher's store about plain data.

A process that fails says so in the store. The others look there while they wait, so that all end with one message.
"""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, distributed

from compress.errors import CompressError
from compress.process import launch

T = TypeVar("T")

LOOK_EVERY = 0.25  # seconds between looks at whether another process has failed
FIRST_WORD = 5.0  # seconds that the others leave to the first process, to print the message of a failure
FAILURE, TOLD = "failure", "told"  # in the store: what happened, and who says it
# Of one wait. A process that is gone is noticed at once; this ends only what is neither gone nor getting anywhere.
PATIENCE = timedelta(hours=6)
KEPT = "What was finished is kept for --resume."


class Processes:
    """A single process: every collective is the identity."""

    rank = 0
    count = 1
    local_count = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's share of items that all processes list in the same order: every n-th."""
        return list(items[self.rank :: self.count])

    def add_up(self, *sums: Tensor) -> None:
        """Sum tensors over all processes, in place."""

    def follow(self, *tensors: Tensor) -> None:
        """Broadcast the first process's tensors, in place."""

    def gathered(self, data: Any) -> list[Any]:
        """Gather plain data from all processes, in the order of their ranks; also a barrier."""
        return [data]

    def from_first(self, data: Any) -> Any:
        return self.gathered(data)[0]

    def total(self, number: int) -> int:
        return sum(self.gathered(number))

    @contextmanager
    def shared_fate(self) -> Iterator[None]:
        """End all processes, with one message, when one of them fails in this block."""
        yield


ALONE = Processes()


class FailedElsewhere(CompressError):
    """Another process has failed; its message and exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Group(Processes):
    """The processes of one launch, by torch.distributed. store: the launcher's, which all reach."""

    neighbors: Mapping[int, int] = {}  # process ids by ranks, of those on this machine

    def __init__(self, rank: int, count: int, local_count: int, store: Any) -> None:
        self.rank, self.count, self.local_count, self.store = rank, count, local_count, store
        self.said = 0

    def add_up(self, *sums: Tensor) -> None:
        with self._together():
            for one in sums:
                distributed.all_reduce(one)

    def follow(self, *tensors: Tensor) -> None:
        with self._together():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                distributed.broadcast(whole.reshape(-1).view(torch.uint8), src=0)
                if not tensor.is_contiguous():
                    tensor.copy_(whole)

    def gathered(self, data: Any) -> list[Any]:
        self.said += 1  # all processes call in the same order, so they count alike
        keys = [f"said/{self.said}/{rank}" for rank in range(self.count)]
        with self._noticing_deaths():
            self.store.set(keys[self.rank], json.dumps(data))
            pause, began, looked = 1e-5, time.monotonic(), time.monotonic()
            while not self.store.check(keys):
                time.sleep(pause)
                pause = min(2 * pause, 5e-3)
                if time.monotonic() - looked > LOOK_EVERY:
                    self._check()
                    looked = time.monotonic()
                if looked - began > PATIENCE.total_seconds():
                    raise CompressError(f"Another of the {self.count} processes does not answer. {KEPT}")
            return [json.loads(self.store.get(key)) for key in keys]

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Begin a transfer once all processes are here. Waiting is done in Python, to hear of signals and failures."""
        with self._noticing_deaths():
            self.gathered(None)
            yield

    @contextmanager
    def _noticing_deaths(self) -> Iterator[None]:
        """Turn a broken connection, to the store or between processes, into the failure that it means."""
        try:
            yield
        except RuntimeError as error:
            time.sleep(2 * LOOK_EVERY)  # whoever ended may say why
            with suppress(RuntimeError):
                self._check()
            raise CompressError(f"Another of the {self.count} processes has died. {KEPT}") from error

    def _check(self) -> None:
        """Raise FailedElsewhere where another process has failed, or is gone without a message."""
        gone = []
        for rank, pid in self.neighbors.items():
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    continue
            gone.append(rank)
        if self.store.check([FAILURE]):
            raise FailedElsewhere(*json.loads(self.store.get(FAILURE)))
        if gone:
            raise CompressError(f"Process {gone[0]} of {self.count} has died. {KEPT}")

    def meet(self) -> None:
        here = platform.node()
        met = self.gathered([here, os.getpid()])
        self.neighbors = {rank: pid for rank, (node, pid) in enumerate(met) if node == here and rank != self.rank}

    @contextmanager
    def shared_fate(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            if not self.is_first:
                raise SystemExit(130) from None
            raise
        except Exception as error:
            said, code = f"Process {self.rank} ended by {type(error).__name__}: {error}", 1
            if isinstance(error, CompressError):
                said, code = str(error), error.exit_code
            with suppress(RuntimeError):  # of a store that is gone
                self.store.compare_set(FAILURE, "", json.dumps([said, code]))  # all end with the first one
            if isinstance(error, CompressError) and not self._speaks():
                raise SystemExit(code) from error
            raise

    def _speaks(self) -> bool:
        """Whether this process is the one to print the message: the first, unless it does not get to it."""
        deadline, mine = time.monotonic() + (0 if self.is_first else FIRST_WORD), str(self.rank)
        try:
            while time.monotonic() < deadline and not self.store.check([TOLD]):
                time.sleep(LOOK_EVERY / 5)
            return bool(self.store.compare_set(TOLD, "", mine) == mine.encode())
        except RuntimeError:  # with the store went the first process, or the launcher, and they have spoken
            return self.is_first


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes of this launch, which compute on `device` each; with no launcher, this one alone."""
    here = launch()
    if here.count == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, count = next(distributed.rendezvous("env://", timeout=timedelta(minutes=5)))
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=distributed.PrefixStore("collectives", store),
        rank=rank,
        world_size=count,
        timeout=PATIENCE,
    )
    group = Group(rank, count, here.local_count, distributed.PrefixStore("plain", store))
    with group.shared_fate():
        group.meet()
        yield group
    distributed.destroy_process_group()
