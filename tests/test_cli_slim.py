"""`compress slim`, as a user types it: amounts, methods, forms, plans, what does not go together, killed runs."""

import json
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from cli_runner import Disturbance, Ran, Request, flat, invoke, run_warm, snapshot, succeeds
from oracles import logits_of, random_ids
from test_cli import LLAMA_2_7B
from test_resume import flip_a_byte, same_files
from tiny import write_model, write_text


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for kind in ("llama", "opt"):
        write_model(home / kind, kind, dtype=torch.float32, num_hidden_layers=1)
    write_text(home / "text.txt", lines=60)
    (home / "7b").mkdir()
    (home / "7b" / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return home


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    """An empty folder to work in. No GPU is seen, and what is written is not reloaded in a process of its own."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("compress.pipeline.verify", lambda *_arguments, **_options: 0.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(home: Path, kind: str, *more: object, verb: str = "slim") -> list[object]:
    text = ["--calib", home / "text.txt", "--samples", 8, "--seq-len", 32]
    return [verb, "--model", home / kind, *text, *more]


def facts(place: Path, said: dict[str, Any]) -> Any:
    return json.loads((place / said["out"] / "compress.json").read_text(encoding="utf-8"))


def stages(place: Path, said: dict[str, Any]) -> dict[str, Any]:
    return {stage["stage"]: stage for stage in facts(place, said)["recipe"]["stages"]}


# What is run.


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_default_is_refitted_by_admm_and_gptq_with_an_adapter_in_rounds(home, place, kind):
    said = succeeds(*words(home, kind, "--json")).json
    assert said["out"] == f"compressed/{kind}-slim-anchored-w4-2-4-r0.1"
    assert said["architecture"] == {"llama": "LlamaForCausalLM", "opt": "OPTForCausalLM"}[kind]
    assert said["loads_without_our_code"] is True
    assert said["held_out_divergence"] > 0
    assert 0 < said["lost_energy"] < 0.2
    found = stages(place, said)
    assert list(found) == ["refit", "slim"]
    slim = found["slim"]
    assert (slim["prune"]["method"], slim["prune"]["pattern"], slim["prune"]["iterations"]) == ("admm", "2:4", 40)
    assert (slim["quantize"]["method"], slim["quantize"]["bits"], slim["quantize"]["symmetric"]) == ("gptq", 4, True)
    assert (slim["adapt"]["method"], slim["adapt"]["rank"], slim["adapt"]["rounds"]) == ("whitened", 0.1, 2)
    assert (slim["polish"], slim["centre"], slim["form"]) == (2, True, "packed")
    assert torch.isfinite(logits_of(compress.load(place / said["out"]), random_ids(1, 16))).all()


def test_the_papers_method(home, place):
    said = succeeds(*words(home, "llama", "--method", "slim", "--json")).json
    assert said["out"] == "compressed/llama-slim-w4-2-4-r0.1"
    assert said["held_out_divergence"] is None
    found = stages(place, said)
    assert list(found) == ["slim"]
    slim = found["slim"]
    assert [slim[part]["method"] for part in ("prune", "quantize", "adapt")] == ["wanda", "slim", "slim"]
    assert (slim["quantize"]["group"], slim["adapt"]["rounds"]) == ("tensor", 1)
    assert (slim["polish"], slim["centre"]) == (0, False)


def test_fast_takes_fewer_iterations_and_one_round(home, place):
    said = succeeds(*words(home, "llama", "--fast", "--json")).json
    slim = stages(place, said)["slim"]
    assert (slim["prune"]["iterations"], slim["adapt"]["rounds"]) == (20, 1)


def test_parts_of_a_method_can_be_changed(home, place):
    parts = ["--pruner", "sparsegpt", "--quantizer", "mse", "--adapter", "naive", "--no-refit", "--group", 16]
    said = succeeds(*words(home, "llama", *parts, "--bits", 3, "--target", "*.down_proj,attention", "--json")).json
    found = stages(place, said)
    assert list(found) == ["slim"]
    slim = found["slim"]
    assert [slim[part]["method"] for part in ("prune", "quantize", "adapt")] == ["sparsegpt", "mse", "naive"]
    assert (slim["quantize"]["bits"], slim["quantize"]["group"], slim["adapt"]["rounds"]) == (3, 16, 1)
    touched = {linear["linear"].split(".")[-1] for linear in facts(place, said)["linears"] if "lost" in linear}
    assert touched == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}


def test_quantize_is_slim_without_sparsity_and_adapters(home, place):
    amounts = ["--bits", 3, "--group", 16, "--act-order"]
    quantized = succeeds(*words(home, "llama", *amounts, "--json", verb="quantize")).json
    slim = succeeds(*words(home, "llama", *amounts, "--sparsity", "none", "--adapter-rank", 0, "--json")).json
    assert quantized["out"] == "compressed/llama-quantize-w3"
    assert stages(place, quantized) == stages(place, slim)
    one, other = (snapshot(place / said["out"]) for said in (quantized, slim))
    weights = [file for file in one if file.endswith(".safetensors")]
    assert weights
    assert all(one[file] == other[file] for file in weights)
    command = facts(place, quantized)["command"]
    assert command.startswith("compress quantize --model llama --bits 3 --group 16 --refit --act-order --target all")


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_branch_whose_writers_inputs_are_kept_is_not_run_again(home, place, monkeypatch, kind):
    """The result is that of running it again, to the bit."""
    weights = []
    for room in (True, False):
        monkeypatch.setattr("compress.streaming.streams.Streams.have_room_for", lambda *_, room=room: room)
        said = succeeds(*words(home, kind, "--out", f"room-{room}", "--json", verb="quantize")).json
        files = snapshot(place / said["out"])
        weights.append({file: content for file, content in files.items() if file.endswith(".safetensors")})
    assert weights[0] == weights[1] != {}


@pytest.mark.parametrize("bits", ["none", "9", "4.5"])
def test_quantize_needs_bits(home, place, bits):
    assert invoke(*words(home, "llama", "--bits", bits, verb="quantize")).faults == [
        f"--bits is 2 to 8 or fp8, got {bits!r}. Try 4."
    ]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--bits", "none"], "llama-slim-anchored-2-4-r0.1"),
        (["--sparsity", "none", "--bits", "fp8"], "llama-slim-anchored-wfp8-r0.1"),
        (["--sparsity", "50%", "--adapter-rank", 0], "llama-slim-anchored-w4-50pc"),
        (["--sparsity", "4:8", "--adapter-rank", 64], "llama-slim-anchored-w4-4-8-r64"),
    ],
)
def test_the_default_output(home, place, options, name):
    assert succeeds(*words(home, "llama", *options, "--dry-run", "--json")).json["out"] == f"compressed/{name}"


AGAIN: dict[str, list[object]] = {
    "fast": ["--fast"],
    "slim": ["--method", "slim", "--sparsity", "none", "--measure-error"],
    "compact": ["--fast", "--compact", "--adapter-bits", 4, "--important-inputs", "--adapter-rank", 4],
    "no refit": ["--fast", "--no-refit", "--asymmetric", "--act-order", "--adapter-rank", 0, "--group", 16],
    "materialized": ["--method", "slim", "--materialize", "--quantizer", "absmax", "--target", "mlp", "--seed", 7],
    "inputs": ["--pruner", "wanda", "--bits", "fp8", "--inputs", "fp8", "--dtype", "bfloat16", "--batch-size", 3],
}


SLOW_AGAIN = ("fast", "slim", "no refit", "materialized")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_AGAIN else name for name in AGAIN]
)
def test_the_command_in_the_card_makes_it_again(name, home, place):
    made = succeeds(*words(home, "llama", *AGAIN[name], "--json")).json
    card = (place / made["out"] / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in card.splitlines() if line.startswith("compress slim ")]
    assert line == facts(place, made)["command"]
    command = shlex.split(line)
    command[command.index("--model") + 1] = str(home / "llama")
    command[command.index("--calib") + 1] = str(home / "text.txt")
    again = succeeds(*command[1:], "--out", "again", "--json").json
    first, second = snapshot(place / made["out"]), snapshot(place / again["out"])
    assert first.keys() == second.keys()
    # Data sets and models are named as they were given, here by absolute paths.
    differing = {file for file in first if first[file] != second[file]}
    assert differing <= {"README.md", "compress.json"}
    assert facts(place, made)["recipe"] == facts(place, again)["recipe"]


# A plan.


def plan_of(home: Path, *options: object) -> Any:
    return succeeds("slim", "--model", home / "7b", *options, "--dry-run", "--json").json


def test_the_plan_of_llama_2_7b(home, place):
    """6,476,005,376 weights in the blocks; ranks of 409 and 409; scales of 128 inputs, two bytes each."""
    plan = plan_of(home)
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    adapter = 32 * 409 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert plan["architecture"] == "LlamaForCausalLM"
    stored = weights // 2 + 2 * weights // 128 + 16 * 7 * 32 + 2 * adapter
    assert plan["size"]["bytes"] == plan["dense"]["bytes"] - 2 * weights + stored
    assert plan["size"]["parameters"] == plan["dense"]["parameters"] + adapter
    first, *others = plan["alternatives"]
    assert first == {"name": "this plan", "bits_per_weight": 8 * stored / weights, "bytes": plan["size"]["bytes"]}
    assert round(first["bits_per_weight"], 2) == 6.65
    assert [each["name"] for each in others] == [
        "6 bits, unpruned",
        "4 bits, unpruned, the same adapter",
        "7 bits, unpruned",
    ]
    assert not list(place.iterdir())


def test_compact_2_4_takes_two_and_three_quarters_bits(home, place):
    plan = plan_of(home, "--compact", "--adapter-rank", 0)
    assert plan["architecture"] == "CompressForCausalLM"
    assert plan["alternatives"][0]["bits_per_weight"] == 2.75 + 16 / 128
    assert plan["size"]["parameters"] < 0.55 * plan["dense"]["parameters"]


def test_materialized_it_is_as_large_as_before(home, place):
    plan = plan_of(home, "--materialize")
    assert plan["size"] == plan["dense"]
    assert plan["alternatives"] == []


def test_a_plan_for_people(home, place):
    table = flat(succeeds("slim", "--model", home / "7b", "--dry-run").out)
    assert "LlamaForCausalLM (stock: no code of ours)" in table
    assert "bits a weight, all counted 6.65" in table
    assert "At about as many bytes" in table
    assert "6 bits, unpruned" in table
    assert "--compact stores them small" in table
    compact = flat(succeeds("slim", "--model", home / "7b", "--compact", "--dry-run").out)
    assert "CompressForCausalLM (ours, its code is carried along)" in compact
    assert "--compact stores them small" not in compact


def test_a_result_for_people(home, place):
    table = flat(succeeds(*words(home, "llama", "--fast")).out)
    for word in (
        "LlamaForCausalLM (stock",
        "bits a weight, all counted",
        "outputs' energy lost, a linear",
        "nats a token",
    ):
        assert word in table
    assert "At about as many bytes" in table
    assert "Ranks" not in table  # an adapter's are no ranks of the model
    assert "widths" not in table


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--adapter-rank", 600], "its adapters have a rank of 512 at most"),
        (["--method", "slim"], "its packed integers have a scale a channel or a group"),
        (["--bits", "fp8", "--group", 128], "its fp8 weights have a scale a channel or a tensor"),
        (["--inputs", "int8"], "it rounds inputs beside 8-bit weights alone"),
        ([], None),
        (["--bits", "none"], None),
        (["--bits", 8, "--inputs", "int8", "--group", "channel"], None),
    ],
)
def test_what_vllm_cannot_serve_is_told(options, reason, home, place):
    said = [note for note in plan_of(home, *options)["notes"] if "vLLM" in note]
    expected = f"vLLM cannot serve this: {reason}. transformers and compress.load run it."
    assert said == ([] if reason is None else [expected])


def test_a_plan_is_what_the_run_then_gives(home, place):
    for options in (["--fast"], ["--fast", "--compact"], ["--fast", "--materialize"]):
        plan = succeeds(*words(home, "llama", *options, "--out", "out", "--dry-run", "--json")).json
        said = succeeds(*words(home, "llama", *options, "--out", "out", "--overwrite", "--json")).json
        assert plan["size"] == {"parameters": said["parameters"], "bytes": said["bytes"]}
        assert plan["alternatives"] == said["alternatives"]
        assert plan["loads_without_our_code"] == said["loads_without_our_code"]
        written = sum(file.stat().st_size for file in (place / "out").rglob("*.*"))
        assert said["bytes"] < written <= plan["disk_bytes"] + 2**17  # the tokenizer


# What the card says.


def card_of(home: Path, place: Path, *options: object) -> str:
    said = succeeds(*words(home, "llama", "--method", "slim", *options, "--json")).json
    return (place / said["out"] / "README.md").read_text(encoding="utf-8")


def test_the_card_of_a_model_with_an_adapter(home, place):
    card = card_of(home, place, "--group", "channel", "--adapter-rank", 5)
    assert "vllm serve PATH --enable-lora --lora-modules corrected=PATH/adapter --max-lora-rank 8" in card
    assert "PeftModel.from_pretrained" in card
    assert 'compress.load("PATH")' in card
    assert "| this plan | " in card


def test_the_card_of_a_model_without(home, place):
    card = card_of(home, place, "--group", "channel", "--adapter-rank", 0)
    assert "PeftModel" not in card
    assert "--enable-lora" not in card
    assert "transformers needs compressed-tensors." in card
    assert "\nvllm serve PATH\n" in card


def test_the_card_of_what_vllm_cannot_serve(home, place):
    card = card_of(home, place)
    assert "vLLM cannot serve it: its packed integers have a scale a channel or a group." in card
    assert "vllm serve" not in card


def test_the_card_of_a_compact_model(home, place):
    card = card_of(home, place, "--compact")
    assert "import compress" in card
    assert "trust_remote_code=True" in card
    assert "vLLM cannot serve it: it has no " in card


# What does not go together.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", 1], "--bits is 2 to 8, fp8 or none, got '1'. Try 4."),
        (["--bits", "int4"], "got 'int4'. Try 4."),
        (["--sparsity", "2:2"], "a pattern is keep:group such as 2:4"),
        (["--sparsity", "half"], "got 'half'"),
        (["--sparsity", "100%"], "got '100%'"),
        (["--sparsity", "3:5"], "3:5 takes inputs in groups of 5, but self_attn.q_proj has 32"),
        (["--group", "rows"], "--group is tensor, channel or a number of inputs, got 'rows'. Try 128."),
        (["--group", 1], "--group is tensor, channel or a number of inputs, got '1'. Try 128."),
        (["--group", 24], "A scale takes inputs in groups of 24, but self_attn.q_proj has 32"),
        (["--adapter-rank", 1.5], "--adapter-rank is a share below 1 or a whole number, got 1.5. Try 0.1 or 64."),
        (["--bits", "none", "--sparsity", "none"], "nothing gets smaller. Give one of them."),
        (["--compact", "--materialize"], "are two ways to store it. Leave one out."),
        (["--method", "slim", "--fast"], "--fast is an option of --method anchored. Leave it out."),
        (["--adapter-rank", 0, "--adapter", "slim"], "--adapter has no effect with --adapter-rank 0. Leave one out."),
        (["--adapter-rank", 0, "--adapter-bits", 4], "--adapter-bits has no effect with --adapter-rank 0."),
        (["--sparsity", "none", "--pruner", "wanda"], "--pruner has no effect with --sparsity none. Leave one out."),
        (["--bits", "none", "--quantizer", "mse"], "--quantizer has no effect with --bits none. Leave one out."),
        (["--bits", "none", "--group", 16], "--group has no effect with --bits none. Leave one out."),
        (["--bits", "none", "--asymmetric"], "--asymmetric has no effect with --bits none. Leave one out."),
        (["--bits", "none", "--act-order"], "--act-order has no effect with --bits none. Leave one out."),
        (["--bits", "none", "--important-inputs"], "--important-inputs has no effect with --bits none."),
        (["--method", "slim", "--adapter", "anchored"], "--adapter anchored is fitted towards the dense model"),
        (["--adapter", "anchored", "--no-refit"], "it needs --refit."),
        (["--inputs", "int8", "--bits", "fp8"], "inputs int8 does not fit the weights; it is int8 beside integers"),
        (["--inputs", "fp8"], "inputs fp8 does not fit the weights"),
        (["--inputs", "int8", "--bits", "none"], "inputs int8 does not fit the weights"),
        (["--inputs", "int8", "--compact"], "goes with packed form, not compact; leave inputs out or take packed"),
        (["--inputs", "int8", "--materialize"], "goes with packed form, not dense"),
        (["--compact", "--bits", "fp8"], "compact form holds integers, not fp8; take bits: 8 or packed form"),
        (["--compact", "--asymmetric"], "leave asymmetric out or take packed form"),
        (["--compact", "--sparsity", "50%"], "prune 2:4 or take packed form"),
        (["--important-inputs"], "important_inputs has no room in packed form; take compact form, or dense"),
        (["--adapter-bits", 4], "adapters in few bits are for compact form; leave their bits out or take compact"),
        (["--quantizer", "mse", "--act-order"], "act_order is of method gptq, not of mse"),
        (["--quantizer", "slim", "--asymmetric"], "slim looks for symmetric grids; take absmax, mse or gptq"),
        (["--important-inputs", "--asymmetric", "--materialize"], "important_inputs goes with symmetric grids"),
        (["--bits", "fp8", "--asymmetric"], "fp8 is symmetric, in 8 bits, by absmax, mse or gptq"),
        (["--bits", "fp8", "--quantizer", "slim"], "fp8 is symmetric, in 8 bits"),
        (["--target", "experts"], "No linear matches the target 'experts'. There are mlp.down_proj"),
        (["--samples", 1], "it needs 2 samples at least"),
    ],
)
def test_what_does_not_go_together(home, place, options, said):
    ran = invoke(*words(home, "llama", *options))
    assert ran.code == 2
    assert len(ran.faults) == 1, ran.faults
    assert ran.err == f"error: {ran.faults[0]}\n"
    assert said in ran.faults[0]
    assert not list(place.iterdir())


@pytest.mark.parametrize("options", [["--adapter-rank", -1], ["--adapter-bits", 9], ["--method", "slimmer"]])
def test_values_that_an_option_cannot_have(home, place, options):
    ran = invoke(*words(home, "llama", *options))
    assert ran.code == 2
    assert f"'{options[0]}'" in flat(ran.err)


def test_all_faults_at_once(home, place):
    """Of the options first; of what they mean for the model, the output and the text together."""
    options = ["--bits", "9", "--dtype", "int8", "--cache-memory", "much", "--device", "gpu"]
    ran = invoke(*words(home, "llama", *options))
    assert ran.code == 2
    assert len(ran.faults) == 4
    (place / "out").mkdir()
    options = ["--sparsity", "3:5", "--group", "24", "--target", "mlp,experts", "--out", "out", "--seq-len", "100"]
    ran = invoke(*words(home, "llama", *options))
    assert ran.code == 2
    text = "\n".join(ran.faults)
    for word in ("3:5", "groups of 24", "'experts'", "--overwrite", "--seq-len 64"):
        assert word in text
    assert len(ran.faults) == 5


def test_more_than_one_rule_is_broken_at_once(home, place):
    ran = invoke(*words(home, "llama", "--compact", "--asymmetric", "--sparsity", "50%", "--inputs", "int8"))
    assert ran.code == 2
    (fault,) = ran.faults
    for word in ("inputs int8", "symmetric", "no shares"):
        assert word in fault


def test_a_nan_names_its_weight(home, place):
    from test_bad_input import poison

    shutil.copytree(home / "llama", place / "llama")
    poison(place / "llama", "model.layers.0.mlp.up_proj.weight", float("nan"))
    ran = invoke(*words(place, "llama", "--fast", "--calib", home / "text.txt", "--out", "out"))
    assert ran.code == 1
    (fault,) = ran.faults
    assert "'model.layers.0.mlp.up_proj.weight' has a NaN or Inf" in fault
    assert not (place / "out").exists()


@pytest.mark.parametrize("command", ["slim", "lord --rank 4", "slice --ratio 0.25"])
@pytest.mark.parametrize(("options", "said"), [([], "is quantized already"), (["--bits", "none"], "has an adapter")])
def test_what_has_been_stored_so_is_not_compressed_again(command, options, said, home, place):
    """Without its codes a weight cannot be read, and without its adapter it is not what it stands for."""
    succeeds(*words(home, "llama", "--method", "slim", *options, "--out", "stored"))
    text = ["--calib", home / "text.txt", "--samples", 8, "--seq-len", 32, "--out", "out"]
    for more in ([], ["--dry-run"]):
        ran = invoke(*command.split(), "--model", "stored", *text, *more)
        assert ran.code == 3
        (fault,) = ran.faults
        assert said in fault
        assert "Compress the dense model instead." in fault
    assert not (place / "out").exists()


# Runs that are killed.

NUM_PARTS = 3
PARTIAL = "out.partial"
RUN = shlex.split(
    "slim --model ../tiny --calib ../text.txt --samples 4 --seq-len 32 --device cpu --out out --json --fast"
)
RECORD = "compress.checkpoints.run_folder:RunFolder.record"
MOMENTS = {
    **{f"part {part}": Disturbance(RECORD, call=part, after=True) for part in range(1, NUM_PARTS + 1)},
    # Of embeddings a part and its state are written, of the first block a part, its share of the adapter and a state.
    "half an adapter part": Disturbance("compress.io:save_file", call=4, kind="tear"),
    "no adapter yet": Disturbance("compress.pipeline:write_adapter"),
    "an unfinished adapter": Disturbance("compress.checkpoints.adapter:join", after=True),
    "an adapter": Disturbance("compress.pipeline:write_adapter", after=True),
    "not yet named": Disturbance("compress.checkpoints.run_folder:publish"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    write_model(root / "tiny", "opt", dtype=torch.float32, num_hidden_layers=1)
    write_text(root / "text.txt", lines=60)
    return root


def run_in(folder: Path, *more: str, disturbance: Disturbance | None = None) -> Ran:
    folder.mkdir(exist_ok=True)
    return run_warm([Request((*RUN, *more), str(folder), disturbance)])[0]


@pytest.fixture(scope="module")
def undisturbed(root):
    ran = run_in(root / "undisturbed")
    assert ran.code == 0, ran.err
    return snapshot(root / "undisturbed")


@pytest.fixture(scope="module")
def killed(root):
    folders = {name: root / name for name in MOMENTS}
    for folder in folders.values():
        folder.mkdir()
    requests = [Request(RUN, str(folders[name]), moment) for name, moment in MOMENTS.items()]
    ran = run_warm(requests)
    shutil.copytree(root / "part 2", root / "damaged")
    shutil.copytree(root / "part 2", root / "other")
    resumed = run_warm([Request((*RUN, "--resume"), str(folder)) for folder in folders.values()])
    return {name: (first, second) for name, first, second in zip(MOMENTS, ran, resumed, strict=True)}


def test_nothing_is_left_over_in_the_finished_folder(undisturbed):
    names = {name.removeprefix("out/") for name in undisturbed} - {"out"}
    assert {name for name in names if "adapter" in name} == {
        "adapter",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert not [name for name in names if name.startswith(("state", "finding", "run.json", "lock"))]
    assert not [name for name in names if "unfinished" in name]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bytes(root, undisturbed, killed, moment):
    first, second = killed[moment]
    assert first.code == -signal.SIGKILL
    assert second.code == 0, second.err
    same_files(root / moment, undisturbed)
    if moment.startswith("part"):
        assert f"part {second.json['resumed_parts']}" == moment


def test_a_damaged_share_of_the_adapter_is_made_again(root, undisturbed, killed):
    flip_a_byte(root / "damaged" / PARTIAL / "adapter-00002.safetensors")
    resumed = run_in(root / "damaged", "--resume")
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed_parts"] < 2
    same_files(root / "damaged", undisturbed)


@pytest.mark.parametrize("option", [("--bits", "3"), ("--adapter-rank", "0"), ("--compact",), ("--sparsity", "4:8")])
def test_another_run_does_not_go_on_with_it(root, killed, option):
    before = snapshot(root / "other")
    ran = run_in(root / "other", "--resume", *option)
    assert ran.code == 2
    (fault,) = ran.faults
    assert "another recipe" in fault
    assert snapshot(root / "other") == before
