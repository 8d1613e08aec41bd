"""A run that is killed, at any moment, goes on and writes the bytes of a run that was not.

All runs rotate at random, slice the last point of the stream and run the dense model beside: what a resumed run draws
and all that it restores is tested too. Each has a folder of its own, in which everything it may write lies.
"""

import json
import shlex
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli_runner import Disturbance, Ran, Request, flat, run_warm, snapshot
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
RECORD = "compress.streaming.journal:Journal.record"


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
    files = snapshot(folder)
    assert {
        f"{OUT}/{name}" for name in ("compress.json", "README.md", "config.json", "model.safetensors.index.json")
    } < set(files)
    return files


def same_files(folder: Path, expected: dict[str, bytes | None]) -> None:
    found = snapshot(folder)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def kill_and_resume(place: Place, disturbances: dict[str, Disturbance], *more: str) -> dict[str, tuple[Ran, Ran]]:
    """Every disturbed run and the run that resumes it, side by side; their folders bear the names."""
    folders = {name: str(place.folder(name)) for name in disturbances}
    first = run_warm([Request((*WORDS, *more), folders[name], hit) for name, hit in disturbances.items()])
    second = run_warm([Request((*WORDS, *more, "--resume"), folder) for folder in folders.values()])
    return {name: (before, after) for name, before, after in zip(disturbances, first, second, strict=True)}


@pytest.fixture(scope="module")
def killed_after_parts(place):
    hits = {f"part-{part}": Disturbance(RECORD, call=part, after=True) for part in range(1, NUM_PARTS + 1)}
    return kill_and_resume(place, hits)


@pytest.mark.parametrize("part", range(1, NUM_PARTS + 1))
def test_killed_after_a_part(place, undisturbed, killed_after_parts, part):
    killed, resumed = killed_after_parts[f"part-{part}"]
    assert killed.code == -signal.SIGKILL
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed_parts"] == part
    same_files(place.root / f"part-{part}", undisturbed)


def test_a_resumed_run_repeats_no_finished_part(killed_after_parts):
    _, resumed = killed_after_parts["part-2"]
    first = next(said for phase, said in resumed.progress if phase == "compressing")
    assert first.startswith(f"2/{NUM_PARTS}, block 1, ")


WITHIN = {
    "half a part": Disturbance("compress.streaming.journal:save_file", call=3, kind="tear"),
    "half a state": Disturbance("compress.streaming.journal:save_file", call=4, kind="tear"),
    "half a line": Disturbance("compress.streaming.journal:write_line", call=3, kind="tear"),
    "a part without its line": Disturbance("compress.streaming.journal:write_line", call=3),
    "the last part without its line": Disturbance("compress.streaming.journal:write_line", call=NUM_PARTS + 1),
    "no config": Disturbance("compress.checkpoints.files:write_json", call=1),
    "an index": Disturbance("compress.checkpoints.files:write_json", call=2, after=True),
    "verifying": Disturbance("compress.pipeline:verify"),
    "not yet named": Disturbance("compress.pipeline:publish"),
}


@pytest.fixture(scope="module")
def killed_within(place):
    return kill_and_resume(place, WITHIN)


@pytest.mark.parametrize("moment", WITHIN)
def test_killed_within(place, undisturbed, killed_within, moment):
    killed, resumed = killed_within[moment]
    assert killed.code == -signal.SIGKILL
    assert resumed.code == 0, resumed.err
    same_files(place.root / moment, undisturbed)


def test_a_torn_part_lies_there_as_unfinished(place):
    folder = place.folder("torn")
    place.run(folder, disturbance=WITHIN["half a part"])
    assert [path.name for path in (folder / PARTIAL).glob("*.unfinished")] == [
        "model-00002-of-00005.safetensors.unfinished"
    ]
    assert not (folder / OUT).exists()


def test_with_the_cache_on_disk(place, undisturbed):
    """Where the activations lie is no part of what a run is: either may resume the other."""
    folder = place.folder("on disk")
    killed = place.run(folder, "--cache-memory", "1", disturbance=Disturbance(RECORD, call=3, after=True))
    assert killed.code == -signal.SIGKILL
    assert not (folder / "activations").exists()
    assert place.run(folder, "--resume").code == 0
    same_files(folder, undisturbed)


def test_really_reloaded_after_a_resume(place, undisturbed):
    folder = place.folder("reloaded")
    place.run(folder, disturbance=Disturbance(RECORD, call=3, after=True))
    resumed = place.run(folder, "--resume", verify=True)
    assert resumed.code == 0, resumed.err
    assert resumed.json["reload_difference"] < 1e-6
    assert resumed.json["seconds"]["verify"] > 0
    same_files(folder, undisturbed)


@pytest.fixture(scope="module")
def killed(place):
    """What a run that was killed after its third part leaves; for copying."""
    folder = place.folder("killed")
    assert place.run(folder, disturbance=Disturbance(RECORD, call=3, after=True)).code == -signal.SIGKILL
    return folder


@pytest.fixture
def unfinished(place, killed, request):
    """A folder with a run that was killed after its third part."""
    return shutil.copytree(killed, place.root / request.node.name.replace("/", "-"))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damaged", ["model-00001-of-00005", "model-00003-of-00005", "state-00002"])
def test_what_is_damaged_is_done_again(place, undisturbed, unfinished, damaged):
    flip_a_byte(unfinished / PARTIAL / f"{damaged}.safetensors")
    resumed = place.run(unfinished, "--resume")
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed_parts"] < 3
    same_files(unfinished, undisturbed)


def test_a_part_that_is_gone_is_done_again(place, undisturbed, unfinished):
    (unfinished / PARTIAL / "model-00002-of-00005.safetensors").unlink()
    assert place.run(unfinished, "--resume").code == 0
    same_files(unfinished, undisturbed)


def test_without_resume_it_is_refused(place, unfinished):
    before = snapshot(unfinished)
    ran = place.run(unfinished)
    assert ran.code == 2
    assert len(ran.faults) == 1
    for word in (PARTIAL, "--resume", "--overwrite"):
        assert word in ran.faults[0]
    assert snapshot(unfinished) == before


def test_overwrite_starts_over(place, undisturbed, unfinished):
    ran = place.run(unfinished, "--overwrite")
    assert ran.code == 0, ran.err
    assert ran.json["resumed_parts"] == 0
    same_files(unfinished, undisturbed)


def changed(option: str, value: str) -> tuple[str, ...]:
    words = list(WORDS)
    if option in words:
        words[words.index(option) + 1] = value
        return tuple(words)
    return (*words, option, value)


@pytest.fixture(scope="module")
def others(place):
    """Another text, and another model of the very same shape."""
    write_text(place.root / "other.txt", lines=60, seed=1)
    write_model(place.root / "another" / "tiny", "opt", seed=1)


@pytest.mark.parametrize(
    ("option", "value", "differing"),
    [
        ("--ratio", "0.5", "recipe"),
        ("--seed", "7", "recipe"),
        ("--samples", "3", "recipe"),
        ("--dtype", "float32", "dtype"),
        ("--batch-size", "2", "batch size"),
        ("--calib", "../other.txt", "calibration text"),
        ("--model", "../another/tiny", "model"),
    ],
)
def test_another_run_does_not_resume_it(place, unfinished, others, option, value, differing):
    before = snapshot(unfinished)
    ran = place.run(unfinished, "--resume", words=changed(option, value))
    assert ran.code == 2
    assert len(ran.faults) == 1
    for word in (PARTIAL, differing, "--overwrite"):
        assert word in ran.faults[0]
    assert snapshot(unfinished) == before


def test_the_same_text_under_another_name_does_not_resume_it(place, unfinished):
    """The recipe goes into the output, so its bytes would differ."""
    (place.root / "copy.txt").write_bytes((place.root / "text.txt").read_bytes())
    ran = place.run(unfinished, "--resume", words=changed("--calib", "../copy.txt"))
    assert ran.code == 2
    assert "recipe" in ran.faults[0]


def test_nothing_to_resume(place, undisturbed):
    """It starts from the beginning and says so: jobs that are killed are started again with the same words."""
    folder = place.folder("nothing to resume")
    ran = place.run(folder, "--resume")
    assert ran.code == 0, ran.err
    assert "there is no unfinished run in out.partial. Starting from the beginning." in flat(ran.err)
    same_files(folder, undisturbed)


# A disk that fills.


def test_a_full_disk_leaves_what_can_be_resumed(place):
    """A head at its full width is the largest file: with a limit just below it everything before it is written."""
    words = WORDS[: WORDS.index("--measure-error")]
    whole = place.folder("not full")
    assert place.run(whole, words=words).code == 0
    expected = snapshot(whole)
    sizes = {name: len(content) for name, content in expected.items() if content and name.endswith(".safetensors")}
    *before, last = sorted(sizes)
    assert max(sizes[name] for name in before) < sizes[last] - 200
    folder = place.folder("full")
    ran = place.run(folder, words=words, max_file_bytes=sizes[last] - 100)
    assert ran.code == 1
    assert len(ran.faults) == 1
    for word in (Path(last).name, "Free space", "--resume"):
        assert word in ran.faults[0]
    assert "Traceback" not in ran.err
    assert list((folder / PARTIAL).glob("*.unfinished")) == []
    assert not (folder / OUT).exists()
    resumed = place.run(folder, "--resume", words=words)
    assert resumed.json["resumed_parts"] == NUM_PARTS - 1
    same_files(folder, expected)


FULL = {
    "a part": ("compress.streaming.journal:save_file", 3),
    "a state": ("compress.streaming.journal:save_file", 4),
    "a line": ("compress.streaming.journal:write_line", 3),
    "config": ("compress.checkpoints.files:write_json", 1),
    "companions": ("compress.checkpoints.files:copy_companions", 1),
    "name": ("compress.pipeline:publish", 1),
}


@pytest.fixture(scope="module")
def filled(place):
    return kill_and_resume(
        place, {f"full {what}": Disturbance(target, call, "full") for what, (target, call) in FULL.items()}
    )


@pytest.mark.parametrize("what", FULL)
def test_a_disk_that_fills_at_any_file(place, undisturbed, filled, what):
    ran, resumed = filled[f"full {what}"]
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert len(ran.faults) == 1
    assert "No space left on device" in ran.faults[0]
    assert resumed.code == 0, resumed.err
    same_files(place.root / f"full {what}", undisturbed)


def test_a_disk_that_is_full_from_the_start(place):
    folder = place.folder("full at once")
    ran = place.run(folder, disturbance=Disturbance("compress.streaming.journal:write_line", kind="full"))
    assert ran.code == 1
    assert len(ran.faults) == 1
    assert snapshot(folder) == {}


# Interruptions.

SIGNALS = [signal.SIGINT, signal.SIGTERM]
MOMENTS = {
    "a part": Disturbance(RECORD, call=3, after=True),
    "the middle of a part": Disturbance("compress.streaming.journal:save_file", call=5),
    "verification": Disturbance("compress.pipeline:verify"),
}


@pytest.fixture(scope="module")
def interrupted(place):
    hits = {
        f"{number.name} at {moment}": Disturbance(hit.target, hit.call, "signal", int(number), hit.after)
        for number in SIGNALS
        for moment, hit in MOMENTS.items()
    }
    return kill_and_resume(place, hits)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", SIGNALS)
def test_interrupted(place, undisturbed, interrupted, number, moment):
    stopped, resumed = interrupted[f"{number.name} at {moment}"]
    assert stopped.code == 130
    assert stopped.out == ""
    assert stopped.err.splitlines()[-1].startswith("interrupted: ")
    assert "--resume" in stopped.err.splitlines()[-1]
    assert "Traceback" not in stopped.err
    assert resumed.code == 0, resumed.err
    same_files(place.root / f"{number.name} at {moment}", undisturbed)


def test_interrupted_before_anything_is_finished(place):
    """Nothing is kept, so nothing may be promised: --resume would start from the beginning."""
    folder = place.folder("interrupted at once")
    hit = Disturbance("compress.streaming.journal:save_file", number=int(signal.SIGINT))
    ran = place.run(folder, disturbance=hit)
    assert ran.code == 130
    assert snapshot(folder) == {}
    assert "--resume" not in ran.err


# Two runs, one output.


@pytest.fixture
def running(unfinished):
    """A folder whose unfinished run is going on: this process holds its lock."""
    from compress.streaming.journal import take_lock

    lock = take_lock(unfinished / PARTIAL)
    yield unfinished
    lock.close()


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_two_runs_on_one_output(place, running, option):
    before = snapshot(running)
    ran = place.run(running, option)
    assert ran.code == 2
    assert len(ran.faults) == 1
    assert "Another run" in ran.faults[0]
    assert snapshot(running) == before


def test_two_runs_that_start_at_once(place, monkeypatch):
    """Neither has found the other's folder when it looked; the second then must not delete it."""
    from cli_runner import invoke
    from compress import pipeline
    from compress.streaming.journal import Journal

    monkeypatch.chdir(place.folder("at once"))
    first = None
    prepare = pipeline.prepare

    def prepare_slowly(job, processes):
        nonlocal first
        prepared = prepare(job, processes)
        first = Journal.start(job.partial, {"recipe": "of the first"})
        return prepared

    monkeypatch.setattr(pipeline, "prepare", prepare_slowly)
    monkeypatch.setattr(pipeline, "verify", lambda *_arguments, **_options: 0.0)
    ran = invoke(*WORDS)
    assert first is not None
    first.close()
    assert ran.code == 2
    assert json.loads((first.folder / "journal.jsonl").read_text())["run"] == {"recipe": "of the first"}


# Replacing an output.


def test_killed_between_the_two_renames_of_a_replacement(place, undisturbed):
    """The old output has made way, the new one has not its name yet: a resume gives the name, and the old one goes."""
    folder = place.folder("replaced")
    assert place.run(folder, words=changed("--ratio", "0.5")).code == 0
    killed = place.run(folder, "--overwrite", disturbance=Disturbance("pathlib:Path.rename", call=2))
    assert killed.code == -signal.SIGKILL
    resumed = place.run(folder, "--resume")
    assert resumed.code == 0, flat(resumed.err)
    same_files(folder, undisturbed)


def test_an_interrupted_replacement_keeps_the_old_output(place):
    folder = place.folder("kept")
    words = changed("--ratio", "0.5")
    assert place.run(folder, words=words).code == 0
    old = snapshot(folder / OUT)
    place.run(folder, "--overwrite", disturbance=Disturbance(RECORD, call=3, after=True))
    assert snapshot(folder / OUT) == old
    assert (folder / PARTIAL).is_dir()


def test_resuming_a_replacement_takes_overwrite_again(place, undisturbed):
    folder = place.folder("replaced later")
    assert place.run(folder, words=changed("--ratio", "0.5")).code == 0
    place.run(folder, "--overwrite", disturbance=Disturbance(RECORD, call=3, after=True))
    refused = place.run(folder, "--resume")
    assert refused.code == 2
    assert "--overwrite" in refused.faults[0]
    resumed = place.run(folder, "--resume", "--overwrite")
    assert resumed.json["resumed_parts"] == 3
    same_files(folder, undisturbed)
