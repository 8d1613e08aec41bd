"""Embeddings and head in few bits, in packed form: what is written, who loads it, and what is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import matrices
import oracles
import runs
import tiny
from cli_runner import flat, invoke, succeeds
from compress import pipeline
from compress.calibration.sites import Table
from compress.models.stored_loading import load_stored
from compress.stages import tables
from compress.stages.tables import QuantizeEmbeddings

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore:You passed .quantization_config.")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "attention_bias": False, "mlp_bias": False, "num_hidden_layers": 1}
IDS = oracles.random_ids(1, 12)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.write_model(folder / "llama", "llama", dtype=torch.float32, **SIZES)
    tiny.write_model(folder / "tied", "llama", dtype=torch.float32, tie_word_embeddings=True, **SIZES)
    tiny.write_text(folder / "text.txt")
    return folder


def quantize(home, model, out, *options):
    words = ["quantize", "--model", home / model, "--calib", home / "text.txt", "--samples", 8, "--seq-len", 16]
    return [*words, "--group", 16, "--out", home / out, *options]


@pytest.fixture(scope="module")
def head(home):
    with runs.proved_here(home / "modules"):
        return succeeds(*quantize(home, "llama", "head", "--bits", 4, "--head-bits", 8, "--json")).json


@pytest.fixture(scope="module")
def both(home):
    words = ["--bits", 4, "--head-bits", 4, "--embedding-bits", 4, "--json"]
    with runs.proved_here(home / "modules"):
        return succeeds(*quantize(home, "llama", "both", *words)).json


@pytest.fixture(scope="module")
def tied(home):
    with runs.proved_here(home / "modules"):
        return succeeds(*quantize(home, "tied", "one", "--bits", 4, "--embedding-bits", 4, "--json")).json


def groups(folder):
    found = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    return [(group["targets"], group["weights"]["num_bits"]) for group in found.values()]


def names(folder):
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= set(opened.keys())
    return found


def by_transformers(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return oracles.logits_of(model, IDS)


def by_us(folder):
    return oracles.logits_of(load_stored(folder, dtype=torch.float32, device=torch.device("cpu")), IDS)


def test_a_head_has_bits_of_its_own_and_transformers_reads_them(home, head):
    assert head["reload_difference"] < 1e-4
    assert groups(home / "head") == [(["lm_head"], 8), (["Linear"], 4)]
    stored = names(home / "head")
    assert {"lm_head.weight_packed", "lm_head.weight_scale", "lm_head.weight_shape"} <= stored
    assert "lm_head.weight" not in stored
    assert "model.embed_tokens.weight" in stored
    assert oracles.largest_difference(by_transformers(home / "head"), by_us(home / "head")) < 1e-4


def test_head_and_embeddings_share_the_scheme_of_the_linears(home, both):
    assert groups(home / "both") == [(["lm_head", "Embedding", "Linear"], 4)]
    assert json.loads((home / "both" / "compress.json").read_text())["unpacks_while_loading"]
    found = by_transformers(home / "both", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert oracles.largest_difference(found, by_us(home / "both")) < 1e-4
    card = (home / "both" / "README.md").read_text()
    assert "CompressedTensorsConfig(dequantize=True)" in card
    assert "- `model.embed_tokens` has 4-bit weights.\n- `lm_head` has 4-bit weights.\n" in card


def test_a_tied_table_is_stored_and_counted_once(home, tied):
    assert not any(name.startswith("lm_head") for name in names(home / "one"))
    found = by_transformers(home / "one", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert oracles.largest_difference(found, by_us(home / "one")) < 1e-4
    assert tied["parameters"] == tied["dense_parameters"]
    (said,) = [note for note in tied["notes"] if note.startswith("vLLM cannot")]
    assert said == "vLLM cannot serve this: there a table that is embeddings and head is not in few bits."
    assert "vLLM cannot serve it: there a table" in flat((home / "one" / "README.md").read_text())


@pytest.mark.parametrize(
    ("out", "made", "model", "options", "bits"),
    [
        ("head", "head", "llama", ["--head-bits", 8], [[], [4], [8]]),
        ("both", "both", "llama", ["--head-bits", 4, "--embedding-bits", 4], [[4], [4], [4]]),
        ("one", "tied", "tied", ["--embedding-bits", 4], [[4], [4], []]),
    ],
)
def test_the_plan_counts_what_is_written(home, request, out, made, model, options, bits):
    request.getfixturevalue(made)
    size = succeeds(*quantize(home, model, "dry", "--bits", 4, *options, "--dry-run", "--json")).json["size"]
    assert size == json.loads((home / out / "compress.json").read_text())["size"]
    seen = succeeds("inspect", home / out, "--json").json
    assert (seen["verified"], seen["bytes"], seen["parameters"]) == (True, size["bytes"], size["parameters"])
    assert sum(block["parameters"] for block in seen["blocks"]) == size["parameters"]
    assert [block["bits"] for block in seen["blocks"]] == bits


@pytest.mark.parametrize(
    ("model", "options", "tables", "words"),
    [
        ("llama", [], 2, "Embeddings and head stay in float32, {}; --head-bits 8 stores the head in fewer."),
        ("llama", ["--head-bits", 8], 1, "Embeddings stay in float32, {}; --embedding-bits stores them in fewer."),
        ("tied", [], 1, "Embeddings, the head too, stay in float32, {}; a GGUF file (--type) stores them in fewer."),
    ],
)
def test_what_stays_in_full_is_said(home, model, options, tables, words):
    planned = succeeds(*quantize(home, model, "dry", *options, "--dry-run", "--json")).json
    share = 4 * tables * tiny.VOCAB_SIZE * SIZES["hidden_size"] / planned["size"]["bytes"]
    assert words.format(f"{share:.0%} of the bytes") in planned["notes"]


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("llama", ["--head-bits", 0], "--head-bits 0: Input should be greater than or equal to 2"),
        ("tied", ["--head-bits", 8], "head_bits has no effect: the head is the embeddings' table."),
        ("llama", ["--embedding-bits", 8], "Give head_bits and embedding_bits the linears' 4, or leave them out."),
        ("llama", ["--asymmetric", "--head-bits", 8], "Give head_bits and embedding_bits the linears' 4"),
        ("llama", ["--embedding-bits", 8, "--bits", 8, "--inputs", "int8"], "Take --group channel without --inputs."),
        ("llama", ["--head-bits", 8, "--bits", "fp8"], "go with linears of 2 to 8 bits, and these are floats"),
        ("llama", ["--head-bits", 8, "--compact"], "quantize_embeddings is for GGUF files and packed form"),
        ("llama", ["--head-bits", 9], "--head-bits 9: Input should be less than or equal to 8"),
    ],
)
def test_what_no_engine_reads_is_refused_before_the_work(home, model, options, reason):
    ran = invoke(*quantize(home, model, "never", *options))
    assert ran.code == 2
    assert [reason in fault for fault in ran.faults] == [True], ran.faults
    assert not list(home.glob("never*"))


def test_with_type_a_file_says_all_of_it(home):
    words = ["quantize", "--model", home / "llama", "--type", "Q8_0"]
    assert "--head-bits has no effect with --type" in invoke(*words, "--head-bits", 8).faults[0]
    ran = invoke(
        "run",
        "gguf",
        "--model",
        home / "llama",
        "--calib",
        home / "text.txt",
        "--set",
        "quantize_embeddings.head_bits=8",
    )
    assert "head_bits and embedding_bits are for packed form" in ran.faults[0]


@pytest.mark.parametrize("tied", [False, True])
def test_the_held_out_divergence_is_of_the_quantized_table(tmp_path, tied):
    """Also where the stream is sliced, and the head quantized in its written form."""
    bits = {"embedding_bits": 2} if tied else {"head_bits": 2}
    slim = {"stage": "slim", "quantize": {"num_bits": 2, "group_size": 8}}
    changes = SIZES | {"tie_word_embeddings": tied}
    sliced = [
        {"stage": "fold_norms"},
        {"stage": "rotate_shared"},
        {"stage": "slice", "ratio": 0.25, "slice_head": True},
    ]
    for before in [[], sliced][: 1 if tied else 2]:
        found = []
        for after in ([], [{"stage": "quantize_embeddings", **bits}]):
            stages = [*before, {"stage": "refit"}, slim, *after]
            out = f"{len(before)}-{len(after)}"
            with runs.proved_here(tmp_path / "modules"):
                result = pipeline.run(runs.job_of(tmp_path, "llama", stages, changes=changes, out=out))
            assert result.difference < 1e-4
            found.append(result.metadata.held_out_divergence)
        assert found[1] > 1.02 * found[0]


@pytest.mark.parametrize(
    "how",
    [
        {"weights": {"lm_head": {"num_bits": 4, "group_size": 8}}, "dtype": "float32"},
        {"types": {"lm_head": "Q4_0"}},
    ],
)
def test_a_head_is_swept_by_its_inputs_some_rows_at_a_time(monkeypatch, how):
    W, inputs = matrices.random(70, 32).float(), matrices.measured(matrices.rows(32))
    stage, found = QuantizeEmbeddings(**how), {}
    for name, given, rows in (("alone", None, 8192), ("swept", inputs, 8192), ("in parts", inputs, 32)):
        monkeypatch.setattr(tables, "ROWS", rows)
        found[name] = Table("lm_head", W, given)
        stage.apply(found[name])
    lost = {
        name: float(((table.values - W).double() @ inputs.second * (table.values - W)).sum())
        for name, table in found.items()
    }
    assert lost["swept"] < 0.8 * lost["alone"]
    assert lost["in parts"] == pytest.approx(lost["swept"], rel=0.01)
    for name, tensor in found["swept"].stored.items():
        assert tensor.shape == found["in parts"].stored[name].shape
