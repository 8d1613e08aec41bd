"""The folder of a run: what a kill, a damaged file, another run or a second process makes of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cli_runner import snapshot
from compress.checkpoints.output_folder import Output, backup_path, publish, take_lock
from compress.checkpoints.run_folder import RUN, Part, RunFolder, checksum, open_run, read_run
from compress.errors import UsageError
from compress.io import write_tensors
from compress.models.hub import ModelSource

IDENTITY = {"recipe": {"ratio": 0.25, "stages": ["rotate"]}, "model": "5ac1", "batch size": None, "processes": 2}
PARTS = ["part 0", "part 1", "part 2"]


def job(out: Path, **options: bool) -> Output:
    return Output(model=ModelSource("m", None), out=out, **options)


def finish_part(folder: RunFolder, number: int) -> None:
    """A part and a state with numbers of their own."""
    weights = write_tensors(folder.checkpoint / f"model-{number}.safetensors", {"w": torch.full((4,), float(number))})
    state = {"stream": torch.full((2, 3), float(number))}
    folder.record(Part(weights=weights, report={"name": f"part {number}"}), state)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def partial(out):
    """A folder with a finding and three parts; its run is over."""
    with open_run(job(out), IDENTITY) as folder:
        folder.note("survey", {"x": 1.5}, {"moment": torch.ones(2)})
        for number in range(3):
            finish_part(folder, number)
    return folder.partial


def resumed(out: Path, identity=IDENTITY) -> tuple[list[str], float | None]:
    """The names of the parts that count, and a number of the state after them."""
    with open_run(job(out, resume=True), identity) as folder:
        names = [part.report["name"] for part in folder.parts]
        if "survey" in folder.findings:
            assert torch.equal(folder.found_tensors("survey")["moment"], torch.ones(2))
            assert folder.findings["survey"].data == {"x": 1.5}
        return names, float(folder.state()["stream"][0, 0]) if names else None


def test_a_run_goes_on_from_its_last_part(out, partial):
    assert resumed(out) == (PARTS, 2.0)
    assert [path.name for path in partial.glob("state-*")] == ["state-00002-0.safetensors"]
    with open_run(job(out, resume=True), IDENTITY) as folder:
        finish_part(folder, 3)
    assert resumed(out) == ([*PARTS, "part 3"], 3.0)


def test_what_is_not_listed_is_deleted(out, partial):
    listed = snapshot(partial)
    for name in ("config.json", "activations-stream-x", "checkpoint/model-3.safetensors", "checkpoint/README.md"):
        (partial / name).write_text("left by a kill")
    (partial / "checkpoint" / "scratch-x").mkdir()
    assert resumed(out)[0] == PARTS
    assert snapshot(partial) == listed


@pytest.mark.parametrize(
    ("damaged", "how"), [("model-0", "gone"), ("state-00002-0", "flipped"), ("finding-survey", "flipped")]
)
def test_a_damaged_file_takes_the_parts_with_it(out, partial, damaged, how):
    """Only the last state is kept, so the walk starts over; a finding that is whole stays."""
    file = next(partial.rglob(f"{damaged}.safetensors"))
    content = file.read_bytes()
    file.unlink()
    if how == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with open_run(job(out, resume=True), IDENTITY) as folder:
        assert folder.parts == []
        assert list(folder.findings) == ([] if damaged == "finding-survey" else ["survey"])
        assert list(folder.checkpoint.iterdir()) == []


@pytest.mark.parametrize("kill", ["before", "after"])
def test_killed_while_a_part_is_recorded(out, partial, monkeypatch, kill):
    """Before run.json is replaced the part has not happened, after it the old state is litter."""

    class Killed(BaseException):
        pass

    save = RunFolder._save

    def killed(self):
        if kill == "after":
            save(self)
        raise Killed

    with open_run(job(out, resume=True), IDENTITY) as folder, monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_save", killed)
        with pytest.raises(Killed):
            finish_part(folder, 3)
    expected = (PARTS, 2.0) if kill == "before" else ([*PARTS, "part 3"], 3.0)
    assert len(list(partial.glob("state-*"))) == 2
    assert resumed(out) == expected
    assert len(list(partial.glob("state-*"))) == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"processes": 4}, "processes (2)"),
        ({"recipe": {"ratio": 0.5}, "model": "0000"}, "model, recipe"),
        ({"device": "cuda"}, "device"),
    ],
)
def test_another_run_is_refused_and_told_in_what_it_differs(out, partial, changes, named):
    before = snapshot(partial)
    with pytest.raises(UsageError) as error:
        resumed(out, IDENTITY | changes)
    assert str(error.value) == (
        f"--resume: the run in {partial} had another {named}. Give the same options, or start over with --overwrite."
    )
    assert snapshot(partial) == before
    take_lock(partial).close()  # although the error, and with it the frame, is still alive


def test_any_damage_to_run_json_is_refused(out, partial):
    file, refused = partial / RUN, r"no readable run\.json\. Start over with --overwrite"
    whole = file.read_bytes()
    cuts = [whole[:length] for length in range(0, len(whole) - 1, 40)]
    flips = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(0, len(whole) - 1, 7)]
    junk = [b"\xff", b"[]", b"{}", b'{"run": 7, "checksum": 7}', b"[" * 100_000, b"9" * 5000]
    for content in [*cuts, *flips, *junk]:
        file.write_bytes(content)
        assert read_run(partial) is None, content[:80]
    with pytest.raises(UsageError, match=refused):
        resumed(out)
    file.unlink()
    with pytest.raises(UsageError, match=refused):
        resumed(out)
    file.write_bytes(whole)
    assert resumed(out)[0] == PARTS


@pytest.mark.parametrize("name", ["../model-0.safetensors", "sub/model-0.safetensors", ""])
def test_only_files_of_its_own_folder_count(out, partial, name):
    """Even where the checksum of run.json is good."""
    data = json.loads((partial / RUN).read_text())["run"]
    (partial / "checkpoint" / "sub").mkdir()
    for place in (partial, partial / "checkpoint" / "sub"):
        shutil.copy(partial / "checkpoint" / "model-0.safetensors", place)
    data["parts"][0]["weights"]["file"] = name
    (partial / RUN).write_text(json.dumps({"run": data, "checksum": checksum(data)}))
    assert resumed(out) == ([], None)


def test_two_runs_cannot_share_a_folder(out, partial):
    with open_run(job(out, resume=True), IDENTITY) as folder:
        before = snapshot(partial)
        with (
            pytest.raises(UsageError, match=r"Another run is writing .*out\.partial"),
            open_run(job(out, overwrite=True), IDENTITY),
        ):
            pass
        assert snapshot(partial) == before
        finish_part(folder, 3)
    assert resumed(out)[1] == 3


def make(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("compress.json", "model.safetensors"):
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def new(out):
    """A checkpoint to be published."""
    return make(out.with_name("out.partial") / "checkpoint", "new")


def found(out: Path) -> dict[str, str]:
    """By folder what its files say."""
    folders = [*out.parent.iterdir(), *out.with_name("out.partial").glob("*")]
    return {path.name: (path / "compress.json").read_text() for path in folders if (path / "compress.json").is_file()}


def test_a_link_is_replaced_and_what_it_leads_to_is_not(out, new):
    elsewhere = make(out.with_name("elsewhere"), "old")
    out.symlink_to(elsewhere)
    publish(new, out, new.parent)
    assert not out.is_symlink()
    assert found(out) == {"elsewhere": "old", "out": "new"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_an_output_that_had_made_way_comes_back(out, options):
    """Killed between two renames, and the new one was then deleted by hand."""
    make(backup_path(out), "old")
    if "overwrite" in options:
        with open_run(job(out, **options), IDENTITY):
            assert found(out) == {"out": "old"}
    else:
        with pytest.raises(UsageError, match="exists"), open_run(job(out, **options), IDENTITY):
            pass
    assert found(out) == {"out": "old"}


def test_overwrite_starts_over(out, partial):
    with open_run(job(out, overwrite=True), IDENTITY) as folder:
        assert folder.run.is_empty
        assert sorted(path.name for path in partial.iterdir()) == ["checkpoint", "lock", RUN]
    assert not partial.exists()
