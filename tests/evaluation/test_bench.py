"""Speed, memory and size beside the dense model's: what is measured is what is said, and in turns."""

import json
import signal
import subprocess
from typing import Any

import pytest
import torch
from torch import nn

import compress  # noqa: F401 (registers the architecture)
import tiny
from compress.errors import CheckpointError, UsageError
from compress.evaluation import bench, speed
from compress.evaluation import footprint as took
from compress.evaluation.bench import Asked, Named, measure
from compress.evaluation.speed import Decoding, Workload, compare_generation, compared, matched
from compress.models.storage import Form, empty_linear, linears_of
from compress.models.stored_loading import open_model
from compress.numerics.sparsity import Pattern
from compress.own_model.modeling_compress import LowRankLinear, PivotLinear
from stored import on_linux, storage_of, write_compact, write_packed

CPU = torch.device("cpu")
IDS = torch.randint(3, tiny.VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))
NEW = 6


def test_both_run_in_turns_after_one_round_that_is_not_counted_and_a_speedup_is_of_pairs():
    """A machine that is twice as slow in one round is so for both."""
    order: list[str] = []
    dense, small = (lambda: order.append("d") or f"d{len(order)}"), (lambda: order.append("c") or f"c{len(order)}")
    pairs = speed.in_turns(dense, small, 3)
    assert order == ["d", "c", "d", "c", "c", "d", "d", "c"]
    assert pairs == [("d3", "c4"), ("d6", "c5"), ("d7", "c8")]
    found = compared([(1.0, 0.5), (10.0, 5.0), (100.0, 50.0)], tokens=20)
    assert found["speedup"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert found["seconds"]["dense"] == {"median": 10.0, "low": 5.5, "high": 55.0}
    assert found["tokens_per_second"]["dense"] == {"median": 2.0, "low": 20 / 55, "high": 20 / 5.5}


def greedy(decoding: Decoding, steps: int) -> torch.Tensor:
    """What it decodes after the prompt."""
    with torch.inference_mode():
        decoding.prefill()
        tokens = [decoding.token.clone()]
        for _ in range(steps):
            decoding.step()
            tokens.append(decoding.token.clone())
    return torch.cat(tokens, dim=1)


def generated(model: Any, steps: int) -> torch.Tensor:
    """By transformers, which stops for nothing."""
    model.generation_config.eos_token_id = None
    whole = model.generate(IDS, max_new_tokens=steps + 1, do_sample=False, pad_token_id=2)
    return whole[:, IDS.shape[1] :]


@pytest.mark.parametrize("model_type", ["opt", "mistral"])
def test_decoding_is_what_transformers_generates(model_type):
    """And again from the start."""
    model = tiny.tiny_model(model_type)
    expected = generated(model, NEW)
    decoding = Decoding(model, IDS)
    assert torch.equal(greedy(decoding, NEW), expected)
    assert torch.equal(greedy(decoding, NEW), expected)


def test_prefill_and_decoding_are_timed_each_for_itself(monkeypatch):
    """The prompt's pass is one call, decoding as many as there are new tokens."""
    calls: list[int] = []
    model = tiny.tiny_model("llama")
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    taken: list[int] = []

    def counting(work: Any) -> float:
        before = len(calls)
        work()
        taken.append(len(calls) - before)
        return float(taken[-1])

    monkeypatch.setattr(speed, "seconds", counting)
    speeds = compare_generation(model, model, Workload(2, 5, 3), rounds=1)
    assert taken == [1, 3] * 4
    assert speeds["prefill"] == compared([(1.0, 1.0)], 2 * 5)
    assert speeds["decode"] == compared([(3.0, 3.0)], 2 * 3)


def test_a_workload_without_room_is_none(monkeypatch):
    model = tiny.tiny_model("llama")
    load = Workload(2, 5, 3)
    monkeypatch.setattr(speed, "free_bytes", lambda device: 1000)
    assert compare_generation(model, model, load, rounds=1)["decode"] is None
    monkeypatch.undo()

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed, "in_turns", no_memory)
    assert compare_generation(model, model, load, rounds=1)["prefill"] is None


def test_bytes_on_disk_and_in_memory(tmp_path):
    tiny.write_model(tmp_path / "dense", "llama", dtype=torch.float32)
    write_packed(tmp_path / "packed", storage_of("packed", 4, rank=2))
    for name in ("dense", "packed"):
        folder = tmp_path / name
        files = [file.stat().st_size for file in folder.rglob("*.safetensors")]
        assert took.bytes_on_disk(folder) == sum(files)
        # Headers besides; loaded in half the bits, floats take half the bytes and codes as many.
        in_memory = took.bytes_in_memory(folder, torch.float32)
        assert 0.8 * sum(files) < in_memory < sum(files)
        assert took.bytes_in_memory(folder, torch.bfloat16) < in_memory
    dense = tmp_path / "dense"
    assert took.bytes_in_memory(dense, torch.bfloat16) * 2 == took.bytes_in_memory(dense, torch.float32)


@on_linux
def test_the_footprint_of_a_clean_process(tmp_path):
    """The peak while loading is at least the weights, mapped as they are, and the libraries are known apart."""
    tiny.write_model(tmp_path, "llama", dtype=torch.float32, vocab_size=150_000, shard_size="1GB")
    size = took.bytes_in_memory(tmp_path, torch.float32)
    assert size > 35e6
    found = took.footprint(tmp_path, Workload(1, 4, 2), dtype=torch.float32, device=CPU)
    assert found["disk"] == took.bytes_on_disk(tmp_path)
    assert 0.9 * size < found["loading"] - found["before"] < 4 * size
    assert found["running"] >= found["loading"]
    assert 0 < found["load"]["low"] <= found["load"]["high"]


def ended(code: int, out: str = "", err: str = "") -> Any:
    return lambda *_, **__: subprocess.CompletedProcess([], code, out, err)


@pytest.mark.parametrize(
    ("process", "error", "said"),
    [
        (ended(0, '{"problem": "The config.json is damaged."}\n'), CheckpointError, r"^The config.json is damaged\.$"),
        (ended(0, '{"problem": null}\n'), UsageError, "does not fit into the memory of cpu. Try --dtype bfloat16"),
        (ended(-signal.SIGKILL), UsageError, "does not fit into the memory of cpu"),
        (ended(1, "", "Traceback\nValueError: odd\n"), CheckpointError, "process of its own: ValueError: odd$"),
    ],
)
def test_a_model_that_does_not_load_in_the_clean_process(process, error, said, tmp_path, monkeypatch):
    tiny.write_model(tmp_path, "llama", dtype=torch.float32)
    monkeypatch.setattr(subprocess, "run", process)
    with pytest.raises(error, match=said):
        took.footprint(tmp_path, Workload(1, 4, 2), dtype=torch.float32, device=CPU)


STORAGES = {
    "packed": storage_of("packed", 4, rank=3),
    "eight bits": storage_of("packed", 8, type="float", input_activations="fp8"),
    "compact": storage_of("compact", 4, pattern=Pattern.parse("2:4"), rank=2),
}
FORMS = {
    "packed": {"kind": "packed", "bits": 4, "rank": 3},
    "eight bits": {"kind": "bytes", "bits": 8},
    "compact": {"kind": "compact", "bits": 4, "pattern": "2:4", "rank": 2},
}


@pytest.mark.parametrize("name", STORAGES)
def test_every_linear_stands_beside_what_is_in_its_place(name, tmp_path):
    dense = tiny.tiny_model("llama", dtype=torch.float32)
    write = write_compact if STORAGES[name].form == "compact" else write_packed
    write(tmp_path / "stored", STORAGES[name])
    (tmp_path / "stored" / "compress.json").write_text("{}")
    stored = open_model(tmp_path / "stored", dtype=torch.float32, device=CPU)
    found = matched(dense, stored)
    assert (found.missing, found.added) == ([], [])
    places = {place.name: place for place in found.places}
    assert list(places) == [*(f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")), "lm_head"]
    assert places["down_proj"].forms == (
        Form("dense", tiny.HIDDEN, 48),
        [Form(m=tiny.HIDDEN, n=48, **FORMS[name])] * tiny.NUM_BLOCKS,
    )
    assert places["lm_head"].forms[1] == [Form("dense", tiny.VOCAB_SIZE, tiny.HIDDEN)]


def test_factors_are_one_linear_and_what_has_no_counterpart_is_named():
    dense = nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Linear(8, 6), "c": nn.Linear(6, 6)})
    inner = nn.ModuleDict({"a": LowRankLinear(8, 6, 3, True), "b": PivotLinear(8, 6, 2, True), "d": nn.Linear(6, 6)})
    inner["b"].first = empty_linear(storage_of("packed", 4), 8, 2, bias=True, dtype=torch.float32)
    found = matched(dense, inner)
    assert [place.forms[1] for place in found.places] == [
        [Form("factors", 6, 8, rank=3)],
        [Form("pivot, packed", 6, 8, bits=4, rank=2)],
    ]
    assert (found.missing, found.added) == (["c"], ["d"])
    assert [path for path, _ in linears_of(inner)] == ["a", "b", "d"]


def test_all_of_it_is_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "footprint", lambda *_, **__: {"disk": 1})
    heard: list[tuple[str, str, float, int]] = []
    asked = Asked(workloads=[Workload(1, 6, 2)], rounds=2, dtype=torch.float32, device=CPU, tokens=[1, 4])
    tiny.write_model(tmp_path / "dense", "llama", dtype=torch.float32)
    write_packed(tmp_path / "packed", storage_of("packed", 4))
    (tmp_path / "packed" / "compress.json").write_text("{}")
    named = Named("dense", tmp_path / "dense"), Named("packed", tmp_path / "packed")
    found = measure(*named, asked, lambda *step: heard.append(step))
    entry = json.loads(json.dumps(found))
    assert entry["compressed"]["parameters"] == entry["dense"]["parameters"]
    (generated_entry,) = entry["generation"]
    prefill = generated_entry["prefill"]
    rate = prefill["tokens_per_second"]["dense"]["median"]
    assert rate == pytest.approx(6 / prefill["seconds"]["dense"]["median"])
    assert len(entry["linears"]) == 8 * 2
    assert entry["memory_at"] == {"batch": 1, "prompt": 6, "new": 2}
    assert "28" not in entry["notes"][0]
    assert "unpacked at every call: 21 because the dtype is float32" in entry["notes"][0]
    done = [number for _, _, number, _ in heard]
    assert done == sorted(done)
    assert heard[-1][2] == heard[-1][3] == 4 + 1 + 16
    monkeypatch.setattr(bench, "free_bytes", lambda device: 200_000)
    with pytest.raises(UsageError, match=r"dense \(.* packed \(.* of which 0.0 GB are free. Try --dtype bfloat16"):
        measure(*named, asked)
