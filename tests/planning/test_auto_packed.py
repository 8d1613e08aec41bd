"""`compress auto --for vllm` and `--for transformers`: packed linears, each in a type that the engine runs."""

import json

import pytest
import torch
from safetensors.torch import load_file

import runs
import tiny
from cli_runner import invoke, succeeds
from compress import presets
from compress.architectures import packed_types
from compress.numerics.grids import QuantizationArgs
from compress.planning.prepare import new_rounded_model, take_survey
from compress.planning.types import DENSE, TypeSearch
from searches import auto, prepared_for

SIZE = 300_000
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@pytest.fixture(scope="module", autouse=True)
def proved_here(tmp_path_factory):
    with runs.proved_here(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def written(home):
    """For each engine, at one size."""
    for engine in packed_types.ENGINES:
        succeeds(*auto(home, "--for", engine, "--target-size", SIZE, "--out", home / engine))
    return home


def on_disk(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def types_of(folder):
    """The types of linears by path, as config.json says them."""
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    args = [(group["targets"], group["weights"]) for group in groups]
    return {
        path: QuantizationArgs(num_bits=each["num_bits"], group_size=each["group_size"]).name
        for paths, each in args
        for path in paths
    }


@pytest.mark.parametrize("engine", packed_types.ENGINES)
def test_the_files_are_never_larger_than_asked(written, engine):
    folder = written / engine
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    counted = min(trials, key=lambda trial: trial["divergence"])["bytes"]
    assert 0.9 * SIZE < on_disk(folder) <= counted <= SIZE
    assert len({*types_of(folder).values()}) > 1


def test_what_vllm_makes_one_linear_of_has_one_type(written):
    found = types_of(written / "vllm")
    for path, name in found.items():
        block, _, kind = path.rpartition(".")
        parts = next((names for names in FUSED if kind in names), (kind,))
        assert {found.get(f"{block}.{part}") for part in parts} == {name}
        assert QuantizationArgs.of_name(name).num_bits in (4, 8)
    assert json.loads((written / "vllm" / "compress.json").read_text())["not_for_vllm"] is None


def test_the_card_says_where_vllm_cannot_follow(written):
    facts = json.loads((written / "transformers" / "compress.json").read_text())
    found = types_of(written / "transformers")
    torn = any(
        len({found.get(f"model.layers.{block}.{module}.{part}") for part in parts}) > 1
        for block in range(tiny.NUM_BLOCKS)
        for module, parts in zip(("self_attn", "mlp"), FUSED, strict=True)
    )
    assert ("one linear of" in (facts["not_for_vllm"] or "")) == torn


@pytest.mark.parametrize("engine", packed_types.ENGINES)
def test_bytes_are_counted_as_the_plan_counts_them(home, tmp_path, engine):
    found = prepared_for(home, engine, SIZE, tmp_path / "x")
    space = found.types
    assert space is not None
    types = {path: sorted(rungs, key=rungs.get)[1] for path, rungs in space.rungs.items()}
    types = {path: types[next((unit[0] for unit in space.units if path in unit), path)] for path in types}
    decided = found.without(()).plan.space.spec({"types": types, "tables": {}})
    assert space.bytes_of(types) == decided.disk_bytes
    assert space.bytes_of({}) == space.most


def test_linears_that_no_group_divides_have_a_scale_a_channel_or_stay(home, tmp_path):
    tiny.write_model(home / "odd", "llama", dtype=torch.float32, **tiny.IN_BLOCKS | {"intermediate_size": 84})
    space = prepared_for(home, "vllm", SIZE, tmp_path / "x", model="odd").types
    assert {*space.rungs["model.layers.0.mlp.down_proj"]} == {"int8-channel", DENSE}  # rows of whole words
    space = prepared_for(home, "transformers", SIZE, tmp_path / "x", model="odd").types
    assert {*space.rungs["model.layers.0.mlp.down_proj"]} == {f"int{bits}-channel" for bits in (2, 3, 4, 5, 6, 8)} | {
        DENSE
    }


def test_predicted_costs_are_near_the_measured_ones(home, tmp_path):
    """Of single matrices in their smallest type."""
    found = prepared_for(home, "transformers", SIZE, tmp_path / "x")
    found.job.partial.mkdir()
    survey = take_survey(found, lambda _name: None)
    search, model = TypeSearch.of(found.types, survey.roundings), new_rounded_model(found, survey)
    for path in ("model.layers.0.mlp.up_proj", "model.layers.2.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        assert model.divergence({path: "int2-g32"}) == pytest.approx(search.costs[path]["int2-g32"], rel=0.6)
        assert search.costs[path]["int8-g32"] < search.costs[path]["int4-g32"] < search.costs[path]["int2-g32"]


def quantized(home, out, *settings):
    text = ["--calib", home / "text.txt", "--samples", 8, "--seq-len", 32, "--no-refit", "--out", out]
    return ["quantize", "--model", home / "llama", *text, *(word for each in settings for word in ("--set", each))]


def test_types_by_pattern_are_stored_as_said_and_the_last_that_fits_counts(home, tmp_path):
    types = {
        "all": "int4-g32",
        "mlp": "int3-g64",
        "down_proj": "int8-channel",
        "model.layers.0.mlp.up_proj": "int5-g32",
    }
    succeeds(*quantized(home, tmp_path / "out", f"slim.quantize.types={json.dumps(types)}"))
    found = types_of(tmp_path / "out")
    assert len(found) == 7 * tiny.NUM_BLOCKS
    assert found["model.layers.1.self_attn.q_proj"] == "int4-g32"
    assert found["model.layers.1.mlp.up_proj"] == "int3-g64"
    assert found["model.layers.0.mlp.down_proj"] == "int8-channel"
    assert found["model.layers.0.mlp.up_proj"] == "int5-g32"
    stored = {name: each for file in (tmp_path / "out").glob("*.safetensors") for name, each in load_file(file).items()}
    assert stored["model.layers.0.mlp.up_proj.weight_packed"].shape == (256, 64 * 5 // 32)
    assert stored["model.layers.1.mlp.up_proj.weight_scale"].shape == (256, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (['slim.quantize.types={"all": "Q4_K"}'], ["int4-g128"]),
        (['slim.quantize.types={"all": "int9-g32"}'], ["int9-g32"]),
        (['slim.quantize.types={"nowhere": "int4-g32"}'], ["No linear matches", "nowhere"]),
        (['slim.quantize.types={"all": "int4-g128"}'], ["groups of 128", "q_proj has 64"]),
        (['slim.quantize.types={"all": "int5-g32"}', "slim.quantize.engine=vllm"], ["vllm does not run", "int5-g32"]),
        (['slim.quantize.types={"q_proj": "int4-g32"}', "slim.quantize.engine=vllm"], ["one linear", "k_proj"]),
        (["slim.quantize.engine=vllm"], ["budget"]),
        (["slim.quantize.engine=vllm", "slim.quantize.gguf_type=Q4_K_M"], ["vllm runs no GGUF file"]),
        (["slim.quantize.engine=vllm", "slim.quantize.symmetric=false"], ["symmetric integers"]),
        (["slim.quantize.engine=vllm", "slim.form=compact"], ["packed form"]),
    ],
)
def test_what_cannot_be_is_said_in_a_line(home, tmp_path, settings, words):
    ran = invoke(*quantized(home, tmp_path / "out", *settings))
    assert ran.code == 2, ran.err
    assert all(word in " ".join(ran.faults) for word in words), ran.faults
    assert not (tmp_path / "out").exists()


def test_a_head_in_few_bits_is_counted(home):
    """What it saves goes to the linears."""
    data = presets.load("auto-packed") | {
        "calibration": {"source": str(home / "text.txt"), "samples": 8, "seq_len": 32}
    }
    data |= {"budget": {"target_size": 250_000, "trials": 2}}
    data["stages"].append({"stage": "quantize_embeddings", "head_bits": 8})
    (home / "head.yaml").write_text(json.dumps(data))
    succeeds("run", home / "head.yaml", "--model", home / "llama", "--out", home / "head")
    types = types_of(home / "head")
    assert types.pop("lm_head") == "int8-channel"  # of 64 inputs
    assert len({*types.values()}) > 1
    assert 0.9 * 250_000 < on_disk(home / "head") <= 250_000
    embeddings = [{"stage": "quantize_embeddings", "embedding_bits": 4}]
    (home / "all.yaml").write_text(json.dumps(data | {"stages": [*data["stages"][:-1], *embeddings]}))
    ran = invoke("run", home / "all.yaml", "--model", home / "llama", "--out", home / "never")
    assert "here they have several. Leave embedding_bits out" in ran.faults[0]
