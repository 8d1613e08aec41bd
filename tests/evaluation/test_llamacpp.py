"""llama.cpp itself runs the files that are written: same tokens, same log-probabilities as our own reader's."""

import json
import shutil

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

import tiny
from cli_runner import invoke, succeeds
from compress.checkpoints.gguf import reader_notes, write_gguf
from compress.errors import CheckpointError, UsageError
from compress.evaluation.generation import Sampling, generate
from compress.evaluation.llamacpp import LlamaCpp
from compress.models.gguf_header import with_widths
from compress.models.hub import find_model
from compress.models.loading import load_tokenizer
from compress.models.stored_loading import open_model
from gguf_folders import ROOM, sentencepiece
from runs import unproved

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
CPU = torch.device("cpu")
NO_BIASES = {"attention_bias": False, "mlp_bias": False}
WIDE = {
    **NO_BIASES,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}
# Two files that have all block types between them.
TYPES = {
    "q4": "Q4_K_M,attn_q=Q2_K,attn_k=Q3_K,attn_v=IQ4_NL,attn_output=Q4_0,ffn_gate=IQ4_XS,ffn_up=Q6_K,ffn_down=Q5_K",
    "q8": "Q8_0,attn_q=Q4_1,attn_k=Q5_0,attn_v=Q5_1,ffn_up=Q4_K",
}
# Of blocks with a window, two in three of whose tokens lie before it, and of those without.
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 400.0, "factor": 3.0},
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"vocab_size": 264},
    "qwen3": {},
    "phi3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE, "final_logit_softcapping": 3.0},
    "granite": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "olmo2": {"head_dim": 8},
    "starcoder2": {"hidden_act": "gelu_pytorch_tanh"},
}
TANH = ("gemma", "gemma2", "gemma3_text", "starcoder2")  # whose GELU llama.cpp looks up in float16


def expected(file, ids):
    """Log-probabilities by transformers, of weights that gguf's decoder has read."""
    return of_tokens(open_model(find_model(str(file)).whole_folder(), dtype=torch.float32, device=CPU), ids)


def of_tokens(model, ids):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def opened(file):
    return LlamaCpp(file, context=64, vocabulary=264)


def text_ids(length=48):
    return torch.randint(3, tiny.VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_full_precision(family, tmp_path):
    """By llama.cpp, by our own reader, and by transformers', of which the notes say whether it reads it all."""
    # In a folder of another name: llama.cpp expects Phi-3's special tokens of a model called so.
    dense = tiny.write_model(tmp_path / "tiny", family, dtype=torch.float32, **FAMILIES[family])
    (tmp_path / "alone").mkdir()
    write_gguf(tmp_path / "tiny", file := tmp_path / "alone" / "model.gguf")
    ids = text_ids()
    found, ours = torch.tensor(opened(file).log_probs(ids), dtype=torch.float64), expected(file, ids)
    assert found.std() > 0.2
    torch.testing.assert_close(found, ours, atol=1e-2 if family in TANH else 1e-3, rtol=0)
    torch.testing.assert_close(ours, of_tokens(dense, ids), atol=1e-4, rtol=0)
    tokens = torch.tensor([ids[:16]])
    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        alike = torch.allclose(read(tokens).logits, dense(tokens).logits, atol=1e-4)
    except (ValueError, RuntimeError):  # an architecture or sizes that it does not know
        alike = False
    assert alike == (not reader_notes(file))


def test_it_writes_what_transformers_writes(tmp_path):
    """Greedily; bytes that are no characters apart."""
    dense = tiny.write_model(tmp_path / "tiny", "llama", dtype=torch.float32, **NO_BIASES)
    write_gguf(tmp_path / "tiny", file := tmp_path / "model.gguf")
    written = generate([ids := text_ids(12)], dense.eval(), load_tokenizer(tmp_path / "tiny"), Sampling(), 16)
    assert readable(opened(file).write(ids, 16)) == readable(written[0]) != ""


def readable(text):
    return "".join(letter for letter in text if letter.isascii())


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
UNEVEN = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "llama 3.1": {**NO_BIASES, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}},
}


@pytest.mark.parametrize("name", UNEVEN)
def test_mlps_of_different_widths(name, tmp_path):
    model_type = name.partition(" ")[0]
    config = with_widths(tiny.tiny_config(model_type, **UNEVEN[name]), [48, 20, 33])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * drawn if parameter.ndim == 1 else drawn / parameter.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path / "tiny")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    write_gguf(tmp_path / "tiny", file := tmp_path / "model.gguf")
    ids = text_ids()
    wanted = of_tokens(model.eval(), ids)
    torch.testing.assert_close(expected(file, ids), wanted)
    found = torch.tensor(opened(file).log_probs(ids), dtype=torch.float64)
    assert found.std() > 0.2
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    tiny.write_model(folder / "wide", "llama", dtype=torch.float32, seed=1, **WIDE)
    tiny.write_text(folder / "text.txt")
    return folder


@pytest.mark.parametrize("name", TYPES)
def test_every_type(name, wide):
    options = ["--calib", wide / "text.txt", "--samples", 4, "--seq-len", 32]
    succeeds("quantize", "--model", wide / "wide", "--type", TYPES[name], *options, "--out", wide / name)
    file, ids = wide / name / f"{name}.gguf", text_ids()
    found = torch.tensor(opened(file).log_probs(ids), dtype=torch.float64)
    error = (found - expected(file, ids)).abs()
    assert error.mean() < 0.03 * found.std()  # llama.cpp rounds the inputs of linears to 8 bits


def test_neurons_where_the_loss_feels_them(wide):
    """What `slice --allocation free` writes beside its folder: the folder's own log-probabilities."""
    options = ["--calib", wide / "text.txt", "--samples", 8, "--seq-len", 32, "--export", "gguf"]
    options += ["--allocation", "free", "--set", "budget.trial_samples=8", "--out", wide / "free"]
    with unproved():
        said = succeeds("slice", "--model", wide / "wide", "--keep-params", 0.7, *options, "--json").json
    assert len(set(said["units"]["neurons"])) > 1
    ids = text_ids()
    found = torch.tensor(opened(wide / "free" / "free.gguf").log_probs(ids), dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(wide / "free", dtype=torch.float32)
    torch.testing.assert_close(found, of_tokens(model, ids), atol=1e-3, rtol=0)


def test_the_tokens_are_the_tokenizers(wide, tmp_path):
    write_gguf(wide / "wide", file := tmp_path / "model.gguf")
    engine, tokenizer = opened(file), load_tokenizer(wide / "wide")
    for text in ("The cat's 12 hats", "  def f(x):\n\treturn x", "naïve 東京"):
        assert engine.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", ["gemma", "gemma3_text"])
def test_the_tokens_are_gemmas(family, tmp_path):
    changes = FAMILIES[family] | {"vocab_size": ROOM, "bos_token_id": 2, "pad_token_id": 0}
    tokenizer = sentencepiece("gemma")
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<turn>", special=True)])
    tiny.tiny_model(family, dtype=torch.float32, **changes).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    write_gguf(tmp_path / "tiny", file := tmp_path / "model.gguf")
    engine, tokenizer = opened(file), load_tokenizer(tmp_path / "tiny")
    for text in ("the test returns", "  def f(x):\n\treturn it", "na\u00efve \u6771\u4eac\n\n\n year"):
        assert engine.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_what_llamacpp_does_not_do_is_said_in_a_line(wide, tmp_path):
    write_gguf(wide / "wide", file := tmp_path / "model.gguf")
    with pytest.raises(UsageError, match="context"):
        opened(file).log_probs(text_ids(150))
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match=r"llama\.cpp does not load"):
        opened(file)


def test_the_command_line_measures_there(wide, tmp_path):
    write_gguf(wide / "wide", file := tmp_path / "model.gguf")
    words = ["--ppl", wide / "text.txt", "--seq-len", 16, "--limit", 3, "--json"]
    found = succeeds("eval", "--model", file, *words, "--engine", "llamacpp").json
    theirs = succeeds("eval", "--model", file, *words).json
    assert found["perplexity"][0]["ppl"] == pytest.approx(theirs["perplexity"][0]["ppl"], rel=1e-3)
    assert found["parameters"] == theirs["parameters"]
    speeds = succeeds("bench", file, "--engine", "llamacpp", "--prompt", 16, "--new", 4, "--rounds", 2, "--json").json
    (speed,) = speeds["speeds"][0]["files"].values()
    assert min(speed[kind]["median"] for kind in ("prefill", "decode")) > 0
    assert speed["bytes"] == file.stat().st_size
    (tmp_path / "compress.json").write_text("{}")  # as if it were a result of ours
    words = ["--prompt", 16, "--new", 4, "--rounds", 1]
    other = str(shutil.copy(file, wide / "model.gguf"))
    succeeds("bench", file, "--against", other, "--engine", "llamacpp", *words, "--save")
    kept = json.loads((tmp_path / "quality.json").read_text())["speed"][0]
    assert (kept["engine"], kept["dense"], kept["prompt"], kept["new"]) == ("llamacpp", other, 16, 4)
    assert kept["prefill"].keys() == {"dense", "compressed"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["eval", "--model", "wide", "--ppl", "text.txt", "--seq-len", 16], "llama.cpp reads GGUF files"),
        (["eval", "--model", "wide", "--ppl", "text.txt", "--kl", "wide"], "--engine llamacpp measures --ppl alone"),
        (["eval", "--model", "wide", "--ppl", "text.txt", "--device", "cpu"], "--engine llamacpp measures --ppl alone"),
        (["bench", "wide"], "llama.cpp reads GGUF files"),
        (["bench", "wide", "--layerwise"], "Leave --batch-sizes, --layerwise, --dtype and --device out"),
    ],
)
def test_what_it_cannot_measure_is_said_in_a_line(words, reason, wide, monkeypatch):
    monkeypatch.chdir(wide)
    ran = invoke(*words, "--engine", "llamacpp")
    assert (ran.code, len(ran.faults)) == (2, 1)
    assert reason in ran.faults[0]
