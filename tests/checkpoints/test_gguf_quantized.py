"""`compress quantize --type`: one GGUF file in llama.cpp's types, as readers find it."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
import tiny
from cli_runner import flat, invoke, succeeds
from compress import pipeline
from compress.checkpoints.quality import read_quality

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.write_model(folder / "llama", "llama", dtype=torch.float32, **tiny.IN_BLOCKS)
    tiny.write_text(folder / "text.txt")
    return folder


def quantize(home, out, *options, verb="quantize"):
    words = [verb, "--model", home / "llama", "--calib", home / "text.txt", "--samples", 8, "--seq-len", 32]
    return [*map(str, words), "--out", str(home / out), *options]


@pytest.fixture(scope="module")
def written(home):
    succeeds(*quantize(home, "q4", "--type", "Q4_K_M,attn_k=Q8_0,ffn_down=Q3_K"))
    return home / "q4"


def test_the_folder_has_the_file_and_what_tells_of_it(written):
    assert sorted(file.name for file in written.iterdir()) == ["README.md", "compress.json", "q4.gguf"]
    assert "llama-cli -m PATH/q4.gguf" in (written / "README.md").read_text()


def test_tensors_have_the_types_that_were_asked_for(written):
    reader = gguf.GGUFReader(written / "q4.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == "Q5_0"
    assert types["blk.1.attn_k.weight"] == "Q8_0"
    assert types["blk.1.ffn_down.weight"] == "Q3_K"
    assert types["token_embd.weight"] in ("Q5_0", "Q8_0")
    assert types["output_norm.weight"] == "F32"


def test_transformers_reads_a_model_near_the_dense_one(home):
    succeeds(*quantize(home, "q8", "--type", "Q8_0"))
    ids = torch.arange(3, 27).view(1, -1)
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(home / "llama", dtype=torch.float32)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(home / "q8", gguf_file="q8.gguf", dtype=torch.float32)(ids).logits
    assert float((found - dense).norm() / dense.norm()) < 0.04  # random weights carry 8 bits' errors on
    same = AutoTokenizer.from_pretrained(home / "q8", gguf_file="q8.gguf")
    assert same("The cat")["input_ids"] == AutoTokenizer.from_pretrained(home / "llama")("The cat")["input_ids"]


def test_the_plan_and_the_file_agree(home, written):
    planned = succeeds(*quantize(home, "dry", "--type", "Q4_K_M,attn_k=Q8_0,ffn_down=Q3_K", "--dry-run", "--json")).json
    metadata = json.loads((written / "compress.json").read_text())
    assert planned["size"] == metadata["size"]
    assert planned["size"]["parameters"] == metadata["size"]["parameters"] == metadata["dense_size"]["parameters"]
    assert metadata["size"]["bytes"] < (written / "q4.gguf").stat().st_size


def test_eval_measures_the_file_and_what_needs_safetensors_says_so(home, written, tmp_path):
    out = shutil.copytree(written, tmp_path / "q4")
    words = ["--ppl", home / "text.txt", "--seq-len", 32, "--limit", 4]
    found = succeeds("eval", "--model", out, *words, "--save", "--json").json
    assert found["perplexity"][0]["ppl"] > 1
    assert read_quality(out).perplexity[0].windows == 4
    assert succeeds("inspect", out, "--json").json["quality"]["perplexity"]
    ran = invoke("finetune", written)
    assert (ran.code, len(ran.faults)) == (2, 1)
    assert "before it is quantized" in ran.faults[0]


def test_it_is_looked_into(written):
    found = succeeds("inspect", written, "--json").json
    metadata = json.loads((written / "compress.json").read_text())
    assert found["verified"]
    assert found["bytes"] == sum(block["bytes"] for block in found["blocks"]) == metadata["size"]["bytes"]
    assert found["parameters"] == sum(block["parameters"] for block in found["blocks"])
    names = [block["name"] for block in found["blocks"]]
    assert names == ["embeddings", "block 0", "block 1", "block 2", "head"]
    lost = [linear["lost"] for linear in metadata["linears"] if ".layers.1." in linear["linear"]]
    assert found["blocks"][2]["lost"] == pytest.approx(sum(lost) / len(lost))
    assert 3 < found["bits_per_weight"] < 9
    assert "one GGUF file, for llama.cpp" in flat(succeeds("inspect", written, "--fast").out)


def test_sliced_and_quantized_in_one_walk(home):
    """Narrower and in block types; the command that the card has makes it again."""
    words = ["--ratio", "0.25", "--type", "Q4_K_M,ffn_gate=Q8_0"]
    said = flat(succeeds(*quantize(home, "narrow", *words, verb="slice")).out)
    assert "so some linears stay in the model's dtype" in said
    reader = gguf.GGUFReader(home / "narrow" / "narrow.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.ffn_gate.weight"].tensor_type.name == "F32"  # of 48 inputs, no whole blocks
    assert list(tensors["blk.0.ffn_down.weight"].shape) == [256, 48]
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name in ("Q4_K", "Q6_K")
    metadata = json.loads((home / "narrow" / "compress.json").read_text())
    assert " --type Q4_K_M,ffn_gate=Q8_0 " in metadata["command"]
    assert sorted(file.name for file in (home / "narrow").iterdir()) == ["README.md", "compress.json", "narrow.gguf"]


NO_ROOM = "A GGUF file has no linears as other engines pack them"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["slice", "--keep-params", 0.75, "--type", "Q8_0"], "or run compress quantize --type Q8_0 on the result"),
        (["slice", "--ratio", 0.25, "--rotation", "per-layer", "--type", "Q8_0"], "not written for our own arch"),
        (["lord", "--rank-frac", 0.5, "--type", "Q8_0"], "Give factorize form: dense (--materialize)"),
        (["slim", "--type", "Q8_0"], "give --sparsity none --adapter-rank 0, which is compress quantize --type"),
        (["slim", "--export", "gguf"], NO_ROOM),
        (["run", "quantize", "--export", "gguf"], NO_ROOM),
    ],
)
def test_what_has_no_room_in_a_file_is_refused_before_the_work(home, words, reason):
    rest = quantize(home, "never")[1:]
    ran = invoke(*words, *rest)
    assert ran.code in (2, 3)
    assert [reason in fault for fault in ran.faults] == [True], ran.faults
    assert "compressing" not in ran.err
    assert not list(home.glob("never*"))


def test_without_sparsity_and_adapters_slim_is_quantize(home):
    words = ["--type", "Q8_0", "--sparsity", "none", "--adapter-rank", "0", "--show-recipe"]
    shown = succeeds(*quantize(home, "never", *words, verb="slim")).out
    assert shown == succeeds(*quantize(home, "never", "--type", "Q8_0", "--show-recipe")).out


def test_the_held_out_divergence_is_from_the_dense_head(tmp_path, monkeypatch):
    """Also where head and embeddings are one table, which is quantized."""
    heads = []

    def remember(_head, weight, *_rest):
        heads.append(weight.clone())

    monkeypatch.setattr("compress.calibration.branch_pass.mean_divergence", remember)
    stages = [
        {"stage": "refit"},
        {"stage": "slim", "form": "gguf", "quantize": {"gguf_type": "Q4_0"}},
        {"stage": "quantize_embeddings"},
    ]
    job = runs.job_of(tmp_path, "llama", stages, changes={**tiny.IN_BLOCKS, "tie_word_embeddings": True})
    pipeline.run(job)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(heads[0], dense.lm_head.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--type", "Q4_KM"], ["--type Q4_KM", "Did you mean 'Q4_K_M'?"]),
        (["--type", "Q4_K_M", "--bits", "4"], ["--bits has no effect with --type"]),
        (["--type", "Q4_K_M,attn_v=Q9"], ["'Q9'"]),
    ],
)
def test_what_cannot_be_is_said_in_a_line(home, options, words):
    ran = invoke(*quantize(home, "never", *options))
    assert ran.code == 2
    assert all(word in " ".join(ran.faults) for word in words), ran.faults
    assert not (home / "never").exists()


def test_in_packed_form_embeddings_are_told_their_bits(home):
    recipe = home / "tables.yaml"
    recipe.write_text(
        "method: x\nstages:\n  - stage: slim\n    quantize: {num_bits: 4}\n  - stage: quantize_embeddings\n"
    )
    ran = invoke("run", recipe, "--model", home / "llama", "--calib", home / "text.txt", "--dry-run")
    assert (ran.code, len(ran.faults)) == (2, 1)
    assert "give head_bits, embedding_bits or both" in ran.faults[0]
