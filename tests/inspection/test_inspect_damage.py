"""Folders that are no whole checkpoint are told apart, each by a line that says what to do, and none by a traceback."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_inspect import change

from cli_runner import Ran, invoke, succeeds, untouched
from compress.checkpoints.run_folder import checksum
from tiny import NUM_BLOCKS

WRITTEN = ("packed", "thin")

PARTS = NUM_BLOCKS + 2
FIRST, SECOND = (f"model-{number:05d}-of-{PARTS:05d}.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def copy(root, tmp_path):
    return Path(shutil.copytree(root / "packed", tmp_path / "packed"))


def inspected(folder: Path, *options: object) -> Ran:
    """Nothing is written, whatever is found."""
    with untouched(folder.parent):
        return invoke("inspect", folder, *options)


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def cut(file: Path, share: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])


def set_header(file: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    """The header anew, of its old length where that is possible; the data as it was."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    how(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def set_checksum(folder: Path, name: str) -> None:
    """As somebody does who changes a file and the report on it."""
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(folder / "compress.json", lambda facts: facts["parts"].update({name: digest}))


def transpose_a_shape(file: Path) -> None:
    def how(header: dict[str, Any]) -> None:
        name = next(name for name in header if name.endswith("mlp.down_proj.weight_packed"))
        header[name]["shape"].reverse()

    set_header(file, how)
    set_checksum(file.parent, file.name)


def rename_a_tensor(folder: Path) -> None:
    set_header(folder / SECOND, lambda header: header.update(other=header.pop(sorted(header)[-1])))
    set_checksum(folder, SECOND)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing part": (lambda out: (out / SECOND).unlink(), f"{SECOND} is missing."),
    "a flipped byte": (lambda out: flip(out / SECOND, -5), f"{SECOND} has other bytes than were written"),
    "a truncated part": (lambda out: cut(out / FIRST, 0.6), f"{FIRST} is damaged"),
    "a shape that lies": (lambda out: transpose_a_shape(out / SECOND), "has the shape"),
    "a tensor by another name": (rename_a_tensor, f"{INDEX} says"),
    "an index that names another file": (
        lambda out: change(out / INDEX, lambda index: index["weight_map"].update(x="other.safetensors")),
        f"other.safetensors is in {INDEX} and not in compress.json",
    ),
    "an index that puts a tensor elsewhere": (
        lambda out: change(out / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": FIRST})),
        f"The tensor 'lm_head.weight' is in model-{PARTS:05d}-of-{PARTS:05d}.safetensors; {INDEX} says '{FIRST}'",
    ),
    "an index with a tensor too many": (
        lambda out: change(out / INDEX, lambda index: index["weight_map"].update(more=FIRST)),
        "The tensor 'more' is in no file",
    ),
    "no config": (lambda out: (out / "config.json").unlink(), "config.json is missing"),
    "compress.json with a path as a part": (
        lambda out: change(out / "compress.json", lambda facts: facts["parts"].update({"../../x": "0"})),
        "compress.json names '../../x', which is no part in this folder",
    ),
    "compress.json without its points": (
        lambda out: change(out / "compress.json", lambda facts: facts.pop("points")),
        "compress.json is damaged: 'points': field required",
    ),
    "another architecture": (
        lambda out: change(out / "config.json", lambda config: config.update(architectures=["OPTForCausalLM"])),
        "says ['OPTForCausalLM'], compress.json 'LlamaForCausalLM'",
    ),
    "no quantization": (
        lambda out: change(out / "config.json", lambda config: config.pop("quantization_config")),
        "has no quantization_config",
    ),
    "no weights of the adapter": (lambda out: (out / ADAPTER).unlink(), "adapter_model.safetensors is missing"),
    "another adapter's config": (
        lambda out: change(out / "adapter" / "adapter_config.json", lambda config: config.update(lora_alpha=99)),
        "is not the adapter's in compress.json",
    ),
    "measures that are none": (
        lambda out: (out / "quality.json").write_text('{"perplexity": 3}'),
        "quality.json is damaged: 'perplexity'",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_with_the_file(name, copy):
    damage, expected = DAMAGES[name]
    damage(copy)
    ran = inspected(copy)
    assert ran.code == 1
    assert any(expected in fault for fault in ran.faults), ran.faults
    assert ran.out == ""


def test_an_adapter_whose_checksum_is_recorded_is_verified_by_it(copy):
    set_checksum(copy, ADAPTER)
    assert "no checksum is recorded" not in succeeds("inspect", copy).out
    flip(copy / ADAPTER, -1)
    ran = inspected(copy)
    assert any("adapter_model.safetensors has other bytes" in fault for fault in ran.faults)


def test_carried_code_must_be_there(root, tmp_path):
    shutil.copytree(root / "thin", tmp_path / "thin")
    (tmp_path / "thin" / "modeling_compress.py").unlink()
    ran = inspected(tmp_path / "thin")
    assert ran.code == 1
    assert "names the module 'modeling_compress', which is not there" in ran.err


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "There is no folder"),
        (lambda path: path.write_text("x"), "is a file. Name the folder of a checkpoint."),
        (lambda path: path.mkdir(), "is no checkpoint: it has neither config.json nor compress.json"),
    ],
)
def test_what_is_no_checkpoint(make, expected, tmp_path):
    make(tmp_path / "it")
    ran = inspected(tmp_path / "it")
    assert ran.code == 2
    assert expected in ran.faults[0]
    assert len(ran.faults) == 1


def test_an_unfinished_run_says_how_it_goes_on(copy):
    partial = copy.with_name("packed.partial")
    shutil.copytree(copy, partial)
    (partial / "compress.json").unlink()
    parts = [{"weights": {"file": name, "bytes": 1, "sha256": "0"}, "report": {}} for name in (FIRST, SECOND)]
    write_run(partial, {"identity": {}, "parts": parts})
    shutil.rmtree(copy)
    for named in (partial, copy):
        ran = inspected(named)
        assert ran.code == 2
        assert f"is an unfinished run: 2 of {PARTS} parts are written." in ran.faults[0]
        assert f"The same command with --resume goes on from there and makes {copy}" in ran.faults[0]
    write_run(partial, {"identity": {}, "finished": True})
    ran = inspected(copy)
    assert ran.code == 2
    assert "is finished but for its name" in ran.faults[0]


def write_run(partial: Path, run: Any) -> None:
    (partial / "run.json").write_text(json.dumps({"run": run, "checksum": checksum(run)}))
