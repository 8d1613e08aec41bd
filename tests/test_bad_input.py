"""Input that is wrong: which exit code, which one line, and that nothing is written.

The exit codes are those of compress.errors. A line names the rule, the value and what to do.
"""

import errno
import json
import os
import shlex
import shutil
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_runner import Ran, invoke, snapshot, succeeds, untouched
from tiny import POSITIONS, tiny_tokenizer, write_model, write_text

USAGE, UNSUPPORTED, UNAVAILABLE, FAILED = 2, 3, 4, 1


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


SLICE = tuple(
    shlex.split(
        "slice --model tiny --method slicegpt --ratio 0.25 --calib text.txt --samples 4 --seq-len 32 "
        "--device cpu --out out"
    )
)
EVAL = tuple(shlex.split("eval --model tiny --ppl text.txt --seq-len 32 --limit 2 --device cpu"))


def words_with(words: tuple[str, ...], *changes: str) -> list[str]:
    """The words with other values of their options, or with more options; a flag is an option without a value."""
    changed = list(words)
    changes_left = list(changes)
    while changes_left:
        option = changes_left.pop(0)
        value = [changes_left.pop(0)] if changes_left and not is_option(changes_left[0]) else []
        if option in changed:
            changed[changed.index(option) + 1] = value[0]
        else:
            changed += [option, *value]
    return changed


def is_option(word: str) -> bool:
    return word.startswith("--")


def refused(place, code: int, *words: str, command: tuple[str, ...] = SLICE, changes: tuple[str, ...] = ()) -> Ran:
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
    return ran


def edit_config(folder, **changes) -> None:
    """None takes a key away."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# Models.


@pytest.mark.parametrize("command", [SLICE, EVAL], ids=["slice", "eval"])
class TestModels:
    def test_missing_folder(self, place, command):
        refused(place, USAGE, "'./nowhere'", "Check the path", command=command, changes=("--model", "./nowhere"))

    def test_folder_without_config(self, place, command):
        (place / "empty").mkdir()
        refused(place, USAGE, "empty", "config.json", "Name the folder", command=command, changes=("--model", "empty"))

    def test_a_file_is_no_folder(self, place, command):
        refused(place, USAGE, "'text.txt'", "folder", command=command, changes=("--model", "text.txt"))

    @pytest.mark.parametrize("content", ['{"model_type": "op', "", "[]", "null", "\x00\x01"])
    def test_config_that_is_no_json_object(self, place, command, content):
        """Damaged, not unsupported."""
        (place / "tiny" / "config.json").write_text(content)
        refused(place, FAILED, "config.json", "tiny", command=command)

    @pytest.mark.parametrize(
        ("key", "value", "named"),
        [
            ("num_attention_heads", 5, "num_heads"),
            ("hidden_size", "big", "hidden_size"),
            ("activation_function", "rellu", "rellu"),
        ],
    )
    def test_config_that_makes_no_model(self, place, command, key, value, named):
        edit_config(place / "tiny", **{key: value})
        refused(place, FAILED, "config.json", named, command=command)

    def test_a_model_type_that_transformers_does_not_know(self, place, command):
        edit_config(place / "tiny", model_type="nosuchmodel")
        refused(place, UNSUPPORTED, "nosuchmodel", "config.json", command=command)

    def test_no_tokenizer(self, place, command):
        for file in (place / "tiny").glob("tokenizer*"):
            file.unlink()
        refused(place, FAILED, "tiny has no tokenizer", "Copy", command=command)

    @pytest.mark.parametrize("content", ["{", "", "{}", '{"model": {"type": "nosuch"}}'])
    def test_damaged_tokenizer(self, place, command, content):
        (place / "tiny" / "tokenizer.json").write_text(content)
        refused(place, FAILED, "tokenizer of tiny cannot be read", command=command)

    def test_truncated_weights(self, place, command):
        file = sorted((place / "tiny").glob("*.safetensors"))[-1]
        file.write_bytes(file.read_bytes()[:-100])
        refused(place, FAILED, file.name, "damaged", "again", command=command)

    def test_a_file_of_the_index_is_missing(self, place, command):
        file = sorted((place / "tiny").glob("*.safetensors"))[-1]
        file.unlink()
        refused(place, FAILED, file.name, "Complete the download", command=command)

    @pytest.mark.parametrize("content", ["", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[]"])
    def test_an_index_that_is_none(self, place, command, content):
        (place / "tiny" / "model.safetensors.index.json").write_text(content)
        refused(place, FAILED, "model.safetensors.index.json", "weight_map", command=command)

    @pytest.mark.parametrize(
        "outside", ["../stray.safetensors", "/etc/passwd", "sub/a.safetensors", "pytorch_model.bin"]
    )
    def test_an_index_names_files_of_its_own_folder_only(self, place, command, outside):
        index = place / "tiny" / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        name = next(iter(content["weight_map"]))
        shutil.copy(place / "tiny" / content["weight_map"][name], place / "stray.safetensors")
        content["weight_map"][name] = outside
        index.write_text(json.dumps(content))
        refused(place, FAILED, repr(outside), "own folder", command=command)

    def test_weights_only_as_a_pickle(self, place, command):
        tensors = {}
        for file in [*(place / "tiny").glob("*.safetensors"), place / "tiny" / "model.safetensors.index.json"]:
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            file.unlink()
        torch.save(tensors, place / "tiny" / "pytorch_model.bin")
        refused(place, FAILED, "pytorch_model.bin", "pickle", "save_pretrained", command=command)

    def test_no_weights(self, place, command):
        for file in (place / "tiny").glob("*.safetensors*"):
            file.unlink()
        refused(place, FAILED, "tiny has no weights", command=command)

    def test_a_tensor_is_missing(self, place, command):
        """transformers alone would fill it at random and say so in a warning."""
        name = "model.decoder.layers.1.fc1.weight"
        without_tensor(place / "tiny", name)
        refused(place, FAILED, name, "tiny", command=command)

    def test_a_tensor_of_another_shape(self, place, command):
        edit_config(place / "tiny", ffn_dim=40)
        refused(place, FAILED, "model.decoder.layers.0.fc1.", "48", "40", command=command)

    def test_more_tokens_than_embeddings(self, place, command):
        """A tokenizer of another model: ids that the embeddings do not have."""
        shutil.rmtree(place / "tiny")
        write_model(place / "tiny", "opt", vocab_size=100)
        refused(place, FAILED, "tokenizer", "100", command=command)

    def test_the_hub_out_of_reach(self, place, command):
        refused(
            place,
            UNAVAILABLE,
            "facebook/opt-125m",
            "not on this machine",
            command=command,
            changes=("--model", "opt-125m"),
        )


def without_tensor(folder, name: str) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"].pop(name)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_family_that_is_not_known(place):
    edit_config(place / "tiny", model_type="bloom")
    refused(place, UNSUPPORTED, "'bloom'", "opt", "llama")


def test_a_family_that_no_rotation_passes(place):
    edit_config(place / "tiny", model_type="gemma2", hidden_size=32)
    refused(place, UNSUPPORTED, "gemma2", "cannot be sliced exactly", "post-norm")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"do_layer_norm_before": False}, "do_layer_norm_before"), ({"word_embed_proj_dim": 16}, "word_embed_proj_dim")],
)
def test_an_opt_that_no_rotation_passes(place, changes, reason):
    edit_config(place / "tiny", **changes)
    refused(place, UNSUPPORTED, "opt", reason)


def test_a_model_that_is_sliced_already(place):
    succeeds(*SLICE)
    refused(place, UNSUPPORTED, "compressed model already", changes=("--model", "out", "--out", "again"))


def test_a_quantised_model(place):
    name = "model.decoder.layers.1.fc1.weight"
    index = json.loads((place / "tiny" / "model.safetensors.index.json").read_text())
    file = place / "tiny" / index["weight_map"][name]
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, file, metadata={"format": "pt"})
    refused(place, UNSUPPORTED, name, "I8", "unquantized")


# How much.


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-1", "nan", "inf"])
def test_a_ratio_out_of_range(place, ratio):
    refused(place, USAGE, "--ratio", ratio, "above 0 and below 1", "0.25", changes=("--ratio", ratio))


@pytest.mark.parametrize("ratio", ["abc", "25%", "", " ", "0.1 0.2", "0.25,", ":", "0.1:", ",", "0.1;0.2"])
def test_a_ratio_that_is_no_number(place, ratio):
    refused(place, USAGE, "--ratio", "0.25", changes=("--ratio", ratio))


@pytest.mark.parametrize("ratio", ["0.1:0.2:0.3", "0.1:0.2,0.3"])
def test_a_range_of_more_than_two(place, ratio):
    refused(place, USAGE, "--ratio", changes=("--ratio", ratio))


@pytest.mark.parametrize("ratio", ["0.1,1.0,0.2", "0.1:1.5", "-0.1:0.2"])
def test_one_of_several_ratios_is_out_of_range(place, ratio):
    refused(place, USAGE, "--ratio", "at least 0 and below 1", changes=("--ratio", ratio))


@pytest.mark.parametrize(("ratio", "count"), [("0.1,0.2", "2"), ("0.1,0.2,0.3,0.4", "4")])
def test_a_list_of_another_length_than_the_model(place, ratio, count):
    refused(place, USAGE, f"{count} ratios", "3 blocks", "one for each block", changes=("--ratio", ratio))


@pytest.mark.parametrize("ratio", ["0.8", "0.1:0.8", "0.1,0.2,0.8"])
def test_a_ratio_that_leaves_less_than_a_multiple(place, ratio):
    refused(place, USAGE, "0.8", "less than 8 of 32", "--round-to", changes=("--ratio", ratio))


@pytest.mark.parametrize("ratio", ["0,0,0", "0:0"])
def test_a_ratio_that_deletes_nothing(place, ratio):
    refused(place, USAGE, "deletes nothing", "larger", changes=("--ratio", ratio))


def test_neither_ratio_nor_variance(place):
    command = tuple(word for word in SLICE if word not in {"--ratio", "0.25"})
    refused(place, USAGE, "--ratio 0.25", "--explained-variance", command=command)


def test_both_ratio_and_variance(place):
    refused(place, USAGE, "--ratio", "--explained-variance", changes=("--explained-variance", "0.9"))


@pytest.mark.parametrize("share", ["0", "-0.5", "1.01", "nan"])
def test_a_variance_out_of_range(place, share):
    command = tuple(word for word in SLICE if word not in {"--ratio", "0.25"})
    refused(place, USAGE, "--explained-variance", "0.99", command=command, changes=("--explained-variance", share))


# Texts.


def test_too_little_text(place):
    (place / "short.txt").write_text("x" * 100)
    refused(
        place, USAGE, "'short.txt'", "holds 3 windows of 32 tokens", "--samples 3", changes=("--calib", "short.txt")
    )


def test_too_little_text_for_one_window(place):
    (place / "short.txt").write_text("x" * 20)
    refused(place, USAGE, "'short.txt'", "--seq-len", "more text", changes=("--calib", "short.txt"))
    refused(place, USAGE, "'short.txt'", "--seq-len", command=EVAL, changes=("--ppl", "short.txt"))


@pytest.mark.parametrize(("command", "option"), [(SLICE, "--calib"), (EVAL, "--ppl")], ids=["slice", "eval"])
class TestTexts:
    @pytest.mark.parametrize("name", ["nowhere.txt", "no/where.txt", "folder/"])
    def test_a_text_that_is_missing(self, place, command, option, name):
        refused(place, USAGE, name, "stdlib", command=command, changes=(option, name))

    @pytest.mark.parametrize("content", ["", "  \n\n "])
    def test_an_empty_text(self, place, command, option, content):
        (place / "empty.txt").write_text(content)
        refused(place, USAGE, "'empty.txt' is empty", command=command, changes=(option, "empty.txt"))

    def test_a_text_that_is_no_text(self, place, command, option):
        (place / "image.txt").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
        refused(place, USAGE, "image.txt", "UTF-8", command=command, changes=(option, "image.txt"))

    def test_jsonl_without_text(self, place, command, option):
        (place / "rows.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
        refused(place, USAGE, "rows.jsonl", "line 2", "'text'", command=command, changes=(option, "rows.jsonl"))

    def test_an_unknown_data_set(self, place, command, option):
        refused(place, USAGE, "'wikitext'", "Did you mean 'wikitext2'?", command=command, changes=(option, "wikitext"))

    @pytest.mark.parametrize("name", ["wikitext2", "c4", "alpaca", "ptb"])
    def test_a_data_set_out_of_reach(self, place, command, option, name):
        refused(place, UNAVAILABLE, "hub", "--data-dir", "text file", command=command, changes=(option, name))

    def test_a_data_folder_that_is_missing(self, place, command, option):
        refused(place, USAGE, "--data-dir", "'nowhere'", command=command, changes=("--data-dir", "nowhere"))

    def test_more_tokens_than_positions(self, place, command, option):
        words = ("--seq-len 100", f"{POSITIONS} positions", f"--seq-len {POSITIONS}")
        refused(place, USAGE, *words, command=command, changes=("--seq-len", "100"))


def test_no_text_to_evaluate_on(place):
    refused(place, USAGE, "--ppl", "wikitext2", command=EVAL, changes=("--ppl", " , "))


# The machine.


@pytest.mark.parametrize("command", [SLICE, EVAL], ids=["slice", "eval"])
@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "", "cpu:x"])
def test_a_device_that_cannot_be_used(place, command, device):
    refused(place, USAGE, "--device", device, "cpu", command=command, changes=("--device", device))


@pytest.mark.parametrize("command", [SLICE, EVAL], ids=["slice", "eval"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu(place, command):
    refused(place, USAGE, "--device cuda", "--device cpu", command=command, changes=("--device", "cuda"))


@pytest.mark.parametrize("command", [SLICE, EVAL], ids=["slice", "eval"])
def test_an_unknown_dtype(place, command):
    refused(place, USAGE, "'int8'", "float16", command=command, changes=("--dtype", "int8"))


@pytest.mark.parametrize("size", ["much", "", "-1", "8PB", "1e9", "GB"])
def test_a_size_that_is_none(place, size):
    refused(place, USAGE, "--cache-memory", "8GB", changes=("--cache-memory", size))


def test_not_enough_disk(place, monkeypatch):
    """Said before anything is read: the walk would take hours to find out."""
    usage = types.SimpleNamespace(total=10**6, used=10**6, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(place, FAILED, "GB of disk", str(place), "Free")


def test_not_enough_memory(place, monkeypatch):
    import psutil

    memory = types.SimpleNamespace(total=1000, available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    refused(place, USAGE, "GB of memory", "--samples")


# Outputs.


def test_an_output_that_is_there(place):
    succeeds(*SLICE)
    refused(place, USAGE, "output out exists", "--out", "--overwrite")


def test_an_empty_folder_is_an_output_too(place):
    (place / "out").mkdir()
    refused(place, USAGE, "output out exists", "--overwrite")


def test_an_unfinished_run(place):
    (place / "out.partial").mkdir()
    (place / "out.partial" / "run.json").write_text("")
    refused(place, USAGE, "out.partial", "--resume", "--overwrite")


def test_an_unfinished_run_without_its_record(place):
    (place / "out.partial").mkdir()
    for file in ("lock", "model-00001-of-00005.safetensors"):
        (place / "out.partial" / file).write_bytes(b"")
    refused(place, USAGE, "out.partial", "no readable run.json", "--overwrite", changes=("--resume",))


def test_a_folder_that_is_no_output_is_not_overwritten(place):
    """--overwrite is for what this program wrote. A home folder named by mistake is not."""
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("years of work")
    refused(place, USAGE, "out", "compress.json", changes=("--overwrite",))


def test_a_file_is_not_overwritten(place):
    (place / "out").write_text("a file")
    refused(place, USAGE, "out", changes=("--overwrite",))


@pytest.mark.parametrize("out", ["tiny", "./tiny/", "../{place}"])
def test_the_model_is_not_overwritten(place, out):
    """Nor what it lies in: the input would be gone with the output that replaces it."""
    (place / "compress.json").write_text("{}")
    (place / "tiny" / "compress.json").write_text("{}")
    changes = ("--out", out.format(place=place.name), "--overwrite")
    refused(place, USAGE, "model", changes=changes)


@pytest.mark.parametrize("out", [".", "..", "/"])
@pytest.mark.parametrize("option", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_an_output_without_a_name_of_its_own(place, out, option):
    refused(place, USAGE, out, "--out", changes=("--out", out, *option))


def test_an_output_below_a_file(place):
    """text.txt/out cannot be made."""
    ran = invoke(*words_with(SLICE, "--out", "text.txt/out"))
    assert ran.code in (FAILED, USAGE)
    assert len(ran.faults) == 1
    assert "text.txt" in ran.faults[0]
    assert sorted(path.name for path in place.iterdir()) == ["text.txt", "tiny"]


def test_a_folder_that_may_not_be_written(place, monkeypatch):
    """Whatever keeps the folder from being made is one line too. (The superuser may write anywhere.)"""
    from pathlib import Path

    make = Path.mkdir

    def forbidden(self, *arguments, **options):
        if self.name == "out.partial":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", forbidden)
    refused(place, FAILED, "out.partial", "Permission denied")


# What is only found on the way.


def poison(folder, name: str, value: float) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_embeddings_leaves_nothing(place, value):
    poison(place / "tiny", "model.decoder.embed_tokens.weight", value)
    refused(place, FAILED, "embed_tokens.weight", "NaN or Inf", "get it again")


def test_a_failure_leaves_no_parent_folder_either(place):
    poison(place / "tiny", "model.decoder.embed_tokens.weight", float("nan"))
    refused(place, FAILED, "NaN or Inf", changes=("--out", "new/folder/out"))


def test_nan_in_a_late_block_keeps_what_was_finished(place):
    """Weights are read as the walk comes to them: the blocks before it are done by then, and need not be done again."""
    tensor = "model.decoder.layers.2.fc1.weight"
    whole = load_file(
        place / "tiny" / json.loads((place / "tiny/model.safetensors.index.json").read_text())["weight_map"][tensor]
    )
    poison(place / "tiny", tensor, float("nan"))
    before = snapshot(place)
    ran = invoke(*SLICE)
    assert ran.code == FAILED
    (fault,) = ran.faults
    assert tensor in fault
    assert "NaN or Inf" in fault
    after = snapshot(place)
    assert {name: after[name] for name in before} == before
    assert not (place / "out").exists()
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"out.partial"}
    parts = sorted(path.name for path in (place / "out.partial" / "checkpoint").glob("model-*"))
    assert parts == [f"model-0000{part}-of-00005.safetensors" for part in (1, 2, 3)]
    again = invoke(*SLICE, "--resume")
    assert again.code == FAILED
    assert again.faults == ran.faults
    assert torch.isfinite(whole[tensor]).all()


def test_numbers_too_large_for_the_dtype(place):
    name = "model.decoder.layers.1.fc2.weight"
    poison(place / "tiny", name, 1e6)
    ran = invoke(*words_with(SLICE, "--dtype", "float16"))
    assert ran.code == FAILED
    (fault,) = ran.faults
    for word in ("fc", "float16", "--dtype bfloat16"):
        assert word in fault
    assert not (place / "out").exists()


def test_nan_while_evaluating(place):
    poison(place / "tiny", "model.decoder.layers.2.fc1.weight", float("nan"))
    with untouched(place):
        ran = invoke(*EVAL)
    assert ran.code == FAILED
    (fault,) = ran.faults
    assert "text.txt" in fault
    assert ran.out == ""


def test_a_checkpoint_that_does_not_reload_gets_no_name(place, monkeypatch):
    from compress.errors import VerificationError

    def fails(*_arguments, **_options):
        raise VerificationError("The written checkpoint reloads with other logits.")

    monkeypatch.setattr("compress.pipeline.verify", fails)
    ran = invoke(*SLICE)
    assert ran.code == FAILED
    assert ran.faults == ["The written checkpoint reloads with other logits."]
    assert not (place / "out").exists()
    assert (place / "out.partial" / "checkpoint" / "compress.json").is_file()


# Several at once.


def test_all_faults_of_the_inputs_at_once(place):
    """An output that exists, too many tokens, no tokenizer, a file missing: four lines, each with its remedy."""
    (place / "out").mkdir()
    for file in (place / "tiny").glob("tokenizer*"):
        file.unlink()
    sorted((place / "tiny").glob("*.safetensors"))[-1].unlink()
    with untouched(place):
        ran = invoke(*words_with(SLICE, "--seq-len", "100"))
    assert ran.code == USAGE
    assert len(ran.faults) == 4
    for fault, word in zip(ran.faults, ["--overwrite", "--seq-len 64", "Complete the download", "Copy"], strict=True):
        assert word in fault


def test_a_recipe_that_does_not_fit_and_an_output_that_is_there(place):
    (place / "out").mkdir()
    with untouched(place):
        ran = invoke(*words_with(SLICE, "--ratio", "0.1,0.2", "--seq-len", "100"))
    assert ran.code == USAGE
    text = "\n".join(ran.faults)
    for word in ("one for each block", "--overwrite", "--seq-len 64"):
        assert word in text
    assert len(ran.faults) == 3


def test_all_faults_of_the_options_at_once(place):
    options = ("--ratio", "1.5", "--dtype", "int8", "--device", "gpu", "--cache-memory", "much", "--model", "opt-126m")
    with untouched(place):
        ran = invoke(*words_with(SLICE, *options, "--data-dir", "nowhere"))
    assert ran.code == USAGE
    text = "\n".join(ran.faults)
    for word in ("--ratio", "'int8'", "--device gpu", "--cache-memory", "opt-125m", "--data-dir"):
        assert word in text
    assert len(ran.faults) == 6


def test_every_text_that_is_missing_at_once(place):
    with untouched(place):
        ran = invoke(*words_with(EVAL, "--ppl", "a.txt,text.txt,b.txt", "--seq-len", "100"))
    assert ran.code == USAGE
    text = "\n".join(ran.faults)
    for word in ("'a.txt'", "'b.txt'", "--seq-len 64"):
        assert word in text


# Ctrl-C and bugs.


def test_an_interrupted_eval_promises_no_resume(place, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.models.opening.open_model", interrupted)
    with untouched(place):
        ran = invoke(*EVAL)
    assert ran.code == 130
    assert "interrupted" in ran.err
    assert "--resume" not in ran.err


def test_a_bug_shows_its_traceback(place, monkeypatch):
    """What no CompressError foresaw is not dressed up as one."""

    def broken(*_arguments, **_options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("compress.pipeline.prepare", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        invoke(*SLICE)


def test_tiny_tokenizer_has_an_id_for_every_embedding():
    """What the tests above take for granted."""
    assert len(tiny_tokenizer()) == 259
