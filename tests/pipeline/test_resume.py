"""A run that is killed goes on and writes the bytes of a run that was not; `benchmarks/faults.py` kills by the hundred.

All runs rotate at random, slice the last point of the stream and run the dense model beside: what a resumed run draws
and all that it restores is tested too. Each has a folder of its own, in which everything it may write lies.
"""

import shlex
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli_runner import Disturbance, Ran, Request, flat, run_warm, same_files, snapshot
from tiny import NUM_BLOCKS, write_model, write_text

NUM_PARTS = NUM_BLOCKS + 2
OUT, PARTIAL = "out", "out.partial"
WORDS = (
    *shlex.split("slice --model ../tiny --calib ../text.txt --samples 4 --seq-len 32 --device cpu --out out --json"),
    *shlex.split(
        "--method slicegpt --ratio 0.25 --measure-error "
        "--set slice.slice_head=true --set rotate.final_orientation=random"
    ),
)
FOLDER = "compress.checkpoints.run_folder:"
RECORD, RUN_JSON, PUBLISH = f"{FOLDER}RunFolder.record", f"{FOLDER}RunFolder._save", f"{FOLDER}publish"
SAVING = "compress.io:save_file"


@dataclass(frozen=True)
class Place:
    """Where runs of a module happen: a model and a text, and beside them a folder for each run."""

    root: Path

    def folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        return folder

    def run(self, folder: Path, *more: str, words: Sequence[str] = WORDS, **request: object) -> Ran:
        return run_warm([Request((*words, *more), str(folder), **request)])[0]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    write_model(root / "tiny", "opt")
    write_text(root / "text.txt", lines=60)
    return Place(root)


@pytest.fixture(scope="module")
def undisturbed(place):
    """What a run that nothing disturbs leaves in its folder."""
    folder = place.folder("undisturbed")
    ran = place.run(folder)
    assert ran.code == 0, ran.err
    return snapshot(folder)


KILLS = {
    "part 3": Disturbance(RECORD, call=3, after=True),
    "half a part": Disturbance(SAVING, call=3, kind="tear"),
    "not yet named": Disturbance(PUBLISH),
    "named": Disturbance(PUBLISH, after=True),
}
FULL = {"a part": Disturbance(SAVING, 3, "full")}
SIGNALS = {
    "SIGTERM in a part": Disturbance(SAVING, 5, number=int(signal.SIGTERM)),
    "SIGTERM at verification": Disturbance("compress.pipeline:verify", number=int(signal.SIGTERM)),
}


@pytest.fixture(scope="module")
def disturbed(place) -> dict[str, tuple[Ran, Ran]]:
    """Every disturbed run and the run that resumes it; their folders bear the names. Side by side."""
    hits = {**KILLS, **{f"full: {what}": hit for what, hit in FULL.items()}, **SIGNALS}
    folders = {name: str(place.folder(name)) for name in hits}
    first = run_warm([Request(WORDS, folders[name], hit) for name, hit in hits.items()])
    for name in ("half a part", "part 3"):
        shutil.copytree(folders[name], f"{folders[name]}, kept")
    more = {name: ["--overwrite"] if (Path(folder) / OUT).exists() else [] for name, folder in folders.items()}
    second = run_warm([Request((*WORDS, "--resume", *more[name]), folder) for name, folder in folders.items()])
    return {name: (before, after) for name, before, after in zip(hits, first, second, strict=True)}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_goes_on_to_the_same_bytes(place, undisturbed, disturbed, moment):
    killed, resumed = disturbed[moment]
    assert killed.code == -signal.SIGKILL
    assert resumed.code == 0, resumed.err
    same_files(place.root / moment, undisturbed)
    done = {"part 3": 3, "half a part": 1, "named": 0}
    assert resumed.json["resumed_parts"] == done.get(moment, NUM_PARTS)


@pytest.mark.parametrize("what", FULL)
def test_a_disk_that_fills_is_told_in_a_line(place, undisturbed, disturbed, what):
    ran, resumed = disturbed[f"full: {what}"]
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert len(ran.faults) == 1
    assert "No space left on device" in ran.faults[0]
    assert resumed.code == 0, resumed.err
    same_files(place.root / f"full: {what}", undisturbed)


@pytest.mark.parametrize("moment", SIGNALS)
def test_interrupted(place, undisturbed, disturbed, moment):
    stopped, resumed = disturbed[moment]
    assert stopped.code == 130
    assert stopped.out == ""
    assert stopped.err.splitlines()[-1].startswith("interrupted: ")
    assert "--resume" in stopped.err.splitlines()[-1]
    assert "Traceback" not in stopped.err
    assert resumed.code == 0, resumed.err
    same_files(place.root / moment, undisturbed)


def test_before_anything_is_finished_nothing_is_kept(place):
    """And so nothing may be promised: --resume would start from the beginning."""
    folder = place.folder("begun")
    ran = place.run(folder, disturbance=Disturbance(SAVING, number=int(signal.SIGINT)))
    assert ran.code == 130
    assert snapshot(folder) == {}
    assert "--resume goes" not in ran.err


def test_a_file_that_grows_too_large_leaves_what_can_be_resumed(place):
    """A head at its full width is the largest file: with a limit just below it everything before it is written."""
    words = WORDS[: WORDS.index("--measure-error")]
    whole, folder = place.folder("not full"), place.folder("full")
    assert place.run(whole, words=words).code == 0
    expected = snapshot(whole)
    sizes = {name: len(content) for name, content in expected.items() if content and name.endswith(".safetensors")}
    *_, last = sorted(sizes)
    ran = place.run(folder, words=words, max_file_bytes=sizes[last] - 100)
    assert ran.code == 1
    for word in (Path(last).name, "Free space", "--resume"):
        assert word in ran.faults[0]
    assert list((folder / PARTIAL).rglob("*.unfinished")) == []
    assert place.run(folder, "--resume", words=words).json["resumed_parts"] == NUM_PARTS - 1
    same_files(folder, expected)


def test_nothing_to_resume(place, undisturbed):
    """It starts from the beginning and says so: jobs that are killed are started again with the same words."""
    folder = place.folder("nothing to resume")
    ran = place.run(folder, "--resume")
    assert ran.code == 0, ran.err
    assert "there is no unfinished run in out.partial. Starting from the beginning." in flat(ran.err)
    same_files(folder, undisturbed)


@pytest.mark.parametrize(("made", "said"), [(PARTIAL, "An unfinished run is in"), (OUT, "The output out exists")])
def test_what_another_run_makes_meanwhile_is_left_alone(place, made, said):
    """It was not there when the output was looked at first."""
    folder = place.folder(f"overtaken by {made}")
    hit = Disturbance(f"{FOLDER}locked", kind="act", action=("create", made))
    ran = place.run(folder, disturbance=hit)
    assert ran.code == 2
    assert said in ran.faults[0]
    assert list(folder.rglob("*")) == [folder / made]
