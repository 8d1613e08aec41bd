"""Input that is wrong: which exit code, which one line, and that nothing is written.

The exit codes are those of compress.errors. A line names the rule, the value and what to do. Each case of the tables is
what is spoiled, the code, words of the line, and the options that differ from a command that works.
"""

import json
import shlex
import shutil
import types
from pathlib import Path

import psutil
import pytest

from cli_runner import invoke, untouched
from compress.errors import VerificationError
from tiny import POSITIONS, write_model, write_text

USAGE, UNSUPPORTED, UNAVAILABLE, FAILED = 2, 3, 4, 1
SLICE = shlex.split(
    "slice --model tiny --method slicegpt --ratio 0.25 --calib text.txt --samples 4 --seq-len 32 --device cpu --out out"
)
EVAL = shlex.split("eval --model tiny --ppl text.txt --seq-len 32 --limit 2 --device cpu")
BOTH = pytest.mark.parametrize("command", [SLICE, EVAL], ids=["slice", "eval"])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_model(home / "tiny", "opt")
    write_text(home / "text.txt", lines=60)
    return home


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    """A folder of the test's own with a copy of the model and the text, without network and without reloading."""
    monkeypatch.delenv("COMPRESS_DATA_DIR", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "no-cache")
    monkeypatch.setattr("compress.pipeline.verify", lambda *_arguments, **_options: 0.0)
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_with(words, *changes):
    """The words with other values of their options, or with more options; a flag is an option without a value."""
    changed, left = list(words), list(changes)
    while left:
        option = left.pop(0)
        value = [left.pop(0)] if left and not left[0].startswith("--") else []
        if option in changed:
            changed[changed.index(option) + 1] = value[0]
        else:
            changed += [option, *value]
    return changed


def refused(place, code, *words, command=SLICE, changes=()):
    """That the command ends with the code and one line that has the words, and that nothing is written."""
    with untouched(place):
        ran = invoke(*words_with(command, *changes))
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert len(ran.faults) == 1, ran.err
    *progress, last = ran.err.splitlines()
    assert last == f"error: {ran.faults[0]}"
    assert all(line.startswith(("preparing", "compressing", "loading", "measuring")) for line in progress), ran.err
    for word in words:
        assert word in ran.faults[0]


def refused_with(place, count, *words, command=SLICE, changes=()):
    """As many lines at once, which have the words between them."""
    with untouched(place):
        ran = invoke(*words_with(command, *changes))
    assert ran.code == USAGE
    assert len(ran.faults) == count
    for word in words:
        assert word in "\n".join(ran.faults)


def written(name, content):
    return lambda place: (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def removed(pattern):
    return lambda place: [file.unlink() for file in place.glob(pattern)]


def made(*names):
    return lambda place: [(place / name).mkdir() for name in names]


def edited(**changes):
    """config.json; None takes a key away."""

    def change(place):
        config = json.loads((place / "tiny/config.json").read_text()) | changes
        (place / "tiny/config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def last_file(change):
    return lambda place: change(sorted((place / "tiny").glob("*.safetensors"))[-1])


MODELS = {
    "no config": (made("empty"), USAGE, ["empty", "config.json", "Name the folder"], ["--model", "empty"]),
    "hub out of reach": (None, UNAVAILABLE, ["facebook/opt-125m", "not on this machine"], ["--model", "opt-125m"]),
    "config cut off": (written("tiny/config.json", '{"model_type": "op'), FAILED, ["config.json", "tiny"], []),
    "unknown to transformers": (edited(model_type="nosuch"), UNSUPPORTED, ["nosuch", "config.json"], []),
    "no tokenizer": (removed("tiny/tokenizer*"), FAILED, ["tiny has no tokenizer", "Copy"], []),
    "damaged tokenizer": (written("tiny/tokenizer.json", "{"), FAILED, ["tokenizer of tiny cannot be read"], []),
    "truncated weights": (
        last_file(lambda file: file.write_bytes(file.read_bytes()[:-100])),
        FAILED,
        ["model-000", "damaged", "again"],
        [],
    ),
    "another shape": (edited(ffn_dim=40), FAILED, ["model.decoder.layers.0.fc1.", "48", "40"], []),
}


# What `eval` finds by other code: it loads the model whole.
EVALUATED = ("config cut off", "no tokenizer", "truncated weights", "another shape")


@pytest.mark.parametrize(("case", "command"), [(case, SLICE) for case in MODELS] + [(case, EVAL) for case in EVALUATED])
def test_a_model(case, command, place):
    spoil, code, words, changes = MODELS[case]
    if spoil:
        spoil(place)
    refused(place, code, *words, command=command, changes=changes)


SLICED = {
    "an output that is there": (made("out"), USAGE, ["output out exists", "--out", "--overwrite"], []),
    "an unfinished run": (
        lambda place: (made("out.partial")(place), written("out.partial/run.json", "")(place)),
        USAGE,
        ["out.partial", "--resume", "--overwrite"],
        [],
    ),
    "a file as output": (written("out", "a file"), USAGE, ["out"], ["--overwrite"]),
    # --overwrite is for what this program wrote. A home folder named by mistake is not.
    "no output": (
        lambda place: (made("out")(place), written("out/thesis.tex", "years of work")(place)),
        USAGE,
        ["out", "compress.json"],
        ["--overwrite"],
    ),
    "the model as output": (written("tiny/compress.json", "{}"), USAGE, ["model"], ["--out", "./tiny/", "--overwrite"]),
    "too little text": (
        written("short.txt", "x" * 100),
        USAGE,
        ["'short.txt'", "holds 3 windows of 32 tokens", "--samples 3"],
        ["--calib", "short.txt"],
    ),
}


@pytest.mark.parametrize("case", SLICED)
def test_a_slice(case, place):
    spoil, code, words, changes = SLICED[case]
    if spoil:
        spoil(place)
    refused(place, code, *words, changes=changes)


TEXTS = {
    "missing": (None, USAGE, ["no/where.txt", "stdlib"], "no/where.txt"),
    "no text": (written("image.txt", b"\x89PNG\r\n\x1a\n\xff"), USAGE, ["image.txt", "UTF-8"], "image.txt"),
    "out of reach": (None, UNAVAILABLE, ["hub", "--data-dir", "text file"], "wikitext2"),
}


@pytest.mark.parametrize(("command", "option"), [(SLICE, "--calib"), (EVAL, "--ppl")], ids=["slice", "eval"])
def test_a_text(command, option, place):
    for spoil, code, words, name in TEXTS.values():
        if spoil:
            spoil(place)
        refused(place, code, *words, command=command, changes=(option, name))


OPTIONS = {
    "--data-dir nowhere": ["--data-dir", "'nowhere'"],
    "--seq-len 100": ["--seq-len 100", f"{POSITIONS} positions", f"--seq-len {POSITIONS}"],
    "--device cuda:99": ["--device", "cuda:99", "cpu"],
    "--dtype int8": ["'int8'", "float16"],
}


@BOTH
def test_an_option(command, place):
    for words, said in OPTIONS.items():
        refused(place, USAGE, *said, command=command, changes=words.split())


def test_not_enough_disk_or_memory(place, monkeypatch):
    """Said before anything is read: the walk would take hours to find out."""
    with monkeypatch.context() as patch:
        usage = types.SimpleNamespace(total=10**6, used=10**6, free=1000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        refused(place, FAILED, "GB of disk", str(place), "Free")
    memory = types.SimpleNamespace(total=1000, available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    refused(place, USAGE, "GB of memory", "--samples")


def test_a_checkpoint_that_does_not_reload_gets_no_name(place, monkeypatch):
    def fails(*_arguments, **_options):
        raise VerificationError("The written checkpoint reloads with other logits.")

    monkeypatch.setattr("compress.pipeline.verify", fails)
    ran = invoke(*SLICE)
    assert ran.code == FAILED
    assert ran.faults == ["The written checkpoint reloads with other logits."]
    assert not (place / "out").exists()
    assert (place / "out.partial" / "checkpoint" / "compress.json").is_file()


def test_all_faults_of_the_inputs_at_once(place):
    """An output that exists, too many tokens, no tokenizer, a file missing: four lines, each with its remedy."""
    made("out")(place)
    removed("tiny/tokenizer*")(place)
    last_file(Path.unlink)(place)
    words = ["--overwrite", "--seq-len 64", "Complete the download", "Copy"]
    refused_with(place, 4, *words, changes=("--seq-len", "100"))


def test_an_interrupted_eval_promises_no_resume(place, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.models.stored_loading.open_model", interrupted)
    with untouched(place):
        ran = invoke(*EVAL)
    assert ran.code == 130
    assert "interrupted" in ran.err
    assert "--resume" not in ran.err
