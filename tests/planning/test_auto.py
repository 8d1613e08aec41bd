"""`compress auto`: bytes that are never exceeded, types by what they cost, trials, frontiers, and what is refused."""

import json
import math

import pytest
import torch

import tiny
from cli_runner import invoke, succeeds
from compress.models.loading import load_model
from compress.numerics.functional import kl_divergence
from compress.pipeline import mixture
from compress.planning.prepare import new_rounded_model, take_survey
from compress.planning.types import DENSE, TypeSearch, TypeSpace, improved
from searches import auto, prepared_for

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def home(home):
    tiny.write_model(home / "tied", "qwen2", dtype=torch.float32, **tiny.IN_BLOCKS, vocab_size=264)
    return home


@pytest.fixture(scope="module")
def prepared(home, tmp_path_factory):
    """A job whose dense model has been surveyed."""
    found = prepared_for(home, "llama.cpp", 200_000, tmp_path_factory.mktemp("out") / "x")
    found.job.partial.mkdir()
    survey = take_survey(found, lambda _name: None)
    return found, survey


@pytest.fixture(scope="module")
def written(home):
    """At 200 kB."""
    succeeds(*auto(home, "--target-size", "200kB", "--out", home / "out"))
    return home / "out"


def test_a_file_is_as_large_as_planned_and_never_larger_than_asked(home, written, tmp_path):
    succeeds(*auto(home, "--target-size", 150_001, "--out", tmp_path / "out", model="tied"))
    for folder, size in ((written, 200_000), (tmp_path / "out", 150_001)):
        on_disk = (folder / "out.gguf").stat().st_size
        trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
        least = min(trials, key=lambda trial: trial["divergence"])
        assert 0.9 * size < on_disk == least["bytes"] <= size


def test_what_is_predicted_is_taken_where_no_trials_are_asked_for(home, tmp_path, monkeypatch):
    monkeypatch.delattr(mixture, "new_rounded_model")
    words = auto(home, "--target-size", "200kB", "--out", tmp_path / "out")
    place = words.index("--trials")
    succeeds(*words[:place], *words[place + 2 :])
    assert 180_000 < (tmp_path / "out" / "out.gguf").stat().st_size <= 200_000
    assert not (tmp_path / "out" / "trials.jsonl").exists()


def test_the_least_that_is_told_can_be_reached(prepared):
    found, survey = prepared
    search = TypeSearch.of(found.types, survey.roundings)
    assert found.types.bytes_of(search.allocated(found.types.least)) == found.types.least
    assert search.predicted({}) == 0.0
    assert found.types.bytes_of({}) == found.types.most


def test_predicted_costs_are_near_the_measured_ones(prepared):
    """Of single matrices in their smallest type, measured by the stock model with that matrix in its place."""
    found, survey = prepared
    search, model = TypeSearch.of(found.types, survey.roundings), new_rounded_model(found, survey)
    for path in ("model.layers.0.mlp.up_proj", "model.layers.2.self_attn.o_proj", "model.embed_tokens", "lm_head"):
        name = next(iter(search.costs[path]))
        assert model.divergence({path: name}) == pytest.approx(search.costs[path][name], rel=0.6)


def test_the_measured_divergence_is_the_stock_models(prepared, home):
    found, survey = prepared
    model = new_rounded_model(found, survey)
    chosen = {"model.layers.1.mlp.down_proj": "Q2_K", "lm_head": "IQ4_NL", "model.embed_tokens": "Q4_1"}
    measured = model.divergence(chosen)
    stock = load_model(home / "llama", dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.cat([batch.ids for batch in model.streams.batches])
    with torch.no_grad():
        dense = stock(ids).logits
        for path, name in chosen.items():
            weight = stock.get_submodule(path).weight
            weight.copy_(model._rounded(path, name, weight))
        expected = float(kl_divergence(dense, stock(ids).logits).mean())
    assert measured == pytest.approx(expected, rel=1e-3)


def test_a_trial_begins_where_its_types_differ(prepared):
    found, survey = prepared
    model = new_rounded_model(found, survey)
    first = {"model.layers.1.mlp.down_proj": "Q2_K"}
    model.divergence(first)
    model.keep()
    kept = model.inputs[:]
    second = {**first, "model.layers.2.mlp.down_proj": "Q2_K"}
    later = model.divergence(second)
    assert all(one is other for one, other in zip(model.tried[1][:3], kept[:3], strict=True))
    assert model.tried[1][3] is not kept[3]
    assert later == pytest.approx(new_rounded_model(found, survey).divergence(second), rel=1e-9)


def space_of(count=12):
    rungs = {f"blocks.{n // 2}.{'up' if n % 2 else 'down'}": {"A": 10, "B": 20, DENSE: 40} for n in range(count)}
    return TypeSpace(rungs, beside=5, tables=frozenset())


def test_trials_find_what_the_prediction_gets_wrong():
    space = space_of()
    costs = {path: {"A": 4.0, "B": 1.0, DENSE: 0.0} for path in space.rungs}

    def truth(chosen):
        factor = {"up": 9.0, "down": 1.0}
        return sum(factor[path.rpartition(".")[2]] * costs[path][chosen.get(path, DENSE)] for path in costs)

    left, asked = [30], []

    def measure(_search, chosen, _was_best):
        if not left[0]:
            return None
        left[0] -= 1
        asked.append(chosen)
        return truth(chosen)

    search, chosen = improved(TypeSearch(space, costs), 205, measure)
    assert truth(chosen) == min(map(truth, asked)) < truth(asked[0])
    assert space.bytes_of(chosen) <= 205
    assert search.factors.get("up", 1.0) > search.factors.get("down", 1.0)
    assert len({json.dumps(each, sort_keys=True) for each in asked}) == len(asked)
    assert math.isfinite(search.scale)


def test_a_resumed_run_repeats_no_trial_and_gives_the_same_bytes(home, written, tmp_path, monkeypatch):
    from compress.calibration.roundings import RoundedModel

    expected, log = (written / "out.gguf").read_bytes(), (written / "trials.jsonl").read_text()
    assert len(log.splitlines()) >= 2
    measured, fail = RoundedModel.divergence, [1]
    calls = []

    def interrupted(model, chosen):
        calls.append(chosen)
        if len(calls) > fail[0]:
            raise KeyboardInterrupt
        return measured(model, chosen)

    monkeypatch.setattr(RoundedModel, "divergence", interrupted)
    again = auto(home, "--target-size", "200kB", "--out", tmp_path / "again")
    assert invoke(*again).code == 130
    assert len(calls) == 2
    calls.clear()
    fail[0] = 99
    succeeds(*again, "--resume")
    assert len(calls) == len(log.splitlines()) - 1
    assert (tmp_path / "again" / "again.gguf").read_bytes() == expected
    assert (tmp_path / "again" / "trials.jsonl").read_text() == log


def test_the_recipe_repeats_to_the_byte_without_a_search(home, written, tmp_path):
    assert json.loads((written / "compress.json").read_text())["recipe"]["budget"] is None
    ran = succeeds("run", written, "--model", home / "llama", "--out", tmp_path / "again")
    assert "surveying" not in ran.err
    assert "The same bytes" in ran.out
    assert (written / "out.gguf").read_bytes() == (tmp_path / "again" / "again.gguf").read_bytes()


def test_the_file_has_the_types_that_the_card_tells_of(written):
    tensors = gguf.GGUFReader(written / "out.gguf").tensors
    queries = [tensor.tensor_type.name for tensor in tensors if "attn_q" in tensor.name]
    card = (written / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| `q_proj`"))
    assert all(f"{name} x {queries.count(name)}" in row for name in queries)


def test_a_frontier_is_found_once_and_any_point_written_later(home, tmp_path):
    found = succeeds(*auto(home, "--frontier", "140kB:500kB", "--out", tmp_path / "map", "--json")).json
    assert len(found["points"]) == 12
    assert [point["bytes"] for point in found["points"]] == sorted(point["bytes"] for point in found["points"])
    predicted = [point["predicted"] for point in found["points"]]
    assert predicted == sorted(predicted, reverse=True)
    assert len([point for point in found["points"] if point["measured"] is not None]) == 3
    assert {"frontier.json", "trials.jsonl"} <= {file.name for file in (tmp_path / "map").iterdir()}
    words = ["auto", "--from", tmp_path / "map", "--model", home / "llama", "--target-size"]
    ran = succeeds(*words, "180kB", "--out", tmp_path / "out")
    assert "surveying" not in ran.err
    assert (tmp_path / "out" / "out.gguf").stat().st_size <= 180_000
    told = json.loads((tmp_path / "out" / "compress.json").read_text())["trials"]
    assert [(trial["bytes"], trial["divergence"]) for trial in told] == [
        (point["bytes"], point["measured"]) for point in found["points"]
    ]
    succeeds("report", tmp_path / "out")
    assert "The search" in (tmp_path / "out" / "report.html").read_text()
    for options in (["--model", home / "tied"], ["--for", "vllm"]):
        other = invoke(*words, "180kB", *options, "--out", tmp_path / "never")
        assert (other.code, len(other.faults)) == (2, 1), other.err
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--target-size 88MB", "--frontier 40MB:120MB"]),
        (["--target-size", "200kB", "--frontier", "1MB:2MB"], ["one of the three"]),
        (["--frontier", "2MB:1MB"], ["the smaller one first"]),
        (["--target-size", "many"], ["--target-size takes a size"]),
        (["--target-size", "200kB", "--from", "nowhere"], ["frontier.json"]),
        (["--frontier", "1kB:200kB"], ["at least"]),
        (["--target-size", "200kB", "--set", 'slim.quantize.types={"model.x": "Q8_0"}'], ["budget"]),
    ],
)
def test_what_cannot_be_is_said_in_a_line(home, tmp_path, options, words):
    ran = invoke(*auto(home, "--out", tmp_path / "out", *options))
    assert (ran.code, len(ran.faults)) == (2, 1), ran.err
    assert all(word in ran.faults[0] for word in words), ran.faults
    assert not (tmp_path / "out").exists()


def test_types_that_a_recipe_gives_are_checked(home, written, tmp_path):
    facts = json.loads((written / "compress.json").read_text())
    facts["recipe"]["stages"][1]["quantize"]["types"]["model.layers.0.self_attn.q_proj"] = "Q4_K"
    (tmp_path / "changed.json").write_text(json.dumps(facts))
    ran = invoke("run", tmp_path / "changed.json", "--model", home / "llama", "--out", tmp_path / "never")
    assert (ran.code, len(ran.faults)) == (2, 1)
    assert "no whole blocks of Q4_K" in ran.faults[0]


FRONTIER = {
    **{"format": 1, "base_model": "x", "model": "x", "recipe": {"method": "auto", "stages": [], "calibration": {}}},
    **{"costs": {"a": {"Q8_0": 1.0, "dense": 0.0}}, "factors": {}, "scale": 1.0, "points": []},
}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["damaged"]),
        (json.dumps({**FRONTIER, "costs": 3}), ["damaged", "costs"]),
        (json.dumps({**FRONTIER, "factors": {"q_proj": -1.0}}), ["damaged"]),
        (json.dumps({**FRONTIER, "format": 2}), ["another version"]),
        (json.dumps({**FRONTIER, "recipe": {"budget": 3}}), ["budget"]),
        (json.dumps(FRONTIER), ["stage"]),
    ],
)
def test_a_spoiled_frontier_is_a_message(home, tmp_path, text, words):
    (tmp_path / "map").mkdir()
    (tmp_path / "map" / "frontier.json").write_text(text)
    ran = invoke(*auto(home, "--from", tmp_path / "map", "--target-size", "200kB", "--out", tmp_path / "out"))
    assert ran.code in (1, 2)
    assert all(word in " ".join(ran.faults) for word in words), ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", [{"keep_params": 0.5}, {"target_size": 200_000}])
def test_a_budget_of_types_is_of_bytes_and_of_the_dense_models_matrices(home, tmp_path, budget):
    stages = [{"stage": "slim", "form": "gguf", "quantize": {"gguf_type": "auto"}}]
    if "target_size" in budget:
        stages = [{"stage": "factorize", "rank_frac": 0.5, "form": "dense"}, *stages]
    recipe = {"method": "x", "stages": stages, "budget": budget}
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": recipe}))
    options = ["--model", home / "llama", "--calib", home / "text.txt", "--samples", 8, "--seq-len", 32]
    ran = invoke("run", tmp_path / "recipe.json", *options, "--out", tmp_path / "never")
    assert (ran.code, len(ran.faults)) == (2, 1), ran.err
    assert ("two recipes" if "target_size" in budget else "target_size") in ran.faults[0]


def test_trials_of_types_are_for_types(home, tmp_path):
    words = ["slice", "--model", home / "llama", "--keep-params", 0.7, "--set", "budget.trials=5", "--dry-run"]
    ran = invoke(*words, "--calib", home / "text.txt", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "trials is for types of matrices" in ran.faults[0]
