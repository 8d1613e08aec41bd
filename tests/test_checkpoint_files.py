"""What lies in a written checkpoint beside the numbers, which test_exactness.py looks at."""

import hashlib
import json
import re
import shlex
import shutil
import socket
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from cli_runner import invoke, snapshot, succeeds
from compress.recipe import parse_recipe
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
def facts(written):
    return json.loads((written / "compress.json").read_text(encoding="utf-8"))


def tensors_of(folder: Path) -> dict[str, tuple[str, int, int]]:
    """By name: the file, the parameters and the bytes."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no dict)
                tensor = opened.get_tensor(name)
                found[name] = (file.name, tensor.numel(), tensor.nbytes)
    return found


def test_the_files(written):
    parts = {f"model-{part:05d}-of-{NUM_BLOCKS + 2:05d}.safetensors" for part in range(1, NUM_BLOCKS + 3)}
    carried = {"configuration_compress.py", "modeling_compress.py"}
    own = {INDEX, "config.json", "compress.json", "README.md", *carried}
    assert {path.name for path in written.iterdir()} == parts | own | set(COPIED)
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_companions_are_copied_byte_for_byte(home, written):
    assert {name: (written / name).read_bytes() for name in COPIED} == {
        name: (home / "tiny" / name).read_bytes() for name in COPIED
    }


def test_a_companion_that_is_a_link_is_copied_as_a_file(home, patched, tmp_path):
    """As in the hub's cache, whose snapshots are links."""
    linked, blobs = tmp_path / "models--a--b/snapshots/linked", tmp_path / "models--a--b/blobs"
    linked.mkdir(parents=True)
    shutil.copytree(home / "tiny", blobs)
    for file in blobs.iterdir():
        (linked / file.name).symlink_to(file)
    patched.chdir(tmp_path)
    succeeds("slice", "--model", linked, "--calib", home / "text.txt", *OPTIONS, "--out", "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (home / "tiny" / "tokenizer.json").read_bytes()


# The index.


def test_the_index_is_every_tensor_once(written):
    index = json.loads((written / INDEX).read_text())
    tensors = tensors_of(written)
    assert index["weight_map"] == {name: file for name, (file, _, _) in tensors.items()}
    assert index["metadata"]["total_parameters"] == sum(count for _, count, _ in tensors.values())
    assert index["metadata"]["total_size"] == sum(size for _, _, size in tensors.values())


def test_the_files_say_that_they_are_of_torch(written):
    """transformers refuses safetensors without it."""
    for file in written.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


# compress.json.


def test_compress_json_says_what_is_stored(written, facts):
    tensors = tensors_of(written).values()
    assert facts["size"] == {
        "parameters": sum(count for _, count, _ in tensors),
        "bytes": sum(size for _, _, size in tensors),
    }
    index = json.loads((written / INDEX).read_text())["metadata"]
    assert facts["size"] == {"parameters": index["total_parameters"], "bytes": index["total_size"]}


def test_the_dense_size_counts_a_tied_head_once(home, facts):
    """The dense model has tied embeddings; its files hold them once."""
    tensors = tensors_of(home / "tiny").values()
    assert facts["dense_size"] == {
        "parameters": sum(count for _, count, _ in tensors),
        "bytes": sum(size for _, _, size in tensors),
    }


def test_compress_json_has_the_recipe(facts):
    recipe = parse_recipe(facts["recipe"])
    assert recipe.model_dump(mode="json") == facts["recipe"]
    assert recipe.calibration.model_dump() == {"source": "text.txt", "samples": 4, "seq_len": 32}
    assert recipe.stages[-1].model_dump()["ratio"] == 0.25


def test_compress_json_reports_every_point(written, facts):
    names = ["embeddings", *(f"block {i} {branch}" for i in range(NUM_BLOCKS) for branch in ("attention", "mlp"))]
    assert [point["point"] for point in facts["points"]] == names
    widths = [point["width"] for point in facts["points"]]
    assert widths == [24] * (len(names) - 1) + [HIDDEN]
    assert widths == json.loads((written / "config.json").read_text())["slicing"]["stream_widths"]
    assert all(point["dense_width"] == HIDDEN and 0.5 < point["kept_energy"] <= 1 for point in facts["points"])
    assert facts["points"][-1]["kept_energy"] == 1


def test_compress_json_has_the_sum_of_every_part(written, facts):
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written.glob("*.safetensors")}
    assert facts["parts"] == sums


def test_compress_json_has_fingerprints_and_versions(facts):
    import torch
    import transformers

    from compress import __version__

    assert set(facts["fingerprints"]) == {"model", "calibration text"}
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in facts["fingerprints"].values())
    assert facts["versions"]["compress"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["transformers"] == transformers.__version__
    assert facts["base_model"] == "tiny"


@pytest.mark.parametrize(
    ("change", "fingerprint"),
    [("another text", "calibration text"), ("another model", "model"), ("another config", "model")],
)
def test_fingerprints_tell_inputs_apart(home, facts, patched, tmp_path, change, fingerprint):
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
    succeeds("slice", "--model", "tiny", "--calib", "text.txt", *OPTIONS, "--out", "out")
    other = json.loads((tmp_path / "out" / "compress.json").read_text())["fingerprints"]
    assert [name for name in other if other[name] != facts["fingerprints"][name]] == [fingerprint]


# Nothing of this machine, nothing of this moment.


def texts_of(folder: Path) -> dict[str, str]:
    written = ("compress.json", "README.md", "config.json", INDEX)
    return {name: (folder / name).read_text(encoding="utf-8") for name in written}


def test_no_path_of_this_machine(home, written):
    foreign = [str(home), str(Path.cwd()), str(Path.home()), str(Path(__file__).parents[1]), socket.gethostname()]
    for name, text in texts_of(written).items():
        assert [word for word in foreign if len(word) > 5 and word in text] == [], name
        assert re.findall(r"[\s\"'`(](/(?:tmp|home|root|usr|var|opt)/\S*)", text) == [], name


def test_no_time(written):
    for name, text in texts_of(written).items():
        assert re.findall(r"\b20\d\d-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b", text) == [], name
        assert not {"time", "date", "created", "seconds"} & set(re.findall(r'"(\w+)":', text)), name


def test_a_typed_path_stays_as_it_was_typed(home, patched, tmp_path):
    """Here the text by an absolute path. Of the model's folder only its name is kept, which the result is called by."""
    patched.chdir(tmp_path)
    succeeds("slice", "--model", home / "tiny", "--calib", home / "text.txt", *OPTIONS, "--out", "out")
    facts = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert facts["recipe"]["calibration"]["source"] == str(home / "text.txt")
    assert facts["base_model"] == "tiny"
    assert str(home / "tiny") not in (tmp_path / "out" / "compress.json").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "compress.json").read_text()


def test_where_input_and_output_lie_changes_nothing(home, written, patched, tmp_path):
    for name in ("tiny", "text.txt"):
        (shutil.copytree if name == "tiny" else shutil.copy)(home / name, tmp_path / name)
    patched.chdir(tmp_path)
    succeeds("slice", "--model", "./tiny/", "--calib", "text.txt", *OPTIONS, "--out", "elsewhere/other-name")
    assert snapshot(tmp_path / "elsewhere" / "other-name") == snapshot(written)


# The model card.


def front_matter(folder: Path) -> dict:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_has_front_matter(written):
    assert front_matter(written) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["compress", "slicegpt"],
    }


def test_the_card_is_one_that_the_hub_reads(written):
    from huggingface_hub import ModelCard

    card = ModelCard.load(written / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers"


def test_the_card_has_the_numbers(written, facts):
    card = (written / "README.md").read_text()
    for part in ("size", "dense_size"):
        assert f"{facts[part]['parameters']:,}" in card
        assert f"{facts[part]['bytes']:,}" in card
    assert "4 sequences of 32 tokens of\n`text.txt`" in card


def test_the_card_does_not_call_growth_removal(home, written, facts, patched):
    """So small a model grows by its shortcuts. A negative share is no share that was removed."""
    assert facts["size"]["parameters"] > facts["dense_size"]["parameters"]
    card = (written / "README.md").read_text()
    assert re.findall(r"-\d+\.\d% removed", card) == []
    assert "% added" in card


def test_the_command_of_the_card_makes_it_again(home, written, facts, patched, tmp_path):
    """Typed where the model's folder and the text are, with an output to write to."""
    card = (written / "README.md").read_text()
    assert f"```\n{facts['command']}\n```" in card
    for name in ("tiny", "text.txt"):
        (tmp_path / name).symlink_to(home / name)
    patched.chdir(tmp_path)
    program, *words = shlex.split(facts["command"])
    assert program == "compress"
    succeeds(*words, "--out", "again/sliced")
    assert snapshot(tmp_path / "again" / "sliced") == snapshot(written)


RARE = {
    "final_orientation": ["--set", "rotate.final_orientation=random", "--seed", "7"],
    "rule": ["--explained-variance", "0.9", "--set", "slice.slice_head=true", "--round-to", "4"],
    "signal": ["--set", "rotate.signal=normed", "--dtype", "bfloat16", "--batch-size", "2"],
    "blocks": ["--ratio", "0.25,0.5,0.25"],
    "line": ["--ratio", "0.1:0.3", "--round-to", "1"],
}
ANCHORED = {
    "ratio": ["--ratio", "0.25"],
    "budget": ["--keep-params", "0.6", "--set", "budget.trial_samples=8", "--samples", "8"],
    "size": ["--target-size", "40kB", "--mlp-ratio", "0.25"],
    "no refit": ["--ratio", "0.25", "--no-refit", "--mlp-ratio", "0.5", "--set", "rotate_shared.gradient_weight=0"],
    "per layer": ["--ratio", "0.1:0.3", "--rotation", "per-layer", "--measure-error"],
}


@pytest.mark.parametrize(
    "options",
    [["--method", "slicegpt", *words] for words in RARE.values()] + list(ANCHORED.values()),
    ids=[*RARE, *ANCHORED],
)
def test_the_command_of_any_options_makes_it_again(home, patched, tmp_path, options):
    for name in ("tiny", "text.txt"):
        (tmp_path / name).symlink_to(home / name)
    patched.chdir(tmp_path)
    amounts = {"--ratio", "--explained-variance", "--keep-params", "--target-size"}
    amount = [] if amounts & set(options) else ["--ratio", "0.25"]
    words = ["--model", "tiny", "--calib", "text.txt", "--samples", 4, "--seq-len", 32, *amount, *options]
    succeeds("slice", *words, "--out", "first/out")
    command = json.loads((tmp_path / "first" / "out" / "compress.json").read_text())["command"]
    succeeds(*shlex.split(command)[1:], "--out", "again/out")
    assert snapshot(tmp_path / "first") == snapshot(tmp_path / "again")


NAMES = [
    'quo"ted',
    "it's: a #name",
    "- [list]",
    "trailing\\",
    "grüße",
    "模型",
    "\U0001f999",
    "a & b",
    "{{ jinja }}",
    "no",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_escaped(home, patched, tmp_path, name):
    shutil.copytree(home / "tiny", tmp_path / name)
    shutil.copy(home / "text.txt", tmp_path / f"{name}.txt")
    patched.chdir(tmp_path)
    words = ["slice", "--model", f"./{name}", "--calib", f"./{name}.txt", *OPTIONS]
    succeeds(*words, "--out", "first/out")
    written = tmp_path / "first" / "out"
    assert "base_model" not in front_matter(written)  # a folder's name is no id of the hub
    facts = json.loads((written / "compress.json").read_text(encoding="utf-8"))
    assert facts["base_model"] == name
    typed = shlex.split(facts["command"])
    assert typed[typed.index("--model") + 1].removeprefix("./") == name
    assert typed[typed.index("--calib") + 1] == f"./{name}.txt"


def test_a_failed_command_prints_its_model_as_typed(patched, tmp_path):
    patched.chdir(tmp_path)
    ran = invoke("slice", "--model", "./[bold]x[/bold]", "--ratio", "0.25")
    assert ran.code == 2
    assert "'./[bold]x[/bold]'" in ran.faults[0]


def test_a_tokenizer_that_cuts_otherwise_fails_the_run(home, patched, tmp_path):
    """As it would if the class that transformers chooses for the written config read the same files in its own way."""
    from compress.checkpoints import verify

    def load(folder):
        tokenizer = verify_loading(folder)
        return (
            tokenizer if "partial" not in folder.name else lambda text: {"input_ids": tokenizer(text)["input_ids"][1:]}
        )

    verify_loading = verify.load_tokenizer
    patched.setattr(verify, "load_tokenizer", load)
    patched.chdir(tmp_path)
    words = ["--model", home / "tiny", "--calib", home / "text.txt", *OPTIONS, "--out", "out"]
    ran = invoke("slice", *words)
    assert ran.code == 1
    assert "gives other tokens than that of" in ran.faults[0]
    assert not (tmp_path / "out").exists()
