"""What lies in a written checkpoint beside the numbers, which test_exactness.py looks at."""

import hashlib
import json
import re
import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from cli_runner import succeeds
from compress.pipeline import identity
from compress.planning.prepare import Job, prepare
from tiny import HIDDEN, NUM_BLOCKS, write_model, write_text

INDEX = "model.safetensors.index.json"
COPIED = {
    "tokenizer.json": None,
    "tokenizer_config.json": None,
    "generation_config.json": None,
    "special_tokens_map.json": '{"bos_token": "<s>"}\n',
    "chat_template.jinja": "{% for message in messages %}{{ message }}{% endfor %}",
    "LICENSE.txt": "do what you want",
    "NOTICE": "notice",
}
LEFT = {
    "optimizer.pt": "x",
    "training_args.bin": "x",
    "README.md": "of the dense model",
    "evil.py": "x",
    "notes.txt": "x",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_model(home / "tiny", "opt")
    write_text(home / "text.txt", lines=60)
    for name, content in (COPIED | LEFT).items():
        if content is not None:
            (home / "tiny" / name).write_text(content)
    return home


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COMPRESS_DATA_DIR", raising=False)
        # The same everywhere: without a GPU, and without the seconds of a reload.
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setattr("compress.pipeline.verify", lambda *_arguments, **_options: 0.0)
        yield patch


OPTIONS = shlex.split("--method slicegpt --ratio 0.25 --samples 4 --seq-len 32 --device cpu")


@pytest.fixture(scope="module")
def written(home, patched):
    """The checkpoint of a model and a text named by relative paths."""
    patched.chdir(home)
    succeeds("slice", "--model", "tiny", "--calib", "text.txt", *OPTIONS, "--out", "outputs/sliced")
    return home / "outputs" / "sliced"


@pytest.fixture(scope="module")
def metadata(written) -> dict[str, Any]:
    return json.loads((written / "compress.json").read_text(encoding="utf-8"))


@pytest.fixture
def job(monkeypatch, patched):
    """What a command line asks for; nothing is run."""
    jobs: list[Job] = []
    monkeypatch.setattr("compress.cli.compressing.run_with_progress", jobs.append)

    def asked(*words: object) -> Job:
        succeeds(*words)
        return jobs[-1]

    return asked


def tensors_of(folder: Path) -> dict[str, tuple[str, int, int]]:
    """By name: the file, the parameters and the bytes."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # transformers refuses safetensors without it
            for name in opened.keys():  # noqa: SIM118 (no dict)
                tensor = opened.get_tensor(name)
                found[name] = (file.name, tensor.numel(), tensor.nbytes)
    return found


def size_of(folder: Path) -> dict[str, int]:
    tensors = tensors_of(folder).values()
    return {"parameters": sum(count for _, count, _ in tensors), "bytes": sum(size for _, _, size in tensors)}


def test_the_files(home, written):
    parts = {f"model-{part:05d}-of-{NUM_BLOCKS + 2:05d}.safetensors" for part in range(1, NUM_BLOCKS + 3)}
    carried = {"configuration_compress.py", "modeling_compress.py"}
    own = {INDEX, "config.json", "compress.json", "README.md", *carried}
    assert {path.name for path in written.iterdir()} == parts | own | set(COPIED)
    assert [path.name for path in written.parent.iterdir()] == [written.name]
    assert all((written / name).read_bytes() == (home / "tiny" / name).read_bytes() for name in COPIED)


def test_the_index_is_every_tensor_once(home, written, metadata):
    index = json.loads((written / INDEX).read_text())
    assert index["weight_map"] == {name: file for name, (file, _, _) in tensors_of(written).items()}
    size = size_of(written)
    assert index["metadata"] == {"total_parameters": size["parameters"], "total_size": size["bytes"]}
    assert metadata["size"] == size
    assert metadata["dense_size"] == size_of(home / "tiny")  # whose embeddings are tied: files hold them once


def test_compress_json_reports_every_point(written, metadata):
    names = ["embeddings", *(f"block {i} {branch}" for i in range(NUM_BLOCKS) for branch in ("attention", "mlp"))]
    assert [point["point"] for point in metadata["points"]] == names
    widths = [point["width"] for point in metadata["points"]]
    assert widths == [24] * (len(names) - 1) + [HIDDEN]
    assert widths == json.loads((written / "config.json").read_text())["slicing"]["stream_widths"]
    assert all(point["dense_width"] == HIDDEN and 0.5 < point["kept_energy"] <= 1 for point in metadata["points"])
    assert metadata["points"][-1]["kept_energy"] == 1


def test_compress_json_has_sums_fingerprints_and_versions(written, metadata):
    import torch
    import transformers

    from compress import __version__

    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written.glob("*.safetensors")}
    assert metadata["parts"] == sums
    assert set(metadata["fingerprints"]) == {"model", "calibration text"}
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in metadata["fingerprints"].values())
    said = {name: metadata["versions"][name] for name in ("compress", "torch", "transformers")}
    assert said == {"compress": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    assert metadata["base_model"] == "tiny"


@pytest.mark.parametrize(
    ("change", "fingerprint"),
    [("another text", "calibration text"), ("another model", "model"), ("another config", "model")],
)
def test_fingerprints_tell_inputs_apart(home, metadata, job, patched, tmp_path, change, fingerprint):
    shutil.copytree(home / "tiny", tmp_path / "tiny")
    shutil.copy(home / "text.txt", tmp_path / "text.txt")
    if change == "another text":
        write_text(tmp_path / "text.txt", lines=60, seed=1)
    elif change == "another model":
        write_model(tmp_path / "tiny", "opt", seed=1)
    else:
        config = json.loads((tmp_path / "tiny" / "config.json").read_text())
        (tmp_path / "tiny" / "config.json").write_text(json.dumps(config | {"bos_token_id": 2}))
    patched.chdir(tmp_path)
    run = identity(prepare(job("slice", "--model", "tiny", "--calib", "text.txt", *OPTIONS, "--out", "out")))
    assert [name for name, value in metadata["fingerprints"].items() if run[name] != value] == [fingerprint]


def test_no_path_of_this_machine_and_no_time(home, written):
    foreign = [str(home), str(Path.cwd()), str(Path.home()), str(Path(__file__).parents[2]), socket.gethostname()]
    for name in ("compress.json", "README.md", "config.json", INDEX):
        text = (written / name).read_text(encoding="utf-8")
        assert [word for word in foreign if len(word) > 5 and word in text] == [], name
        assert re.findall(r"[\s\"'`(](/(?:tmp|home|root|usr|var|opt)/\S*)", text) == [], name
        assert re.findall(r"\b20\d\d-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b", text) == [], name
        assert not {"time", "date", "created", "seconds"} & set(re.findall(r'"(\w+)":', text)), name


AMOUNT = ["--ratio", "0.25"]
SLICEGPT = ["--method", "slicegpt"]
EVERY_OPTION = [
    [*SLICEGPT, *AMOUNT, "--set", "rotate.final_orientation=random", "--seed", "7"],
    ["--target-size", "40kB", "--mlp-ratio", "0.25", "--no-refit"],
    ["--ratio", "0.1:0.3", "--rotation", "per-layer", "--measure-error"],
]


@pytest.mark.parametrize("options", EVERY_OPTION, ids=" ".join)
def test_the_command_of_any_options_asks_for_the_same(home, job, patched, options):
    patched.chdir(home)
    words = ["--model", "tiny", "--calib", "text.txt", "--samples", 4, "--seq-len", 32, *options]
    first = job("slice", *words, "--out", "out")
    again = job(*shlex.split(first.command)[1:], "--out", "out")
    assert again == first


@pytest.mark.parametrize("name", ['it\'s: a "#name"', "模型 & {{ jinja }}"])
def test_names_are_escaped_in_the_command(home, job, patched, tmp_path, name):
    shutil.copytree(home / "tiny", tmp_path / name)
    shutil.copy(home / "text.txt", tmp_path / f"{name}.txt")
    patched.chdir(tmp_path)
    asked = job("slice", "--model", f"./{name}", "--calib", f"./{name}.txt", *OPTIONS, "--out", "first/out")
    assert (asked.model.name, asked.model.repository) == (name, None)
    typed = shlex.split(asked.command)
    assert typed[typed.index("--model") + 1].removeprefix("./") == name
    assert typed[typed.index("--calib") + 1] == f"./{name}.txt"
