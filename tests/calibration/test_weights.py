"""Weights read lazily from safetensors: every form a checkpoint comes in, and what is wrong with a broken one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import oracles
import tiny
from compress import families
from compress.calibration.weights import LazyWeights
from compress.errors import CheckpointError, NumericalError, UnsupportedModel
from compress.models.decoder import Decoder
from compress.models.tensor_files import INDEX, SINGLE, SafetensorsFolder
from compress.own_model.modeling_compress import unfuse_experts


def write(folder: Path, tensors: dict[str, Tensor], name: str = SINGLE) -> Path:
    save_file(tensors, folder / name)
    return folder / name


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(3, 4, generator=generator) for name in ("a", "b", "c")}


def test_a_file_that_is_another_one_by_now_is_told(tmp_path):
    """Whatever changed it, and even where every number is what it was."""
    file = write(tmp_path, tensors())
    weights = LazyWeights(tmp_path)
    weights.read(["a"])
    fresh = write(tmp_path, tensors(), "fresh.safetensors")
    fresh.replace(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed during the run\. .*--overwrite"):
        weights.read(["a"])


def expected_shapes(model: Any) -> dict[str, torch.Size]:
    return Decoder(
        model.config, families.find(model.config), dtype=torch.float32, device=torch.device("cpu")
    ).parameter_shapes()


def complaint(action: Any, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as error:
        action()
    return str(error.value)


@pytest.mark.parametrize("shard_size", ["10KB", "1GB"], ids=["shards", "one file"])
@pytest.mark.parametrize("model_type", ["opt", "qwen2", "mixtral"])
def test_every_parameter_is_read_as_it_was_saved(model_type, shard_size, tmp_path):
    model = tiny.tiny_model(model_type)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    unfuse_experts(model)
    assert (tmp_path / INDEX).exists() is (shard_size == "10KB")
    weights = LazyWeights(tmp_path)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights.check_against(expected_shapes(model), may_miss=tied)
    parameters = {name: p.data for name, p in model.named_parameters() if name not in tied}
    read = weights.read(parameters)
    assert read.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert read[name].dtype == torch.float64
        assert torch.equal(read[name], parameter)


@pytest.mark.parametrize("model_type", ["opt", "qwen2"])
def test_a_checkpoint_saved_from_the_base_model(model_type, tmp_path):
    """Its names lack the `model.` that the causal LM puts before them."""
    model: Any = tiny.tiny_model(model_type)
    model.model.save_pretrained(tmp_path, max_shard_size="10KB")
    weights = LazyWeights(tmp_path)
    assert not any(name.startswith("model.") for name in weights.stored.tensors)
    weights.check_against(expected_shapes(model), may_miss=["lm_head.weight"])
    for name, parameter in model.named_parameters():
        assert torch.equal(weights.read([name])[name], parameter)


def test_a_language_model_saved_under_the_name_of_its_part_of_a_whole(tmp_path):
    """As transformers saves Qwen3.5's text model again, loaded from images and text together."""
    model = tiny.tiny_model("qwen3_5_text", num_hidden_layers=2)
    parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    write(tmp_path, {name.replace("model.", "model.language_model.", 1): each for name, each in parameters.items()})
    for name, tensor in LazyWeights(tmp_path).read(parameters).items():
        assert torch.equal(tensor, parameters[name])


@pytest.mark.parametrize("factor", [1.0, 0.5], ids=["the same", "another"])
def test_a_tied_head_that_is_stored_is_the_one_that_is_read(factor, tmp_path):
    """Some checkpoints of tied models store the head too; where it is another, transformers unties it, and so do we."""
    tiny.tiny_model("qwen2").save_pretrained(tmp_path)
    stored = load_file(tmp_path / SINGLE)
    stored["lm_head.weight"] = factor * stored["model.embed_tokens.weight"]
    save_file(stored, tmp_path / SINGLE, metadata={"format": "pt"})
    windows = oracles.random_ids(2, 8)
    result = oracles.walked(tmp_path, oracles.fold_only(), windows)
    with oracles.exact_norms():
        dense = oracles.logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), windows)
    assert oracles.largest_difference(oracles.logits_of(oracles.sliced_model(result), windows), dense) < 1e-9


def test_missing_tensors_are_counted_and_named(tmp_path):
    write(tmp_path, tensors())
    shapes = {name: torch.Size([3, 4]) for name in "abcdefgh"}
    assert complaint(lambda: LazyWeights(tmp_path).check_against(shapes, may_miss=["h"])) == (
        f"The checkpoint {tmp_path} lacks 4 tensors of its model: d, e, f, ...."
    )
    assert complaint(lambda: LazyWeights(tmp_path).read(["a", "x"])) == f"The checkpoint {tmp_path} has no tensor 'x'."


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_a_quantized_checkpoint_is_refused(dtype, stored, tmp_path):
    write(tmp_path, tensors() | {"b": torch.ones(3, 4).to(dtype)})
    shapes = dict.fromkeys(tensors(), torch.Size([3, 4]))
    assert complaint(lambda: LazyWeights(tmp_path).check_against(shapes), UnsupportedModel) == (
        f"The tensor 'b' is stored as {stored}: a quantized checkpoint. "
        "Start from the unquantized model (F16, BF16, F32 or F64)."
    )


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(value, tmp_path):
    broken = tensors()
    broken["b"][2, 3] = value
    write(tmp_path, broken)
    weights = LazyWeights(tmp_path)
    assert weights.read(["a"]).keys() == {"a"}
    assert complaint(lambda: weights.read(["a", "b"]), NumericalError) == (
        f"The weight 'b' has a NaN or Inf. {tmp_path / SINGLE} is broken: get it again."
    )


@pytest.mark.parametrize("kept", [0, 100, 0.99])
def test_a_truncated_file_is_damaged(kept, tmp_path):
    file = write(tmp_path, {name: torch.ones(40, 40) for name in "abc"})
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    message = complaint(lambda: LazyWeights(tmp_path))
    assert message.startswith(f"{file} is damaged (")
    assert message.endswith("). Download or write it again.")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/tmp/x.safetensors", "below/x.safetensors", "..\\x.safetensors", "x.bin", ".."]
)
def test_an_index_names_files_of_its_own_folder_alone(name, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path, tensors(), "x.safetensors")
    write_index(folder, {"a": name})
    assert complaint(lambda: LazyWeights(folder)) == (
        f"{folder / INDEX} names {name!r}; an index may only name .safetensors files of its own folder."
    )


@pytest.mark.parametrize(
    "text", ["no json", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', b'{"weight_map": {"a": "\xff"}}']
)
def test_an_index_that_is_none(text, tmp_path):
    (tmp_path / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert complaint(lambda: LazyWeights(tmp_path)) == (
        f"{tmp_path / INDEX} is no safetensors index (a JSON object with a weight_map)."
    )


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, tensors(), "model-00001-of-00002.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "d": "model-00002-of-00002.safetensors"})
    assert complaint(lambda: LazyWeights(tmp_path)) == (
        f"{tmp_path / INDEX} names model-00002-of-00002.safetensors, which is not there. Complete the download."
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_a_pickle_is_never_opened(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    assert complaint(lambda: LazyWeights(tmp_path)) == (
        f"{tmp_path} holds weights only as a pickle ({name}), which can run code when it is opened. "
        "Convert it to safetensors: load it with transformers where you trust it, then save_pretrained()."
    )


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_reading_leaves_no_file_mapped(tmp_path):
    file = write(tmp_path, {name: torch.ones(300, 300) for name in "ab"})
    weights = LazyWeights(tmp_path)
    assert str(file) not in mapped_files()
    read = weights.read(["a", "b"])
    assert str(file) not in mapped_files()
    assert read["a"].sum() == 90000
    # The list would have shown it.
    kept_open = torch.from_file(str(file), size=100, dtype=torch.uint8)
    assert str(file) in mapped_files()
    del kept_open


# What else reads safetensors: headers alone, and linears that are stored quantized.


def test_tensors_of_another_file_have_the_names_that_they_are_given(tmp_path):
    write(tmp_path, tensors())
    other = write(tmp_path, {"x": torch.full((2,), 7)}, "other.safetensors")
    folder = SafetensorsFolder(tmp_path)
    folder.add(other, {"x": "a.x"})
    assert folder.find("model.a.x") == "a.x"
    assert dict(folder.read({"codes": "a.x", "b": "b"}))["codes"].tolist() == [7, 7]
    assert complaint(lambda: folder.add(other, {"x": "b"})) == (
        f"The tensor 'b' is in both {SINGLE} and other.safetensors."
    )
