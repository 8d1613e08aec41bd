"""`compress inspect`: what it says of every kind of checkpoint, against the files themselves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_runner import flat, succeeds
from outputs import KINDS
from tiny import HIDDEN, NUM_BLOCKS

WRITTEN = KINDS

BLOCK_LINEARS = 7  # of a Llama


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "compress.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.rglob("*.safetensors")) for name, tensor in load_file(file).items()}


def seen(root: Path, kind: str, *options: object) -> dict:
    return succeeds("inspect", root / kind, "--json", *options).json


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_sums_up_to_its_files(root, kind):
    said, facts, tensors = seen(root, kind), facts_of(root / kind), tensors_of(root / kind)
    assert said["verified"] is True
    assert said["bytes"] == sum(tensor.nbytes for tensor in tensors.values()) == facts["size"]["bytes"]
    assert sum(row["bytes"] for row in said["blocks"]) == said["bytes"]
    assert sum(row["parameters"] for row in said["blocks"]) == said["parameters"] == facts["size"]["parameters"]
    assert sum(entry["bytes"] for entry in said["dtypes"].values()) == said["bytes"]
    assert [row["name"] for row in said["blocks"]] == [
        "embeddings",
        *(f"block {index}" for index in range(NUM_BLOCKS)),
        "head",
    ]
    for row in said["blocks"][1:-1]:
        index = row["name"].removeprefix("block ")
        own = [tensor.nbytes for name, tensor in tensors.items() if f".layers.{index}." in name]
        assert row["bytes"] == sum(own)


@pytest.mark.parametrize(("kind", "bits"), [("packed", 4), ("compact", 4), ("bytes", 8), ("odd", 3), ("thin", 32)])
def test_bits_of_a_code_and_of_a_weight(root, kind, bits):
    said, planned = seen(root, kind), facts_of(root / kind)["alternatives"]
    blocks = [each for each in said["linears"] if ".layers." in each["linear"]]
    assert {each["bits"] for each in blocks} == {bits}
    assert len(blocks) == NUM_BLOCKS * BLOCK_LINEARS
    for each in planned[:1]:
        assert said["bits_per_weight"] == pytest.approx(each["bits_per_weight"], rel=1e-12)


def test_zeros_are_counted_as_one_counts_by_hand(root):
    """Codes of 4 bits, eight in a word, the lowest bits first; 8 is the code of zero."""
    said = {each["linear"]: each for each in seen(root, "packed")["linears"]}
    tensors = tensors_of(root / "packed")
    packed = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    assert len(packed) == NUM_BLOCKS * BLOCK_LINEARS
    for name in packed:
        m, n = tensors[f"{name}.weight_shape"].tolist()
        words = tensors[f"{name}.weight_packed"].tolist()
        codes = [[(word >> 4 * place) % 16 - 8 for word in row for place in range(8)][:n] for row in words]
        assert said[name]["zeros"] == sum(row.count(0) for row in codes) / (m * n)
        assert said[name]["pattern"] == "2:4"
        fours = [row[start : start + 4] for row in codes for start in range(0, n, 4)]
        assert said[name]["pattern_kept"] is all(four.count(0) >= 2 for four in fours) is True


def test_a_pattern_that_is_promised_and_not_kept_is_told(root, tmp_path):
    shutil.copytree(root / "packed", tmp_path / "packed")
    change(tmp_path / "packed" / "compress.json", lambda facts: facts["linears"][0].update(pattern="1:4"))
    said = seen(tmp_path, "packed")
    first = next(each for each in said["linears"] if each["pattern"] == "1:4")
    assert first["pattern_kept"] is False
    assert "1:4 broken" in said["blocks"][1]["patterns"]


def change(file: Path, how) -> None:
    data = json.loads(file.read_text())
    how(data)
    file.write_text(json.dumps(data))


def test_a_sparse_weight_of_anybody_is_found_out(tmp_path):
    weight = torch.randn(8, 16)
    weight.view(8, 4, 4)[..., 1:3] = 0
    write_foreign(tmp_path, {"model.layers.0.mlp.up.weight": weight, "model.layers.0.norm.weight": torch.ones(16)})
    (linear,) = seen(tmp_path, ".")["linears"]
    assert (linear["pattern"], linear["pattern_kept"], linear["zeros"]) == ("2:4", True, 0.5)


def write_foreign(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> None:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["FooForCausalLM"], **config}))


def test_widths_units_ranks_and_errors(root):
    sliced, facts = seen(root, "sliced"), facts_of(root / "sliced")
    errors = {point["point"]: point["relative_error"] for point in facts["points"]}
    for index, row in enumerate(sliced["blocks"][1:-1]):
        assert row["widths"] == [3 * HIDDEN // 4] * 2
        assert row["units"] == facts["units"]
        assert row["error"] == errors[f"block {index} mlp"] > 0
    for row in seen(root, "thin")["blocks"][1:-1]:
        assert set(row["ranks"]) == {HIDDEN // 2, HIDDEN // 4}
        assert 0 < row["lost"] < 1
    assert {rank for row in seen(root, "multiplied")["blocks"] for rank in row["ranks"]} == {16, 8}
    assert {rank for row in seen(root, "compact")["blocks"] for rank in row["ranks"]} == {4}


def test_fast_reads_no_weights(root, monkeypatch):
    def forbidden(*_arguments, **_options):
        raise AssertionError("weights are read")

    monkeypatch.setattr("compress.checkpoints.integrity.sha256", forbidden)
    monkeypatch.setattr("compress.inspection.linears.read", forbidden)
    monkeypatch.setattr("compress.inspection.checkpoint.zeros_of", forbidden)
    said = seen(root, "packed", "--fast")
    assert said["verified"] is False
    assert {each["zeros"] for each in said["linears"]} == {None}
    assert "--fast verified no checksums" in flat(succeeds("inspect", root / "packed", "--fast").out)


def test_the_table_says_what_it_is(root, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = flat(succeeds("inspect", root / "packed", "--linears").out)
    for phrase in (
        "base model llama",
        "method slim-anchored",
        "LlamaForCausalLM (stock: no code of ours)",
        "compress.load; transformers and peft and compressed-tensors",
        "5 parts and an adapter, as they were written (sha256)",
        "Made by: compress slim --model llama --bits 4",
        "model.layers.2.mlp.down_proj",
        "nats a token",
    ):
        assert phrase in said
    assert "after `import compress` or with trust_remote_code" in flat(succeeds("inspect", root / "thin").out)


def write_quality(folder: Path, ppl: float) -> None:
    counts = {"tokens": 254, "windows": 2, "seq_len": 128, "seconds": 1.0}
    perplexity = {"dataset": "wikitext2", "ppl": ppl, "nll": 2.5, "standard_error": 0.25, **counts}
    (folder / "quality.json").write_text(json.dumps({"perplexity": [perplexity], "settings": {}}))


def test_several_are_compared_and_what_was_measured_is_told(root, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(root / "sliced", tmp_path / "sliced")
    write_quality(tmp_path / "sliced", 12.5)
    said = flat(succeeds("inspect", tmp_path / "sliced").out)
    assert "perplexity on wikitext2, windows of 128" in said
    assert "12.5 ± 0.25" in said
    assert seen(tmp_path, "sliced")["quality"]["perplexity"][0]["ppl"] == 12.5
    said = flat(succeeds("inspect", root / "sliced", root / "packed", root / "llama").out)
    for name in ("sliced", "packed", "llama"):
        assert name in said
    data = succeeds("inspect", root / "sliced", root / "llama", "--json").json
    assert [each["made_by_compress"] for each in data["checkpoints"]] == [True, False]


def test_a_dense_model(root):
    said, tensors = seen(root, "llama"), tensors_of(root / "llama")
    assert said["made_by_compress"] is False
    assert said["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert said["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert said["architecture"] == "LlamaForCausalLM"
    assert len(said["linears"]) == NUM_BLOCKS * BLOCK_LINEARS
    assert said["bits_per_weight"] == 32


def test_a_model_that_others_quantized_is_named_and_not_decoded(tmp_path):
    tensors = {
        "model.embed_tokens.weight": torch.zeros(8, 4),
        "model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 8, dtype=torch.int32),
        "model.layers.0.mlp.up_proj.scales": torch.ones(1, 8, dtype=torch.float16),
    }
    write_foreign(tmp_path, tensors, quantization_config={"quant_method": "gptq", "bits": 4})
    said = seen(tmp_path, ".")
    assert said["quantized_by"] == "gptq"
    assert said["parameters"] is None
    assert said["bytes"] == 8 * 4 * 4 + 4 * 8 * 4 + 8 * 2
    out = flat(succeeds("inspect", tmp_path).out)
    assert "quantized by gptq" in out
    assert "counted in bytes and not decoded" in out
