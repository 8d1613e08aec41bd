"""--max-memory is kept: what a run holds stays under it, and what cannot is refused before a weight is read."""

import mmap
import re
from pathlib import Path

import pytest

from cli_runner import Ran, Request, run_warm
from compress.errors import UsageError
from compress.planning.memory import Room, fit_to_limit, resident_bytes
from tiny import write_model, write_text

WORDS = "slice --model model --calib text.txt --samples 32 --seq-len 256 --device cpu --method slicegpt --ratio 0.25"
SLACK = 40 * 10**6  # bytes of data that libraries take beside, such as arenas of threads


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that takes far more for a batch than for its weights."""
    folder = tmp_path_factory.mktemp("memory")
    sizes = {"hidden_size": 128, "intermediate_size": 1024, "max_position_embeddings": 256, "num_hidden_layers": 2}
    write_model(folder / "model", "llama", **sizes)
    write_text(folder / "text.txt", lines=2000)
    return folder


def run(place: Path, out: str, *more: object, growth: int | None = None) -> Ran:
    words = [*WORDS.split(), "--out", out, "--json", *map(str, more)]
    return run_warm([Request(words, str(place), max_data_growth=growth)])[0]


def least(place: Path) -> int:
    refused = run(place, "dry", "--dry-run", "--max-memory", "1MB")
    assert refused.code == 2
    (found,) = re.findall(r"the run takes ([\d.]+) GB", refused.faults[0])
    return round(float(found) * 1e9)


def test_what_no_batch_fits_under_is_refused_with_the_least_that_would_do(place):
    refused = run(place, "dry", "--max-memory", "100MB")
    assert refused.code == 2
    assert re.fullmatch(
        r"--max-memory 0\.1 GB cannot be kept: with all activations on disk and 1 windows at a time the run takes "
        r"[\d.]+ GB\. Allow that, or use a shorter --seq-len\.",
        refused.faults[0],
    )
    assert not list(place.glob("dry*"))
    assert run(place, "dry", "--dry-run", "--max-memory", least(place)).code == 0


def test_under_a_limit_of_the_kernel_a_run_ends_well_that_was_told_of_it_and_no_other(place):
    limit = least(place)
    planned = run(place, "dry", "--dry-run", "--max-memory", limit)
    growth = planned.json["memory_bytes"] + SLACK
    kept = run(place, "kept", "--max-memory", limit, growth=growth)
    assert kept.code == 0, kept.err
    assert any(note.startswith("Within 0.") for note in kept.json["notes"])
    assert run(place, "untold", growth=growth).code != 0


def per_window(room: Room) -> int:
    return 50 + 10 * room.batch_size


@pytest.mark.parametrize(
    ("limit", "batch_size", "cache"), [(1000, 16, 690), (310, 16, 0), (309, 8, 79), (160, 1, 0), (229, 4, 39)]
)
def test_batches_are_halved_until_they_fit_and_the_rest_is_cache(limit, batch_size, cache):
    assert fit_to_limit(Room(16, 10**6), limit, 100, per_window, fixed_batch=False) == Room(batch_size, cache)


def test_what_the_user_said_stays():
    assert fit_to_limit(Room(16, 5), 1000, 100, per_window, fixed_batch=True) == Room(16, 5)
    with pytest.raises(UsageError, match=r"16 windows at a time the run takes 0\.02 GB.*smaller --batch-size"):
        fit_to_limit(Room(16, 5), 200, 100, per_window, fixed_batch=True)


def test_held_is_what_has_been_written_to():
    before, size = resident_bytes(), 50 * 2**20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(b"x" * size)
        grown = resident_bytes() - before
    assert 0.9 * size < grown < 2.5 * size  # what was written passes through memory too
