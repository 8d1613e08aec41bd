"""GGUF files as models: their weights are the originals', whatever the converter did to them; runs that start there."""

import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cli_runner import invoke, snapshot, succeeds
from compress.calibration.weights import LazyWeights
from compress.checkpoints.gguf.model import why_not_writable
from compress.errors import CheckpointError, CompressError, NumericalError, Unavailable, UnsupportedModel, UsageError
from compress.models import gguf_weights, hub
from compress.models.gguf_header import GEMMA_27B_BLOCKS, rope_of
from compress.models.gguf_weights import gguf_model
from compress.models.hub import find_model
from compress.models.loading import load_config, load_tokenizer
from compress.models.stored_loading import open_model
from compress.tuning.trained import open_folder
from gguf_folders import TEXTS, sentencepiece
from tiny import HIDDEN, VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer, write_text

gguf = pytest.importorskip("gguf")
from compress.checkpoints.gguf.container import Writer  # noqa: E402 (it needs the package)

PLAIN: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "num_hidden_layers": 2}
# By name: model_type, changes of its tiny config, and what its header says besides.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", PLAIN, {}),
    "llama, linear": (
        "llama",
        PLAIN | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
    ),
    "gemma2": (
        "gemma2",
        {},
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 3.0, "attention.sliding_window": 16},
    ),
    "phi3": (
        "phi3",
        {"sliding_window": 20},
        {"attention.sliding_window": 20, "rope.scaling.original_context_length": 4096},
    ),
}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}


def as_converted(model_type: str, name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """What llama.cpp's converter makes of a tensor (convert_hf_to_gguf.py, `permute` and `modify_tensors`)."""
    if model_type in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor + 1 if model_type.startswith("gemma") and name.endswith("norm.weight") else tensor


def write_tiny(
    file: Path,
    model: Any,
    kind: str = "F32",
    *,
    said: dict[str, Any] | None = None,
    words: "Callable[[Writer], None] | None" = None,
    **more: Any,
) -> Path:
    """A model as llama.cpp's converter writes it, its matrices in a type.

    said: in the header besides. words: adds a tokenizer. more: tensors beside the model's, or in their place.
    """
    config, model_type = model.config, model.config.model_type
    architecture = ARCHITECTURES.get(model_type, model_type)
    writer = Writer(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if (head := getattr(config, "head_dim", None)) is not None:
        writer.add_key_length(head)
        writer.add_value_length(head)
    writer.add_rope_freq_base(rope_of(config)["rope_theta"])  # a window's is not said by all converters
    writer.add_license("mit")
    for key, value in (said or {}).items():
        add = {str: writer.add_string, list: writer.add_array}.get(type(value), writer.add_float32)
        (writer.add_uint32 if isinstance(value, int) else add)(f"{architecture}.{key}", value)
    (words or add_tokenizer)(writer)
    for name, tensor in (tensors_of(model, architecture) | more).items():
        add_tensor(writer, name, tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tensors_of(model: Any, architecture: str) -> dict[str, torch.Tensor]:
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], model.config.num_hidden_layers)
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    found = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): as_converted(
            model.config.model_type, name, tensor, model.config
        )
        for name, tensor in state.items()
    }
    return found


def add_tokenizer(writer: Writer, cut: str = "gpt-2") -> None:
    tokenizer = tiny_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = len(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * special + [1] * (len(tokens) - special))
    writer.add_key_value("tokenizer.ggml.merges", [], gguf.GGUFValueType.ARRAY)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def add_pieces(writer: Writer) -> None:
    """As SentencePiece has them: scores and no merges."""
    tokenizer = sentencepiece()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)[:VOCAB_SIZE]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_types([2, 3, 3] + [6] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def add_tensor(writer: Writer, name: str, tensor: torch.Tensor, kind: str) -> None:
    """Vectors in float32, and so matrices whose rows do not divide into blocks, as llama.cpp's quantizer does."""
    number = gguf.GGMLQuantizationType[kind]
    fits = tensor.ndim > 1 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[number][0] == 0
    number = number if fits else gguf.GGMLQuantizationType.F32
    writer.add_tensor(name, gguf.quants.quantize(tensor.detach().float().numpy(), number), raw_dtype=number)


def opened(file: Path, dtype: torch.dtype = torch.float32) -> Any:
    return open_model(find_model(str(file)).whole_folder(), dtype=dtype, device=torch.device("cpu"))


def ids() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(1))


def without_rounding(model: Any) -> Any:
    """Gemma's norms as they are after one has been added to and taken from them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.config.model_type.startswith("gemma") and name.endswith("norm.weight"):
                parameter.copy_((parameter + 1) - 1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_its_original(tmp_path, name):
    model_type, changes, said = MODELS[name]
    model = without_rounding(tiny_model(model_type, dtype=torch.float32, **changes))
    file = write_tiny(tmp_path / "small.gguf", model, said=said)
    folder = find_model(str(file)).whole_folder()
    again = opened(file)
    with torch.inference_mode():
        assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)
    state, weights = model.state_dict(), LazyWeights(folder)
    wanted = [key for key in state if weights.resolve(key) is not None]
    assert len(state) - len(wanted) == int(model.config.tie_word_embeddings)
    for key, tensor in weights.read(wanted).items():
        assert torch.equal(tensor, state[key]), key
    config, before = load_config(folder), model.config
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "max_position_embeddings"):
        assert getattr(config, key) == getattr(before, key)
    assert config.architectures == [type(model).__name__.replace("Mistral", "Llama")]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)


def test_the_tokenizer_is_the_files(tmp_path):
    file = write_tiny(tmp_path / "small.gguf", tiny_model("llama", dtype=torch.float32, **PLAIN))
    folder = find_model(str(file)).whole_folder()
    tokenizer, direct, original = load_tokenizer(folder), gguf_weights.load_gguf_tokenizer(file), tiny_tokenizer()
    for text in ("a b  c", "It's 2024,\n\tno?", "</s>x", "\u00e9\u4e2d"):
        assert tokenizer(text)["input_ids"] == direct(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_pieces_are_merged_as_transformers_does(tmp_path, name):
    """Whatever class the folder's config stands for: the files made from a header say what is read from it."""
    model_type, changes, said = MODELS[name]
    model = tiny_model(model_type, dtype=torch.float32, **changes)
    file = write_tiny(tmp_path / "small.gguf", model, said=said, words=add_pieces)
    tokenizer = load_tokenizer(find_model(str(file)).whole_folder())
    direct = gguf_weights.load_gguf_tokenizer(file)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == direct(text)["input_ids"], text
    assert len(tokenizer("a b")["input_ids"]) >= 3


def test_digits_of_smollm_stand_alone(tmp_path):
    model = tiny_model("llama", dtype=torch.float32, **PLAIN)
    file = write_tiny(tmp_path / "small.gguf", model, words=partial(add_tokenizer, cut="smollm"))
    tokenizer = load_tokenizer(find_model(str(file)).whole_folder())
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 2024")
    assert [piece for piece, _ in cut] == ["in", "\u0120", "2", "0", "2", "4"]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_types_of_weights(tmp_path, kind, monkeypatch):
    """What is quantized is read in float32, as gguf dequantizes it, the rows of queries in their places; in pieces."""
    monkeypatch.setattr("compress.models.gguf_weights.CHUNK", 96)
    model = tiny_model("llama", dtype=torch.float32, **PLAIN | {"intermediate_size": 64})
    file = write_tiny(tmp_path / "small.gguf", model, kind)
    weights = LazyWeights(find_model(str(file)).whole_folder())
    number, state = gguf.GGMLQuantizationType[kind], model.state_dict()
    for key, tensor in weights.read([key for key in state]).items():
        expected = state[key]
        if expected.ndim > 1:
            expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(expected.numpy(), number), number))
            assert tensor.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
        assert torch.equal(tensor.float(), expected), key
    assert load_config(weights.folder).dtype == (torch.bfloat16 if kind == "BF16" else torch.float16)


def test_a_row_in_the_middle_tells_two_files_apart(tmp_path):
    models = [tiny_model("llama", dtype=torch.float32, seed=seed, **PLAIN) for seed in (0, 1)]
    files = [write_tiny(tmp_path / f"{number}.gguf", model, "Q8_0") for number, model in enumerate(models)]
    samples = [dict(LazyWeights(find_model(str(file)).whole_folder()).samples()) for file in files]
    assert samples[0].keys() == samples[1].keys() == models[0].state_dict().keys()
    assert all(samples[0][name] != samples[1][name] for name in samples[0])
    name = "model.layers.1.self_attn.q_proj.weight"
    row = LazyWeights(find_model(str(files[0])).whole_folder()).read([name])[name][HIDDEN // 2]
    assert samples[0][name] == row.numpy().tobytes()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two quantized models as GGUF files, the same dequantized as folders, and a text."""
    home = tmp_path_factory.mktemp("home")
    for name, kind in (("llama", "Q4_1"), ("qwen2", "Q8_0")):
        changes = {"num_hidden_layers": 2, "intermediate_size": 64} | (PLAIN if name == "llama" else {})
        file = write_tiny(home / f"{name}.{kind}.gguf", tiny_model(name, dtype=torch.float32, **changes), kind)
        shutil.copy(file, home / f"{name}.gguf")
        opened(file).save_pretrained(home / name)
        tiny_tokenizer().save_pretrained(home / name)
    write_text(home / "text.txt", lines=60)
    return home


@pytest.fixture
def place(home, unproved, monkeypatch):
    monkeypatch.chdir(home)
    return home


def test_names_of_files(place, tmp_path, monkeypatch):
    source = find_model("llama.Q4_1.gguf")
    assert (source.name, source.folder, source.repository) == ("llama.Q4_1", None, None)
    assert source.config_folder() == source.whole_folder() == source.whole_folder()
    shutil.copy("llama.gguf", tmp_path / "x.GGUF")
    (tmp_path / "one").mkdir()
    shutil.copy("llama.gguf", tmp_path / "one" / "only.gguf")
    monkeypatch.chdir(tmp_path)
    assert find_model("x.GGUF").gguf == Path("x.GGUF")
    (tmp_path / "linked.gguf").symlink_to(Path("x.GGUF").rename("blob").absolute())  # as in the hub's cache
    assert LazyWeights(find_model("linked.gguf").whole_folder()).stored.tensors
    Path("blob").rename("x.GGUF")
    assert find_model("one").name == "only"
    assert len(LazyWeights(find_model("x.GGUF").whole_folder()).stored.tensors) > 10
    shutil.copy("one/only.gguf", "one/second.gguf")
    with pytest.raises(UsageError, match=r"one has 2 GGUF files\. Name one, such as one/only\.gguf"):
        find_model("one")
    with pytest.raises(UsageError, match=r"There is no GGUF file 'none\.gguf'"):
        find_model("none.gguf")


def test_a_model_in_a_package(place, tmp_path, monkeypatch):
    monkeypatch.setitem(hub.PACKAGED, "smollm2-135m", "llm_tiny")
    with pytest.raises(Unavailable, match=r"package llm-tiny, .* pip install compress-llm\[smollm2\]$"):
        find_model("smollm2-135m")
    (tmp_path / "llm_tiny").mkdir()
    (tmp_path / "llm_tiny" / "__init__.py").write_text("raise SystemExit")
    shutil.copy("llama.gguf", tmp_path / "llm_tiny" / "Tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    source = find_model("SmolLM2-135M")
    assert source.name == "smollm2-135m"
    assert source.gguf == tmp_path / "llm_tiny" / "Tiny.gguf"


SHORT = ["--calib", "text.txt", "--samples", 8, "--seq-len", 32, "--dtype", "float16"]


@pytest.mark.slow
def test_a_run_is_that_of_the_folder(place, tmp_path):
    found, name, words = {}, "llama", ["quantize", "--bits", "4", "--group", "32"]
    for kind in (name, f"{name}.gguf"):
        succeeds(*words, "--model", kind, *SHORT, "--out", tmp_path / kind)
        found[kind] = {
            tensor: value
            for file in sorted((tmp_path / kind).rglob("*.safetensors"))
            for tensor, value in load_file(file).items()
        }
    assert found[name].keys() == found[f"{name}.gguf"].keys()
    for key, tensor in found[name].items():
        assert torch.equal(tensor, found[f"{name}.gguf"][key]), key
    facts = json.loads((tmp_path / f"{name}.gguf" / "compress.json").read_text())
    assert facts["base_model"] == name
    assert facts["origin"] == {"license": "mit"}
    written = {file.name for file in (tmp_path / f"{name}.gguf").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= written
    assert not any(file.endswith(".gguf") for file in written)
    text = "It's 2024"
    assert load_tokenizer(tmp_path / f"{name}.gguf")(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


def test_a_quantized_file_is_written_in_float16(place, tmp_path):
    dense = succeeds("slice", "--ratio", 0.25, "--model", "llama.gguf", *SHORT[:-2], "--dry-run", "--json").json[
        "dense"
    ]
    assert dense["bytes"] == 2 * dense["parameters"]
    file = write_tiny(tmp_path / "wide.gguf", tiny_model("llama", dtype=torch.float32, **PLAIN))
    assert load_config(find_model(str(file)).config_folder()).dtype == torch.float32


def test_the_folder_goes_with_the_process(place, tmp_path, monkeypatch):
    at_the_end: list[Callable[[], None]] = []
    monkeypatch.setattr(
        "atexit.register", lambda call, *words, **named: at_the_end.append(partial(call, *words, **named))
    )
    shutil.copy("llama.gguf", tmp_path / "model.with.dots.gguf")
    folder = find_model(str(tmp_path / "model.with.dots.gguf")).whole_folder()
    assert (folder.name, folder.is_dir()) == ("model.with.dots", True)
    (delete,) = at_the_end
    delete()
    assert not folder.parent.exists()


def test_without_the_package(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    ran = invoke("slice", "--ratio", 0.25, "--model", "llama.gguf", "--dry-run")
    assert (ran.code, ran.faults) == (2, ["Reading GGUF needs the package gguf: pip install compress-llm[gguf]"])


def test_a_file_that_changes_meanwhile(place, tmp_path):
    shutil.copy("llama.gguf", tmp_path / "x.gguf")
    weights = LazyWeights(find_model(str(tmp_path / "x.gguf")).whole_folder())
    shutil.copy("qwen2.gguf", tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"x\.gguf has changed during the run"):
        weights.read(["model.embed_tokens.weight"])


def test_a_nan_is_named(tmp_path):
    model = tiny_model("llama", dtype=torch.float32, **PLAIN)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    weights = LazyWeights(find_model(str(write_tiny(tmp_path / "x.gguf", model))).whole_folder())
    with pytest.raises(NumericalError, match=r"'model.layers.1.mlp.up_proj.weight' has a NaN or Inf\. .*x\.gguf"):
        weights.read(["model.layers.1.mlp.up_proj.weight"])


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert data.count(old) >= 1
        return data.replace(old, new, 1)

    return change


def number_after(name: bytes, code: str, value: float) -> Callable[[bytes], bytes]:
    """Another value of a field."""

    def change(data: bytes) -> bytes:
        place = data.index(name) + len(name) + 4
        return data[:place] + struct.pack(f"<{code}", value) + data[place + struct.calcsize(code) :]

    return change


def tensor_number(name: bytes, skip: int, code: str, value: int) -> Callable[[bytes], bytes]:
    """Another number in the entry of a tensor, whose name may also be a token's."""

    def change(data: bytes) -> bytes:
        place = data.rindex(struct.pack("<Q", len(name)) + name) + 8 + len(name) + skip
        return data[:place] + struct.pack(f"<{code}", value) + data[place + struct.calcsize(code) :]

    return change


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], type[CompressError], str]] = {
    "no GGUF": (replaced(b"GGUF", b"GGML"), CheckpointError, "does not begin with GGUF"),
    "half a header": (lambda data: data[:2000], CheckpointError, "its header claims"),
    "another architecture": (replaced(b"llama", b"llamb"), UnsupportedModel, "of the architecture 'llamb'"),
    "many blocks": (
        number_after(b"llama.block_count", "I", 2**30),
        CheckpointError,
        "it has 2 blocks and says 1073741824",
    ),
    "an unknown key": (replaced(b"context_length", b"context_lengts"), UnsupportedModel, "says context_lengts = 64"),
    "an unknown type": (tensor_number(b"output.weight", 20, "I", 77), UnsupportedModel, "in the type 77"),
    "far away": (tensor_number(b"output.weight", 24, "Q", 2**60), CheckpointError, "is cut short: 'output.weight'"),
    "a renamed tensor": (
        replaced(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"),
        CheckpointError,
        "lacks 'blk.1.attn_q",
    ),
    "another way to cut": (replaced(b"gpt-2", b"cut-9"), UnsupportedModel, "('cut-9') that transformers does not read"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files(place, tmp_path, kind):
    change, error, said = DAMAGES[kind]
    model = tiny_model("llama", dtype=torch.float32, **PLAIN)
    file = write_tiny(tmp_path / "bad.gguf", model)
    file.write_bytes(change(file.read_bytes()))
    before = snapshot(tmp_path)
    ran = invoke("slice", "--ratio", 0.25, "--model", file, *SHORT, "--out", tmp_path / "out")
    assert ran.code == error.exit_code
    (fault,) = ran.faults
    assert said in fault
    assert "bad.gguf" in fault
    assert snapshot(tmp_path) == before
    assert not list(Path(tempfile.gettempdir()).glob("compress-gguf-*/bad"))


BEYOND: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "yarn": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, r"scaled in a way .* \(yarn\)"),
    "other factors": ({}, {"rope_freqs.weight": torch.tensor([1.0, 1, 2, 3])}, r"\(rope_freqs.weight\)"),
    "experts": ({"expert_count": 8}, {}, "has experts"),
    "a window": ({"attention.sliding_window": 16}, {}, "says attention.sliding_window = 16"),
    "one of three": ({"split.count": 3}, {}, "is one of 3 parts"),
}


@pytest.mark.parametrize("kind", BEYOND)
def test_what_transformers_would_compute_otherwise(tmp_path, kind):
    said, more, message = BEYOND[kind]
    model = tiny_model("llama", dtype=torch.float32, **PLAIN)
    file = write_tiny(tmp_path / "x.gguf", model, said=said, **more)
    if "split.count" in said:
        file.write_bytes(
            file.read_bytes().replace(b"\x11\0\0\0\0\0\0\0llama.split.count", b"\x0b\0\0\0\0\0\0\0split.count")
        )
    with pytest.raises(UnsupportedModel, match=message):
        find_model(str(file)).whole_folder()


UNEVEN = {
    "another count": ({"feed_forward_length": [48, 20, 33]}, CheckpointError, "it has 2 blocks and 3 widths of MLPs"),
    "no width": ({"feed_forward_length": [48, 0]}, CheckpointError, "intermediate_size is 0"),
    "heads": ({"feed_forward_length": [48, 20], "attention.head_count_kv": [2, 4]}, UnsupportedModel, "more heads in"),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_widths_of_blocks_that_make_no_model(tmp_path, name):
    """In a file of the architecture deci; each width else is held against its tensors, as all shapes are."""
    said, error, message = UNEVEN[name]
    model = tiny_model("llama", dtype=torch.float32, **PLAIN)
    model.config.model_type = "deci"
    file = write_tiny(tmp_path / "x.gguf", model, said=said)
    with pytest.raises(error, match=message):
        gguf_model(file)


def test_a_plan_reads_no_weight(place, tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("compress.models.gguf_header.Header.read_rows", refuse)
    words = ["slice", "--ratio", 0.25, "--calib", "text.txt", "--dtype", "float16", "--dry-run", "--json"]
    plans = [succeeds(*words, "--model", kind).json for kind in ("llama.gguf", "llama")]
    assert plans[0]["size"] == plans[1]["size"]


@pytest.mark.slow
def test_a_file_is_the_teacher(place, tmp_path):
    succeeds("slice", "--ratio", 0.25, "--model", "llama.gguf", *SHORT, "--out", tmp_path / "small")
    words = ["--teacher", "llama.gguf", "--data", "text.txt", "--seq-len", 32, "--steps", 2, "--batch-size", 2]
    plan = succeeds("finetune", tmp_path / "small", *words, "--dry-run", "--json", "--out", tmp_path / "tuned")
    assert plan.json["teacher"] == "llama"
    folders = [Path("llama"), find_model("llama.gguf").whole_folder()]
    states = [open_folder(folder, torch.float32, torch.device("cpu")).state_dict() for folder in folders]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def test_the_largest_gemma_scales_its_queries_otherwise(tmp_path, monkeypatch):
    """Of 46 blocks; nothing in the header says it."""
    monkeypatch.setitem(GEMMA_27B_BLOCKS, "gemma2", 3)
    file = write_tiny(tmp_path / "x.gguf", tiny_model("gemma2", dtype=torch.float32), said=MODELS["gemma2"][2])
    scalar = HIDDEN // tiny_config("gemma2").num_attention_heads
    assert gguf_model(file).config.query_pre_attn_scalar == scalar
    assert why_not_writable(tiny_config("gemma2", query_pre_attn_scalar=scalar)) is None
    assert why_not_writable(tiny_config("gemma2")) == "its queries are scaled by another number than llama.cpp's"


def test_a_gemma3_without_windows_is_refused(tmp_path):
    file = write_tiny(tmp_path / "x.gguf", tiny_model("gemma3_text", dtype=torch.float32))
    with pytest.raises(UnsupportedModel, match="has no sliding window"):
        gguf_model(file)
