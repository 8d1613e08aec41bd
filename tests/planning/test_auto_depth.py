"""`compress auto` below what types alone come to: blocks are left out as well, in the same search."""

import json
import shutil

import pytest
import torch

import runs
import tiny
from cli_runner import invoke, succeeds
from compress.calibration.depth import Depth
from compress.calibration.roundings import RoundedModel
from compress.models.gguf_header import read_header
from compress.pipeline import mixture
from searches import auto, prepared_for

pytest.importorskip("gguf")
BLOCKS, IDLE = 4, 1
ENGINES = ("llama.cpp", "vllm")


@pytest.fixture(scope="module", autouse=True)
def proved_here(tmp_path_factory):
    with runs.proved_here(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model of four blocks, of which the second does nothing."""
    folder = tmp_path_factory.mktemp("home")
    model = tiny.tiny_model("llama", dtype=torch.float32, **tiny.IN_BLOCKS, num_hidden_layers=BLOCKS)
    for writer in (model.model.layers[IDLE].self_attn.o_proj, model.model.layers[IDLE].mlp.down_proj):
        torch.nn.init.zeros_(writer.weight)
    model.save_pretrained(folder / "llama")
    tiny.tiny_tokenizer().save_pretrained(folder / "llama")
    tiny.write_text(folder / "text.txt")
    return folder


def space_of(home, engine, dropped=()):
    """What types come to, without some of the blocks."""
    return prepared_for(home, engine, 300_000, home / "planned").without(dropped).types


@pytest.fixture(scope="module")
def sizes(home):
    """For each engine a size that takes two blocks less."""
    return {engine: space_of(home, engine, [IDLE]).least - 1000 for engine in ENGINES}


@pytest.fixture(scope="module")
def written(home, sizes):
    for engine in ENGINES:
        succeeds(*auto(home, "--for", engine, "--target-size", sizes[engine], "--out", home / engine))
    return home


def weights_of(folder):
    return [*folder.glob("*.gguf"), *sorted(folder.glob("*.safetensors"))]


def layers_of(folder):
    if not (folder / "config.json").exists():
        return read_header(weights_of(folder)[0]).fields["llama.block_count"]
    return json.loads((folder / "config.json").read_text())["num_hidden_layers"]


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_go_where_types_alone_do_not_reach_the_size(written, sizes, engine):
    folder, facts = written / engine, json.loads((written / engine / "compress.json").read_text())
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    on_disk = sum(file.stat().st_size for file in weights_of(folder))
    least = min(trials, key=lambda trial: trial["divergence"])["bytes"]
    assert 0.8 * sizes[engine] < on_disk <= least <= sizes[engine]
    assert on_disk == least or engine != "llama.cpp"
    assert IDLE in facts["dropped"]
    assert layers_of(folder) == BLOCKS - len(facts["dropped"]) < BLOCKS - 1
    assert f"- Blocks left out, counted from 0: {', '.join(map(str, facts['dropped']))}." in (
        (folder / "README.md").read_text().splitlines()
    )


def test_the_recipe_repeats_to_the_byte_without_a_search(home, written, tmp_path):
    ran = succeeds("run", written / "vllm", "--model", home / "llama", "--out", tmp_path / "again")
    assert "surveying" not in ran.err
    assert "choosing blocks" not in ran.err
    assert "The same bytes" in ran.out


@pytest.mark.parametrize("engine", ENGINES)
def test_matrices_are_called_as_in_the_dense_model_whatever_is_left_out(home, engine):
    space, dense = space_of(home, engine, [2, 0]), space_of(home, engine)
    assert space.rungs.keys() == {path for path in dense.rungs if not {"0", "2"} & {*path.split(".")}}
    assert space.units == [unit for unit in dense.units if unit[0] in space.rungs]
    assert space.beside < dense.beside


def test_a_stopped_run_goes_on_without_choosing_again(home, written, sizes, tmp_path, monkeypatch):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    again = auto(home, "--for", "vllm", "--target-size", sizes["vllm"], "--out", tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(RoundedModel, "divergence", interrupt)
        assert invoke(*again).code == 130
    monkeypatch.setattr(Depth, "measure", interrupt)
    succeeds(*again, "--resume")
    for file in weights_of(written / "vllm"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_where_types_cost_little_all_blocks_stay_and_none_is_measured(home, tmp_path, monkeypatch):
    monkeypatch.setattr(Depth, "__init__", None)
    size = space_of(home, "vllm").least + 20_000
    succeeds(*auto(home, "--for", "vllm", "--target-size", size, "--out", tmp_path / "out"))
    facts = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert (layers_of(tmp_path / "out"), facts["dropped"]) == (BLOCKS, [])
    assert [stage["stage"] for stage in facts["recipe"]["stages"]] == ["refit", "slim"]
    assert "Blocks left out" not in (tmp_path / "out" / "README.md").read_text()


def test_where_types_cost_more_than_a_block_it_goes(home, tmp_path, monkeypatch):
    """The idle one, though types alone come to the size; no more than two are tried past it."""
    measured, tried = Depth.measure, list[int]()
    monkeypatch.setattr(mixture, "CHEAP", 0.0)
    monkeypatch.setattr(
        Depth, "measure", lambda depth, choices: tried.append(len(choices[0])) or measured(depth, choices)
    )
    size = space_of(home, "vllm").least + 2000
    succeeds(*auto(home, "--for", "vllm", "--target-size", size, "--out", tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "compress.json").read_text())["dropped"] == [IDLE]
    assert tried == [1, 2, 3]
    assert sum(file.stat().st_size for file in weights_of(tmp_path / "out")) <= size


def test_how_many_go_may_be_said(home, tmp_path):
    size = space_of(home, "vllm").least
    succeeds(*auto(home, "--for", "vllm", "--target-size", size, "--drop-blocks", 1, "--out", tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "compress.json").read_text())["dropped"] == [IDLE]
    for options in (["--drop-blocks", 0], ["--drop-blocks", 0, "--dry-run"]):
        ran = invoke(*auto(home, "--for", "vllm", "--target-size", size - 1, *options, "--out", tmp_path / "never"))
        assert (ran.code, len(ran.faults)) == (2, 1)
        assert f"types take it to {size:,} at least" in ran.faults[0]
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_size_that_nothing_comes_to_is_refused_before_the_work(home, tmp_path, engine, options):
    least = space_of(home, engine, range(1, BLOCKS)).least
    for size in (least - 1, "4MB"):
        ran = invoke(*auto(home, "--for", engine, "--target-size", size, *options, "--out", tmp_path / "out"))
        assert (ran.code, len(ran.faults)) == (2, 1), ran.err
        assert f"one block left, take it to {least:,} at least, and it has" in ran.faults[0]
        assert not list(tmp_path.iterdir())
    if options:
        succeeds(*auto(home, "--for", engine, "--target-size", least, *options, "--out", tmp_path / "out"))


def test_a_dry_run_needs_the_config_alone(home, tmp_path):
    """Without a tokenizer the bytes of a GGUF file are not known."""
    (tmp_path / "bare").mkdir()
    shutil.copy(home / "llama" / "config.json", tmp_path / "bare")
    for engine, code in {"llama.cpp": 0, "vllm": 2}.items():
        words = ["auto", "--model", tmp_path / "bare", "--target-size", "10kB", "--for", engine, "--dry-run"]
        assert invoke(*words, "--calib", home / "text.txt").code == code


def test_a_frontier_keeps_all_blocks(home, sizes, tmp_path):
    words = {
        f"{sizes['vllm']}:400kB": ([], "types take it to"),
        "300kB:400kB": (["--drop-blocks", 1], "A frontier keeps all blocks"),
    }
    for between, (options, said) in words.items():
        ran = invoke(*auto(home, "--for", "vllm", "--frontier", between, *options, "--out", tmp_path / "out"))
        assert (ran.code, len(ran.faults)) == (2, 1), ran.err
        assert said in ran.faults[0]
