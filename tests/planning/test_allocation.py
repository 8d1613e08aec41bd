"""Neurons allocated to blocks by what the loss feels: numbers, the architecture that holds them, what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress  # noqa: F401 (registers the architecture)
from cli_runner import succeeds
from compress import families
from compress.calibration.survey import Survey
from compress.numerics.frames import Frame
from compress.planning import search
from compress.planning.search import Cost, Forecast
from compress.stages.groups import PruneUnits
from tiny import NUM_BLOCKS, write_model, write_text

KINDS = ["opt", "llama"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for kind in KINDS:
        write_model(home / kind, kind, dtype=torch.float32)
    write_text(home / "text.txt", lines=60)
    return home


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(home, kind, *more):
    text = ["--calib", home / "text.txt", "--samples", 8, "--seq-len", 32, "--set", "budget.trial_samples=8"]
    return ["slice", "--model", home / kind, *text, *more]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_neurons_in_all_stand_where_the_survey_wants_them(home, place, monkeypatch, kind):
    monkeypatch.setattr("compress.pipeline.verify", lambda *_arguments, **_options: 0.0)
    said = succeeds(
        *words(home, kind, "--keep-params", 0.6, "--allocation", "free", "--drop-blocks", 0, "--out", "out", "--json")
    ).json
    assert said["architecture"] == ("DeciLMForCausalLM" if kind == "llama" else "CompressForCausalLM")
    assert said["parameters"] <= 0.6 * said["dense_parameters"]
    neurons = said["units"]["neurons"]
    assert len(neurons) == NUM_BLOCKS
    trials = json.loads((place / "out" / "compress.json").read_text())["trials"]
    assert neurons in [trial["neurons"] for trial in trials] or not trials
    config = json.loads((place / "out" / "config.json").read_text())
    assert (config if kind == "llama" else config["slicing"])["mlp_widths"] == neurons
    assert (config["slicing"] is None) == (kind == "llama")  # which is stock but for that
    model = AutoModelForCausalLM.from_pretrained(place / "out")
    assert sum(parameter.numel() for parameter in model.parameters()) == said["parameters"]
    family = families.find(model.config.text_config)
    (units,) = family.units("neurons")
    writers = [block.get_submodule(units.writer) for block in model.get_submodule(family.blocks)]
    assert [writer.in_features for writer in writers] == neurons
    if kind == "llama":
        assert_is_deci_lm(model.config, neurons)


def assert_is_deci_lm(config, neurons):
    """What vLLM's DeciLMForCausalLM reads, attributes of the config and of its blocks."""
    assert config.architectures == ["DeciLMForCausalLM"]
    assert [block.ffn.intermediate_size for block in config.block_configs] == neurons
    assert not any(hasattr(block.ffn, "ffn_mult") for block in config.block_configs)  # which would be asked first
    assert not any(block.ffn.no_op or block.attention.no_op for block in config.block_configs)
    stock = config.text_config
    groups = {stock.num_attention_heads // block.attention.n_heads_in_group for block in config.block_configs}
    assert groups == {stock.num_key_value_heads}
    for key in (
        "hidden_size",
        "head_dim",
        "rope_parameters",
        "rms_norm_eps",
        "attention_bias",
        "max_position_embeddings",
    ):
        assert getattr(config, key) == getattr(stock, key), key


def test_neurons_go_where_their_deletion_costs_least():
    """Two blocks of 4 neurons: the first's cost little, the second's more and more."""
    costs = {"neurons 0": torch.tensor([0.0, 0.1, 0.2, 0.3]), "neurons 1": torch.tensor([0.0, 1.0, 3.0, 9.0])}
    survey = Survey(torch.eye(2), unit_costs=costs)
    forecast = Forecast(survey, None, (0.0,), 2, 5, {"neurons": 4})
    assert forecast.free_neurons({"neurons": 3}, step=1) == (2, 4)
    assert forecast.free_neurons({"neurons": 2}, step=1) == (1, 3)
    assert forecast.of_counts({"neurons": 3}) == Cost(0.0, pytest.approx(1.1))
    assert forecast.of_counts({"neurons": (1, 3)}) == Cost(0.0, pytest.approx(1.3))
    assert forecast.of_counts({"kv_groups": 3}) is None


def test_blocks_left_out_cost_what_was_measured_and_their_units_nothing_more():
    costs = {"neurons 0": torch.tensor([0.0, 0.1, 0.2, 0.3]), "neurons 1": torch.tensor([0.0, 1.0, 3.0, 9.0])}
    forecast = Forecast(Survey(torch.eye(2), unit_costs=costs), None, (0.0, 0.8), 2, 5, {"neurons": 4})
    counts = {"blocks": 1, "neurons": 3, "dropped": (1,)}
    assert forecast.of_counts(counts) == Cost(pytest.approx(0.8 * search.LEFT_OF_BLOCKS), pytest.approx(0.1))
    assert forecast.free_neurons(counts, step=1) == (3,)


def test_the_stream_s_loss_is_that_of_what_slicing_takes_from_it():
    torch.manual_seed(0)
    n, g = torch.randn(500, 6, dtype=torch.float64), torch.randn(500, 6, dtype=torch.float64)
    C, G = n.T @ n / 500, g.T @ g / 500
    frame = Frame(torch.eye(6, dtype=torch.float64), C.diagonal())
    forecast = Forecast(Survey(3 * C, 3 * G), frame, (0.0,), 1, 3, {})
    pairs = n[:, None, 4:] * g[None, :, 4:]  # each token with every other's gradient: independent
    assert forecast.stream(4) == pytest.approx(3 * float(pairs.sum(-1).square().mean()) / 2)
    assert forecast.stream(6) == 0


@pytest.mark.parametrize(
    ("keep", "fault"),
    [
        ((8, 8), "keeps 2 numbers of neurons, the model has 3 blocks"),
        ((8, 8, 99), "keeps 99 neurons, the model has 48"),
    ],
)
def test_numbers_that_do_not_fit_the_model(keep, fault):
    (said,) = PruneUnits(units="neurons", keep=keep).problems(48, NUM_BLOCKS)
    assert fault in said
