"""What docs/security.md promises. Where it can be tried it is tried; where code must not do a thing, it is read."""

import ast
import json
import os
import re
import shutil
import stat
import struct
from pathlib import Path

import pytest
import torch
from fuzzing import watch

import compress
from cli_runner import invoke, succeeds
from compress.checkpoints.files import check_code, companions, copy_companions
from compress.checkpoints.verify import verify
from compress.errors import CheckpointError, Unavailable, VerificationError
from compress.io import new_file_mode
from compress.models.loading import load_config, load_model, load_tokenizer
from compress.models.tensor_files import LARGEST_HEADER, open_tensors
from outputs import write_outputs
from tiny import write_model, write_text

SOURCE = Path(compress.__file__).parent
ROOT = SOURCE.parents[1]
DOCUMENT = ROOT / "docs" / "security.md"
SLICE = ["slice", "--method", "slicegpt", "--ratio", 0.25, "--samples", 4, "--seq-len", 32, "--device", "cpu"]
TEXT = ["--calib", "text.txt", "--out", "out"]
EVAL = ["eval", "--ppl", "text.txt", "--seq-len", 32, "--limit", 2, "--device", "cpu"]
HEARD = "print('evil code runs', flush=True); open('ran', 'w').close()\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_model(home / "tiny", "llama", dtype=torch.float32)
    write_outputs(home, "turned")
    return home


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    monkeypatch.delenv("COMPRESS_DATA_DIR", raising=False)
    monkeypatch.setattr("compress.pipeline.verify", lambda *_arguments, **_options: 0.0)
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def sources() -> list[Path]:
    return list(SOURCE.rglob("*.py"))


def called(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imported(tree: ast.AST) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.jit.load", "np.load"),
    *("numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "subprocess.getoutput"),
}


# Whose task it is to run a program, in a process of its own.
RUNNER = SOURCE / "evaluation" / "_programs.py"


def test_the_source_opens_no_pickle_and_runs_no_text():
    for file in sources():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert not {name.partition(".")[0] for name in imported(tree)} & FORBIDDEN_IMPORTS, file
        for name, call in called(tree):
            allowed = {"exec", "compile"} if file == RUNNER else set()
            assert name not in FORBIDDEN_CALLS - allowed, f"{file}:{call.lineno}: {name}"
            assert not any(keyword.arg == "shell" for keyword in call.keywords), f"{file}:{call.lineno}: shell="


def test_processes_are_started_from_lists_of_words():
    """The interpreter itself, a script of ours, and arguments behind it, none of which is read as an option."""
    found = []
    for file in sources():
        for name, call in called(ast.parse(file.read_text(encoding="utf-8"))):
            if name.startswith(("subprocess.run", "subprocess.Popen")):
                command = call.args[0]
                assert isinstance(command, ast.List | ast.Name), f"{file}:{call.lineno}"
                found.append(file.name)
    assert sorted(found) == ["_programs.py", "process.py"]


class Opened:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (exec, (HEARD,))


@pytest.mark.parametrize(
    ("where", "command"),
    [
        ("alone", [*SLICE, *TEXT]),
        ("in the index", EVAL),
        ("in the index", ["inspect", "tiny"]),
        ("beside", [*SLICE, *TEXT]),
    ],
)
def test_a_pickle_is_never_opened(where, command, place):
    folder = place / "tiny"
    torch.save({"x": Opened()}, folder / "pytorch_model.bin")
    for name in ("optimizer.pt", "training_args.bin", "tokenizer.pkl", "rng_state.pth"):
        shutil.copy(folder / "pytorch_model.bin", folder / name)
    if where == "alone":
        for file in folder.glob("*.safetensors*"):
            file.unlink()
    if where == "in the index":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        first = next(iter(index["weight_map"]))
        index["weight_map"][first] = "pytorch_model.bin"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hook = watch()
    hook.seen.clear()
    hook.allowed = ("/",)
    hook.is_on = True
    try:
        ran = invoke(*command, *([] if command[0] == "inspect" else ["--model", "tiny"]))
    finally:
        hook.is_on = False
    assert not (place / "ran").exists()
    assert not [event for event in hook.seen if event.startswith("pickle")]
    assert ran.code == (0 if where == "beside" else 1), ran.err


def test_a_data_set_that_is_a_script_is_not_run(tmp_path):
    from compress.datasets.texts import REPOSITORIES, ptb

    clone = tmp_path / REPOSITORIES["ptb"]
    clone.mkdir(parents=True)
    (clone / "ptb_text_only.py").write_text(f"import os; os.chdir({str(tmp_path)!r}); {HEARD}")
    with pytest.raises(Unavailable, match="scripts are no longer supported"):
        ptb("test", tmp_path)
    assert not (tmp_path / "ran").exists()


def bring_code(folder: Path) -> None:
    """As the hub's models do it: config, tokenizer and generation each name a class or a file of theirs."""
    for module in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{module}.py").write_text(HEARD)
    names = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit(folder / "config.json", auto_map=names)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.T", None]})
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(HEARD)


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_that_a_model_brings_is_not_run(model_type, place):
    """Neither for a class that transformers has anyway, nor for one that it has not."""
    bring_code(place / "tiny")
    edit(place / "tiny" / "config.json", model_type=model_type)
    for command in ([*SLICE, *TEXT, "--model", "tiny"], [*EVAL, "--model", "tiny"], ["inspect", "tiny"]):
        ran = invoke(*command)
        assert "evil code" not in ran.out
        assert ran.code == (0 if model_type == "llama" or command[0] == "inspect" else 3), ran.err
    assert not (place / "ran").exists()


def test_code_that_a_model_brings_is_run_on_the_flag(place):
    """That what the test above brings along would run at all."""
    bring_code(place / "tiny")
    edit(place / "tiny" / "config.json", model_type="evil")
    invoke(*EVAL, "--model", "tiny", "--trust-remote-code")
    assert (place / "ran").exists()


def test_what_is_written_names_no_code_of_the_inputs(place):
    """Its reader would be told to run it; the proof that the output reloads would be the first."""
    bring_code(place / "tiny")
    lord = ["lord", "--rank-frac", 0.5, "--materialize", "--samples", 4, "--seq-len", 32, "--device", "cpu"]
    succeeds(*lord, *TEXT, "--model", "tiny")
    assert "auto_map" not in json.loads((place / "out" / "config.json").read_text())
    assert not list((place / "out").glob("*.py"))


@pytest.mark.parametrize("command", ["slice", "lord", "slim", "run"])
def test_commands_that_write_have_no_such_flag(command):
    assert "--trust-remote-code" not in succeeds(command, "--help").out


def test_the_proof_runs_only_the_code_that_was_carried(home, tmp_path):
    folder = Path(shutil.copytree(home / "turned", tmp_path / "turned"))
    names = json.loads((folder / "config.json").read_text())["auto_map"]
    check_code(folder, names)
    module = next(file for file in folder.glob("modeling_*.py"))
    whole = module.read_text()
    module.write_text(HEARD + whole)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(VerificationError, match=rf"{module.name} is not the code that was carried"):
        verify(folder, ids, torch.zeros(1, 4, 8), memory=2**30)
    module.write_text(whole)
    for stray in ({"AutoConfig": "evil--code.C"}, {"AutoConfig": "../x.C"}, {"AutoConfig": "os.path"}):
        with pytest.raises(VerificationError, match="is not the code that was carried"):
            check_code(folder, stray)
    (folder / "sitecustomize.py").write_text(HEARD)
    with pytest.raises(VerificationError, match=r"sitecustomize\.py is not the code"):
        check_code(folder, names)


def test_a_chat_template_is_held_in_by_jinja(home, tmp_path):
    """It is copied, and never rendered here; who renders it does so in transformers' sandbox."""
    folder = Path(shutil.copytree(home / "tiny", tmp_path / "tiny"))
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    tokenizer = load_tokenizer(folder)
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_a_link_out_of_the_model_is_not_copied(place):
    """A license that is a link to a key would be published with the checkpoint."""
    (place / "secret").write_text("the key")
    (place / "tiny" / "LICENSE").symlink_to(place / "secret")
    ran = invoke(*SLICE, *TEXT, "--model", "tiny")
    assert ran.code == 1
    assert "LICENSE is a link to" in ran.err
    assert "outside of the model" in ran.err
    assert not (place / "out").exists()


def test_links_of_the_hubs_cache_and_within_the_folder_are_followed(home, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for number, file in enumerate(sorted((home / "tiny").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    (snapshot / "LICENSE").symlink_to("config.json")
    copy_companions(snapshot, tmp_path / "out")
    assert {"tokenizer.json", "LICENSE"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert load_config(snapshot).model_type == "llama"
    (tmp_path / "alias").symlink_to(home / "tiny")
    assert companions(tmp_path / "alias")
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("x")
    (snapshot / "NOTICE").symlink_to(Path("../../refs/main"))
    with pytest.raises(CheckpointError, match="outside of the model"):
        companions(snapshot)


@pytest.mark.parametrize("length", [2**64 - 1, LARGEST_HEADER + 1])
def test_a_header_that_claims_too_much_is_refused_before_it_is_read(length, tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", length))
        opened.truncate(2**28)  # so that it could be there
    with pytest.raises(CheckpointError, match="its header claims"):
        open_tensors(file)


@pytest.mark.parametrize("sizes", [{"hidden_size": 10**12}, {"num_hidden_layers": 10**9}])
def test_sizes_out_of_thin_air_take_no_memory(sizes, home, tmp_path):
    folder = Path(shutil.copytree(home / "tiny", tmp_path / "tiny"))
    edit(folder / "config.json", **sizes)
    (name,) = sizes
    with pytest.raises(CheckpointError, match=rf"makes no model: {name} is \d+"):
        load_config(folder)
    with pytest.raises(CheckpointError):
        load_model(folder, dtype=torch.float32, device=torch.device("cpu"))


NAMES = ["[red]x[/]", "\x1b[2J\x1b]0;title\x07\u202e"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are_and_reach_no_terminal(name, place):
    """Markup of rich, and what terminals act on, in the names of models, files and in what a checkpoint says."""
    folder = place / name.replace("/", "")
    (place / "turned").rename(folder)
    edit(folder / "compress.json", base_model=name, command=name)
    shown = invoke("inspect", folder, "--fast")
    assert shown.code == 0
    refused = [
        invoke("inspect", place / f"no{name}"),
        invoke(*EVAL, "--model", f"./{name}x"),
        invoke("run", f"{name}.yaml"),
    ]
    for ran in [shown, *refused]:
        text = ran.out + ran.err
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
        if name.isprintable():
            assert name in text.replace("\n", "")


def test_a_card_cannot_be_broken_by_what_a_checkpoint_says(place):
    """Beyond test_card.py: what reaches the card from a compress.json that somebody has changed."""
    nasty = "x`\n\n# heading\n<script>a</script>"
    edit(place / "turned" / "compress.json", versions={"compress": nasty}, not_for_vllm=nasty)
    assert invoke("inspect", "turned", "--fast", "--card").code == 0
    card = (place / "turned" / "README.md").read_text()
    assert "\n# heading" not in card
    assert "<script>" not in card
    edit(place / "turned" / "compress.json", architecture=nasty)
    assert invoke("inspect", "turned", "--fast", "--card").code == 1


def test_a_token_is_neither_shown_nor_stored(home, tmp_path, monkeypatch):
    """Neither by this process nor by that of the proof below it."""
    shutil.copytree(home / "tiny", tmp_path / "tiny")
    write_text(tmp_path / "text.txt", lines=60)
    monkeypatch.chdir(tmp_path)
    token = "hf_thisisatokenthatnobodyhas"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, token)
    ran = succeeds(*SLICE, *TEXT, "--model", "tiny", "--json")
    assert ran.json["seconds"]["verify"] > 0
    assert token not in ran.out + ran.err
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or token.encode() not in file.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_new_files_have_the_modes_that_the_user_asked_for(place):
    before = os.umask(0o077)
    try:
        succeeds(*SLICE, *TEXT, "--model", "tiny")
        assert new_file_mode() == 0o600
    finally:
        os.umask(before)
    for file in (place / "out").rglob("*"):
        assert not stat.S_IMODE(file.stat().st_mode) & 0o077, file


def test_every_promise_points_to_a_test_that_there_is():
    """`test_file.py::test_name` in docs/security.md: a row of its table of promises ends in one."""
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len([row for row in rows if "test_" in row]) == len(rows) - 1  # the head
    promised = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(promised) > 15
    files = {file.name: file for file in (ROOT / "tests").rglob("test_*.py")}
    for file, name in promised:
        tree = ast.parse(files[file].read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
