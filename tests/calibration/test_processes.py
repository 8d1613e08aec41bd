"""Several processes that calibrate together write what one writes, to rounding; and they end together.

The processes are forks of a warm one with a launcher's environment, as `torchrun` gives it: what it adds, it adds by
starting and killing them.
"""

import shlex
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cli_runner import Disturbance, Ran, Request, environments, run_warm, snapshot
from compress.calibration.processes import Processes
from compress.calibration.streams import own_batches, split_windows
from compress.cli.options import own_gpu
from compress.errors import UsageError
from tiny import write_model, write_text

COMMANDS = {
    "slicegpt": "slice --model ../llama --method slicegpt --ratio 0.25 --set slice.slice_head=true --measure-error",
    "anchored": "slice --model ../llama --keep-params 0.8 --set budget.trial_samples=8",
    "lord": "lord --model ../opt --keep-params 0.85",
}
COMMANDS = {command: f"{words} --batch-size 2" for command, words in COMMANDS.items()}
ANY_BATCHES = "slicegpt, any batches"
CALIBRATION = "--calib ../text.txt --samples 12 --seq-len 32 --device cpu --out out --json"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_model(folder / "llama", "llama")
    write_model(folder / "opt", "opt")
    write_text(folder / "text.txt", lines=200)
    return folder


def launched(
    folder: Path, command: str, count: int, *more: str, hit: Mapping[int, Disturbance] | None = None
) -> list[Ran]:
    """A command in so many processes; `hit` disturbs some, by their ranks."""
    folder.mkdir(exist_ok=True)
    known = COMMANDS | {ANY_BATCHES: COMMANDS["slicegpt"].removesuffix("--batch-size 2")}
    words = (*shlex.split(known[command]), *shlex.split(CALIBRATION), *more)
    places = environments(count) if count > 1 else [{}]
    hit = hit or {}
    return run_warm([Request(words, str(folder), hit.get(rank), env=env) for rank, env in enumerate(places)])


@pytest.fixture(scope="module")
def made(root):
    """What a command wrote, in so many processes, each run once."""
    known: dict[tuple[str, int], Path] = {}

    def make(command: str, count: int) -> Path:
        if (command, count) not in known:
            folder = root / f"{command}-{count}"
            for rank, ran in enumerate(launched(folder, command, count)):
                assert ran.code == 0, ran.err
                assert bool(ran.out) == (rank == 0)
                assert rank == 0 or not ran.err
            known[command, count] = folder
        return known[command, count]

    return make


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.name} {name}": tensor
        for file in sorted((folder / "out").rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def apart(one: Path, other: Path) -> float:
    """The largest relative difference of a tensor of floats; codes, masks and orders must be equal."""
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    floats = {name for name, tensor in expected.items() if tensor.is_floating_point() and tensor.dtype.itemsize > 1}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if name not in floats)
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in floats)


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_write_what_one_does_to_rounding(made, command):
    """The same shapes, ranks, codes and masks: float64 sums in another order decide them alike, but at a tie."""
    assert apart(made(command, 1), made(command, 2)) < 1e-6


def test_as_many_processes_write_the_same_bytes_again(root, made):
    folder = root / "again"
    assert [ran.code for ran in launched(folder, "slicegpt", 2)] == [0, 0]
    assert snapshot(folder) == snapshot(made("slicegpt", 2))


KILLS = {
    "between states and their record": (0, "compress.checkpoints.run_folder:RunFolder._save", 5),
    "in the survey": (1, "compress.calibration.observers:LinearObserver._mean_gradients", 2),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_process_ends_the_others_and_the_run_goes_on(root, made, moment):
    rank, target, call = KILLS[moment]
    folder, began = root / f"killed {moment}", time.monotonic()
    ran = launched(folder, "lord", 2, hit={rank: Disturbance(target, call=call)})
    assert ran[rank].code == -signal.SIGKILL
    assert ran[1 - rank].code == 1
    assert time.monotonic() - began < 60
    assert sum(len(each.faults) for each in ran) <= 1
    if rank == 1:
        (fault,) = ran[0].faults
        assert fault.endswith("has died. What was finished is kept for --resume.")
    more = ["--resume"] if (folder / "out.partial").exists() else []
    assert bool(more) == (moment != "in the survey")  # where nothing was finished, nothing is kept
    assert [each.code for each in launched(folder, "lord", 2, *more)] == [0, 0]
    assert snapshot(folder) == snapshot(made("lord", 2))


def test_another_number_of_processes_cannot_resume(root):
    folder = root / "another number"
    launched(folder, "slicegpt", 2, hit={1: Disturbance("compress.checkpoints.run_folder:write_tensors", call=3)})
    for count, resumes in ((1, False), (2, True)):
        ran = launched(folder, "slicegpt", count, "--resume")
        assert [each.code for each in ran] == [0 if resumes else 2] * count
        if not resumes:
            assert "had another number of processes (2)." in ran[0].err


def test_one_process_that_fails_ends_all_with_its_message_once(root):
    hit = {1: Disturbance("compress.io:save_file", call=2, kind="full")}
    ran = launched(root / "full", "slicegpt", 2, hit=hit)
    assert [each.code for each in ran] == [1, 1]
    assert [len(each.faults) for each in ran] == [1, 0]
    assert "state-00001-1.safetensors cannot be written" in ran[0].faults[0]
    assert (root / "full" / "out.partial").is_dir()


def test_more_processes_than_batches(root):
    ran = launched(root / "few", "slicegpt", 2, "--batch-size", "12")
    assert ran[0].faults == ["--batch-size 12 leaves some of 2 processes without any of 12 windows. Use 6 or less."]
    assert [each.code for each in ran] == [2, 2]
    assert not ran[1].err
    assert not (root / "few" / "out.partial").exists()


class OneOf(Processes):
    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count


@pytest.mark.parametrize("count", [1, 2, 3])
def test_batches_are_shared_out_whole_and_in_turns(count):
    windows = torch.arange(11)[:, None].expand(11, 5)
    batches = split_windows(windows, 2, held_out=3)
    shares = [own_batches(batches, OneOf(rank, count)) for rank in range(count)]
    for number, batch in enumerate(batches):
        given = shares[number % count][number // count]
        assert torch.equal(given.ids, batch.ids)
        assert given.held_out == batch.held_out
    assert sum(map(len, shares)) == len(batches)
    assert all([batch.index for batch in share] == list(range(len(share))) for share in shares)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert own_gpu("cuda", 2) == "cuda:1"
    with pytest.raises(UsageError, match="2 processes are started on this machine, which has 1 GPUs"):
        own_gpu("cuda", 1)
    with pytest.raises(UsageError, match=r"--device cuda:0 is one GPU for 2 processes"):
        own_gpu("cuda:0", 2)
