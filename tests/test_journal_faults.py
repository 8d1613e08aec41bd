"""Journals that were cut, changed, mixed up or made up: a beginning of what happened counts, or nothing does."""

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import UsageError
from compress.streaming.journal import JOURNAL, SEAL, Journal, named_files, read_lines, rewritten, write_tensors
from fault_kinds import STRANGE, hurt

IDENTITY = {"recipe": {"ratio": 0.25}, "model": "5ac1"}
NUM_PARTS = 3


@pytest.fixture(scope="module")
def three_parts(tmp_path_factory):
    """A finding and three parts. All states are kept, so that any number of parts can be gone on from."""
    folder = tmp_path_factory.mktemp("journal") / "out.partial"
    journal = Journal.start(folder, IDENTITY)
    journal.note("survey", {"x": 1.5}, {"moment": torch.ones(2)})
    states = {}
    for number in range(NUM_PARTS):
        part = write_tensors(folder / f"model-{number}.safetensors", {"weight": torch.full((4,), float(number))})
        journal.record({"name": f"part {number}", "part": part}, {"stream": torch.full((2,), float(number))})
        state = folder / journal.entries[-1]["state"]["file"]
        states[state] = state.read_bytes()
    journal.close()
    for file, content in states.items():
        file.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def lines(three_parts):
    return read_lines(three_parts / JOURNAL)


def counted(folder: Path) -> list[str] | None:
    """The parts that a resumed run counts, after a look that its state is the last one's; None where it is refused."""
    if not read_lines(folder / JOURNAL) or not isinstance(read_lines(folder / JOURNAL)[0].get("run"), dict):
        with pytest.raises(UsageError, match="Start over with --overwrite"):
            Journal.resume(folder, IDENTITY)
        return None
    journal = Journal.resume(folder, IDENTITY)
    names = [entry["name"] for entry in journal.entries]
    if names:
        assert journal.state()["stream"][0] == len(names) - 1
    if "survey" in journal.findings:
        assert torch.equal(journal.found_tensors("survey")["moment"], torch.ones(2))
    assert names == [] or "survey" in journal.findings
    journal.close()
    return names


def test_the_lines_are_a_beginning_wherever_it_is_cut(three_parts, lines, tmp_path):
    whole, file = (three_parts / JOURNAL).read_bytes(), tmp_path / JOURNAL
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        found = read_lines(file)
        assert found == lines[: len(found)]
        assert len(found) >= whole[:length].count(b"\n")


def test_the_lines_are_a_beginning_whichever_bit_is_flipped(three_parts, lines, tmp_path):
    whole, file = (three_parts / JOURNAL).read_bytes(), tmp_path / JOURNAL
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        found = read_lines(file)
        assert found == lines[: len(found)]
        assert len(found) >= whole[:place].count(b"\n")


@pytest.mark.parametrize("seed", range(10))
def test_a_damaged_journal_counts_a_beginning_or_is_refused(three_parts, tmp_path, seed):
    """Ten kinds of damage a seed, among them values of other types, huge numbers and names that lead elsewhere."""
    rng, elsewhere = random.Random(seed), tmp_path / "text.txt"
    elsewhere.write_text("not ours")
    for number in range(10):
        folder = shutil.copytree(three_parts, tmp_path / str(number) / "out.partial")
        (folder / JOURNAL).write_bytes(hurt((folder / JOURNAL).read_bytes(), rng))
        names = counted(folder)
        assert names is None or names == [f"part {i}" for i in range(len(names))]
    assert elsewhere.read_text() == "not ours"


PLACES = [(2, "part"), (3, "part"), (3, "state"), (4, "part"), (4, "state")]


@pytest.mark.parametrize("key", ["file", "sha256"])
@pytest.mark.parametrize("place", PLACES)
def test_a_line_that_speaks_of_other_files_ends_the_journal(three_parts, lines, tmp_path, place, key):
    """Even where the line bears a good seal."""
    index, kind = place
    for number, value in enumerate([*STRANGE, "model-9.safetensors", "sub/model-0.safetensors", "0" * 64]):
        folder = shutil.copytree(three_parts, tmp_path / str(number) / "out.partial")
        changed = copy.deepcopy(lines)
        changed[index][kind][key] = value
        rewritten(folder / JOURNAL, changed)
        # A state is only needed of the last part that counts.
        expected = NUM_PARTS if (kind, index) == ("state", 3) else index - 2
        assert counted(folder) == [f"part {i}" for i in range(expected)]


@pytest.mark.parametrize("value", [*STRANGE, "0" * 64])
def test_a_finding_whose_file_is_not_there_takes_the_parts_with_it(three_parts, lines, tmp_path, value):
    folder = shutil.copytree(three_parts, tmp_path / "out.partial")
    changed = copy.deepcopy(lines)
    changed[1]["files"][0]["sha256"] = value
    rewritten(folder / JOURNAL, changed)
    assert counted(folder) == []


@pytest.mark.parametrize("first", [{"run": 7}, {"run": None}, {"run": []}, {"finding": "run", "files": []}])
def test_a_first_line_that_is_no_run_is_refused(three_parts, tmp_path, first):
    folder = shutil.copytree(three_parts, tmp_path / "out.partial")
    rewritten(folder / JOURNAL, [first])
    assert counted(folder) is None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "9" * 5000, '{"seal": 1e999}', "NaN"])
def test_text_that_no_parser_likes_is_no_line(three_parts, lines, tmp_path, text):
    file = tmp_path / JOURNAL
    file.write_text((three_parts / JOURNAL).read_text() + text + "\n")
    assert read_lines(file) == lines


def test_lines_that_are_written_again_are_read_as_they_were(lines, tmp_path):
    """Whatever JSON makes of keys and tuples on the way."""
    finding = {"finding": "é\u2028", "files": [], "numbers": {10: (1, 2), 9: 0.1}}
    odd: list[dict[str, Any]] = [{"run": {}}, finding, {"part": {}, "x": float("inf")}]
    for some in (lines, odd):
        sealed = rewritten(tmp_path / JOURNAL, some)
        assert json.dumps(read_lines(tmp_path / JOURNAL), sort_keys=True) == json.dumps(
            json.loads(json.dumps(sealed)), sort_keys=True
        )
        assert len(sealed) == len(some)
        assert len({line[SEAL] for line in sealed}) == len(some)


def test_what_no_line_speaks_of_goes(three_parts, lines, tmp_path):
    folder = shutil.copytree(three_parts, tmp_path / "out.partial")
    for name in ("model-3.safetensors.unfinished", "config.json", "activations-stream-x"):
        (folder / name).write_text("left by a kill")
    (folder / "scratch-x").mkdir()
    (folder / "scratch-x" / "probe.safetensors").write_text("left by a kill")
    assert counted(folder) == [f"part {i}" for i in range(NUM_PARTS)]
    expected = {JOURNAL, "lock", *named_files(lines)}
    assert {path.name for path in folder.iterdir()} == expected
