"""GGUF files: what is in them, that they read back as the folder they were written from, and what is refused."""

import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from compress.calibration.weights import LazyWeights
from compress.checkpoints.gguf import check_exportable, reader_notes, verify_gguf, write_gguf
from compress.checkpoints.verify import verify_tokens
from compress.errors import CheckpointError, UnsupportedModel, UsageError, VerificationError
from compress.models.gguf_header import WRITTEN
from compress.models.gguf_weights import load_gguf_tokenizer
from compress.models.hub import find_model
from compress.models.loading import load_tokenizer
from gguf_folders import PLAIN, ROOM, TEXTS, TOKENIZERS, byte_level, sentencepiece, write_folder, write_tokenizer
from runs import proved_here
from tiny import HIDDEN, NUM_BLOCKS, POSITIONS, VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer

gguf = pytest.importorskip("gguf")

# As a slice leaves it: heads that together are wider than the stream, a head of its own, few key-value heads.
SLICED: dict[str, Any] = {
    **PLAIN,
    "head_dim": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 41,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sliced": ("llama", SLICED),
    "tied": ("llama", {**PLAIN, "tie_word_embeddings": True}),
    # By the very name mistral of its folder transformers takes a file for another class, and fails.
    "mistral": ("mistral", {"sliding_window": POSITIONS, "head_dim": 12}),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path, Any]:
    """A sliced llama, its GGUF file and the model, to look at: the folder small-llama."""
    folder = tmp_path_factory.mktemp("gguf") / "small-llama"
    model = write_folder(folder, **SLICED)
    return folder, written(folder), model


def written(folder: Path, **options: Any) -> Path:
    """The folder's GGUF file, alone in a folder, so that nothing else is read with it."""
    file = folder.parent / f"{folder.name}-gguf" / "model.gguf"
    file.parent.mkdir(exist_ok=True)
    write_gguf(folder, file, **options)
    return file


def reread(file: Path, **options: Any) -> Any:
    options = {"dtype": torch.float32} | options
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options).eval()


def reread_tokenizer(file: Path) -> Any:
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def read_fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def read_tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def ids() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids()).logits


@pytest.mark.parametrize(("model_type", "options"), MODELS.values(), ids=MODELS)
def test_it_reads_back_bit_by_bit(tmp_path, model_type, options):
    model = write_folder(tmp_path / model_type, model_type, **options)
    file = written(tmp_path / model_type)
    read = reread(file)
    theirs, ours = read.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert torch.equal(logits(read), logits(model))
    assert read.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype_and_norms_are_float32(tmp_path, dtype):
    model = write_folder(tmp_path / "m", dtype=dtype, **SLICED)
    file = written(tmp_path / "m")
    name = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F32"}[dtype]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read_tensors(file).values()}
    assert {
        kinds.pop(f"blk.{number}.{norm}.weight") for number in range(NUM_BLOCKS) for norm in ("attn_norm", "ffn_norm")
    } == {"F32"}
    assert kinds.pop("output_norm.weight") == "F32"
    assert set(kinds.values()) == {name}
    expected = {"F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "F32": "ALL_F32"}[name]
    assert read_fields(file)["general.file_type"] == gguf.LlamaFileType[expected]
    assert torch.equal(logits(reread(file)), logits(model.float()))


def test_what_the_file_says_of_the_model(tmp_path):
    write_folder(tmp_path / "m", **SLICED, rms_norm_eps=1e-4)
    fields = read_fields(written(tmp_path / "m", name="Small"))
    assert {name: value for name, value in fields.items() if name.startswith(("general.", "llama."))} == {
        "general.architecture": "llama",
        "general.name": "Small",
        "general.type": "model",
        "general.file_type": 0,
        "llama.vocab_size": VOCAB_SIZE,
        "llama.context_length": POSITIONS,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": NUM_BLOCKS,
        "llama.feed_forward_length": 41,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 12,
        "llama.attention.value_length": 12,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-4),
        "llama.rope.dimension_count": 12,
        "llama.rope.freq_base": 1e4,
    }


def test_zero_biases_are_none(tmp_path):
    model = tiny_model("llama", dtype=torch.float32, **(SLICED | {"attention_bias": True}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    file = written(tmp_path / "m")
    assert not [name for name in read_tensors(file) if name.endswith(".bias")]
    assert torch.equal(logits(reread(file)), logits(model))
    assert reader_notes(file) == []


NO_BIASES = "transformers' reader of GGUF leaves out the biases; llama.cpp reads them."
NO_SCALING = "transformers' reader of GGUF leaves out the rotary scaling {}; llama.cpp reads it."
WIDE = (
    "llama.cpp from before April 2026 does not load the file, "
    "because its query biases have another width than the model."
)
LEFT_OUT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "linear": (SLICED | {"rope_parameters": LINEAR}, [NO_SCALING.format("'linear'")]),
    "all": (
        SLICED | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
        [NO_BIASES, NO_SCALING.format("'llama3'"), WIDE],
    ),
}


@pytest.mark.parametrize(("options", "notes"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_transformers_leaves_out_is_written_and_said(tmp_path, options, notes):
    """Read with the folder's config it is all there; read without, it is not."""
    model = write_folder(tmp_path / "m", **options)
    file = written(tmp_path / "m")
    assert reader_notes(file) == notes
    assert not torch.allclose(logits(reread(file)), logits(model))
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(reread(file, config=config)), logits(model))


@pytest.mark.parametrize(("build", "kind", "cut"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_tokenizer_reads_back(tmp_path, build, kind, cut):
    write_tokenizer(tmp_path / "m", build(), vocab_size=ROOM)
    file = written(tmp_path / "m")
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "m"), reread_tokenizer(file)
    own = load_tokenizer(find_model(str(file)).whole_folder())
    for text in TEXTS:
        assert theirs.encode(text) == own.encode(text) == ours.encode(text), text
        assert theirs.decode(theirs.encode(text)) == ours.decode(ours.encode(text)), text
    for name in ("bos", "eos", "pad"):
        if getattr(ours, f"{name}_token") is not None:
            assert getattr(theirs, f"{name}_token_id") == getattr(ours, f"{name}_token_id")
    fields = read_fields(file)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == (kind, cut)


def test_gemmas_pieces_begin_without_a_space(tmp_path):
    tokenizer = sentencepiece("gemma")
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<start_of_turn>", special=True)])
    changes = {"vocab_size": ROOM, "bos_token_id": 2, "pad_token_id": 0}
    write_folder(tmp_path / "m", "gemma3_text", tokenizer=tokenizer, num_hidden_layers=1, **changes)
    file = written(tmp_path / "m")
    assert read_fields(file)["tokenizer.ggml.add_space_prefix"] is False
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "m"), load_gguf_tokenizer(file)
    assert ours.tokenize("the test") == ["the", "\u2581test"]
    for text in [*TEXTS, "<start_of_turn>the\n\ntest"]:
        assert theirs.encode(text) == ours.encode(text), text
    verify_tokens(tmp_path / "m", file)


def test_the_vocabulary_has_a_token_for_every_embedding(tmp_path):
    tokenizer = byte_level(size=400, added=(AddedToken("<tool>", special=False), AddedToken("<|turn|>", special=True)))
    write_tokenizer(tmp_path / "m", tokenizer, vocab_size=ROOM)
    file = written(tmp_path / "m")
    fields, vocabulary = read_fields(file), tokenizer.get_vocab()
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == ROOM
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert all(fields["tokenizer.ggml.tokens"][number] == token for token, number in vocabulary.items())
    assert (types["<s>"], types["<|turn|>"], types["<tool>"], types["the"]) == (3, 3, 4, 1)
    assert {types[f"[PAD{number}]"] for number in range(len(vocabulary), ROOM)} == {5}
    for text in ("a<tool>b", "a<|turn|>b"):
        assert reread_tokenizer(file).encode(text) == tokenizer.encode(text)
        assert len(tokenizer.encode(text)) == 3


ENDS = {"none": ("$A", False, False), "both": ("<s> $A </s>", True, True), "end": ("$A </s>", False, True)}


@pytest.mark.parametrize(("template", "adds_bos", "adds_eos"), ENDS.values(), ids=ENDS)
def test_what_is_added_at_the_ends(tmp_path, template, adds_bos, adds_eos):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    write_tokenizer(tmp_path / "m", tokenizer)
    file = written(tmp_path / "m")
    fields = read_fields(file)
    assert fields["tokenizer.ggml.add_bos_token"] is adds_bos
    assert fields["tokenizer.ggml.add_eos_token"] is adds_eos
    assert reread_tokenizer(file).encode("x") == AutoTokenizer.from_pretrained(tmp_path / "m").encode("x")


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("templates", [TEMPLATE, {"default": TEMPLATE, "tool_use": "{{ tools }}"}])
def test_the_chat_template(tmp_path, templates):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = templates
    write_tokenizer(tmp_path / "m", tokenizer)
    file = written(tmp_path / "m")
    assert read_fields(file)["tokenizer.chat_template"] == TEMPLATE
    assert read_fields(file).get("tokenizer.chat_template.tool_use") == (
        None if templates is TEMPLATE else "{{ tools }}"
    )
    assert reread_tokenizer(file).chat_template == TEMPLATE


NO_LLAMA: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("llama", {"hidden_act": "gelu"}, "its activation is 'gelu', not 'silu'"),
    "window": ("mistral", {}, "its sliding window of 16 is less than its 64 positions"),
    "period": (
        "gemma3_text",
        {"sliding_window_pattern": 2},
        "other blocks than each sixth are without a sliding window",
    ),
    "untied": (
        "gemma",
        {"tie_word_embeddings": False},
        "its head has weights of its own, and llama.cpp takes the embeddings for it",
    ),
    # As slicing leaves them: their heads keep their size.
    **{
        f"heads of {kind}": (kind, {"head_dim": 16}, "its heads together are not as wide as the stream")
        for kind in ("phi3", "starcoder2")
    },
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "its rotary embeddings are scaled by 'dynamic', which is none of default, linear, llama3",
    ),
}


@pytest.mark.parametrize(("model_type", "options", "reason"), NO_LLAMA.values(), ids=NO_LLAMA)
def test_other_models_are_refused(tmp_path, model_type, options, reason):
    write_folder(tmp_path / "m", model_type, **options)
    message = (
        f"The model cannot be written as GGUF: {reason}. GGUF is written for {', '.join(sorted(WRITTEN))}. "
        "Leave GGUF out: transformers loads the folder without it."
    )
    with pytest.raises(UnsupportedModel, match=f"^{re.escape(message)}$"):
        written(tmp_path / "m")
    assert list((tmp_path / "m-gguf").iterdir()) == []
    with pytest.raises(UnsupportedModel, match=f"^{re.escape(message)}$"):
        check_exportable(tiny_config(model_type, **options), tmp_path / "m")


def test_the_tokenizer_of_a_larger_model_is_refused(tmp_path):
    write_tokenizer(tmp_path / "m", byte_level(size=300))
    with pytest.raises(
        CheckpointError, match=r"gives token 299, but the model has a vocabulary of 259\. It is another"
    ):
        written(tmp_path / "m")


def unigram() -> Any:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def without_bytes() -> Any:
    backend = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", byte_fallback=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


TOOL = AddedToken("<tool>", lstrip=True, special=False)
NO_TOKENIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "unigram": (unigram, "it is a Unigram model, not BPE"),
    "strips": (lambda: byte_level(added=(TOOL,)), "its added token '<tool>' has the option lstrip"),
    "no bytes": (without_bytes, "it has byte fallback but no token <0x00>"),
    "another's spaces": (
        lambda: sentencepiece("gemma"),
        "it does not put '\u2581' for spaces and one before the text, as Llama's SentencePiece does",
    ),
    "merges": (
        lambda: sentencepiece(drop=1),
        "its merges are not all that its vocabulary allows, which is what llama.cpp merges",
    ),
}


@pytest.mark.parametrize(("build", "reason"), NO_TOKENIZERS.values(), ids=NO_TOKENIZERS)
def test_other_tokenizers_are_refused(tmp_path, build, reason):
    write_tokenizer(tmp_path / "m", build(), vocab_size=ROOM)
    message = (
        f"The tokenizer of {tmp_path / 'm'} cannot be written as GGUF: {reason}. GGUF is written for the byte-level "
        "BPE of GPT-2, Llama 3 and Qwen2 and for the SentencePiece of Llama and Gemma. Leave GGUF out: transformers "
        "loads the folder without it."
    )
    with pytest.raises(UnsupportedModel, match=f"^{re.escape(message)}$"):
        written(tmp_path / "m")
    assert list((tmp_path / "m-gguf").iterdir()) == []
    with pytest.raises(UnsupportedModel, match=f"^{re.escape(message)}$"):
        check_exportable(tiny_config("llama", vocab_size=ROOM), tmp_path / "m")


def test_the_extra_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"^Writing GGUF needs the package gguf: pip install compress-llm\[gguf\]$"):
        write_gguf(tmp_path / "absent", tmp_path / "model.gguf")
    with pytest.raises(UsageError, match=r"^Writing GGUF needs the package gguf: pip install compress-llm\[gguf\]$"):
        check_exportable(tiny_config("llama"), tmp_path / "absent")


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    write_folder(tmp_path / "m", **(SLICED | {"attention_bias": True}))
    alive = []
    read_before = LazyWeights.read

    def read(self: LazyWeights, names: Any) -> dict[str, torch.Tensor]:
        assert [reference for reference in alive if reference() is not None] == []
        tensors = read_before(self, names)
        assert len(tensors) == 1
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors

    monkeypatch.setattr(LazyWeights, "read", read)
    file = written(tmp_path / "m")
    assert len(alive) >= len(read_tensors(file)) == 3 + NUM_BLOCKS * 13


@pytest.fixture
def in_this_process(tmp_path):
    """Seconds faster than a process of its own."""
    with proved_here(tmp_path / "modules"):
        yield


def proved(folder: Path, model: Any, file: Path | None = None) -> float:
    """The proof by a probe of the model."""
    probe = torch.arange(40)[None]
    with torch.inference_mode():
        expected = model.float()(input_ids=probe).logits
    return verify_gguf(folder, file or written(folder), probe, expected)


def test_the_proof_sees_other_logits(small, in_this_process):
    folder, file, model = small
    probe = torch.arange(40)[None]
    with torch.inference_mode():
        theirs = model(input_ids=probe).logits
    assert verify_gguf(folder, file, probe, theirs) == 0
    message = r"GGUF file reloads with other logits: they differ by 9\.9e-03 of the largest, allowed is 1e-04"
    with pytest.raises(VerificationError, match=message):
        verify_gguf(folder, file, probe, 1.01 * theirs)


def test_the_proof_sees_other_tokens(tmp_path, in_this_process):
    model = write_folder(tmp_path / "m", num_hidden_layers=1)
    file = written(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(VerificationError, match=r"model\.gguf gives other tokens than .* for \"The year's"):
        proved(tmp_path / "m", model, file)
