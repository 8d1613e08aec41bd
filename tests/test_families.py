"""What every family's table has to say truly of the stock model, and which models are refused, in which words."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

import tiny
from compress import families
from compress.errors import UnsupportedModel
from compress.families import Family
from compress.models.modeling_experts import unfuse_experts

EPSILON = 0.0625
EXPERTS = ("num_local_experts", "num_experts")


def make(model_type: str, **changes: Any) -> tuple[Family, Any]:
    """A family and a tiny stock model of it whose epsilon is not the usual one."""
    keys = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon")
    epsilons: dict[str, Any] = dict.fromkeys(keys, EPSILON)
    model = unfuse_experts(tiny.tiny_model(model_type, **epsilons, **changes))
    return families.find(model.config), model


# Families whose blocks are built in one of two ways, by their config.
OTHERWISE: dict[str, dict[str, Any]] = {
    "gpt_neox": {"use_parallel_residual": False},
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {"num_experts": 3},
    "qwen3_moe": {"num_experts": 3},
}


@pytest.fixture(scope="module", params=[*families.names(), *(f"{name}, otherwise" for name in OTHERWISE)])
def pair(request) -> tuple[Family, Any]:
    model_type, _, otherwise = request.param.partition(", ")
    return make(model_type, **(OTHERWISE[model_type] if otherwise else {}))


def blocks_of(family: Family, model: nn.Module) -> list[Any]:
    blocks: Any = model.get_submodule(family.blocks)
    return list(blocks)


def test_every_family_has_a_tiny_model():
    assert families.names() == sorted(tiny.FAMILIES)


@pytest.mark.parametrize("model_type", families.names())
def test_a_family_is_found_by_the_name_of_its_model(model_type):
    same = {key: tiny.FAMILIES[model_type][key] for key in EXPERTS if key in tiny.FAMILIES[model_type]}
    assert families.find(AutoConfig.for_model(model_type, **same)) == make(model_type)[0]


@pytest.mark.parametrize("model_type", OTHERWISE)
def test_a_family_may_depend_on_the_config(model_type):
    assert make(model_type)[0] != make(model_type, **OTHERWISE[model_type])[0]


def test_blocks_are_all_of_the_stock_models_blocks(pair):
    family, model = pair
    blocks = blocks_of(family, model)
    assert len(blocks) == model.config.num_hidden_layers == tiny.NUM_BLOCKS
    assert len({type(block) for block in blocks}) == 1


def test_every_linear_of_a_block_is_a_reader_or_a_writer_exactly_once(pair):
    family, model = pair
    listed = [name for branch in family.branches for name in (*branch.readers, *branch.writers)]
    assert len(listed) == len(set(listed))
    for block in blocks_of(family, model):
        assert set(listed) == {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        for branch in family.branches:
            assert {block.get_submodule(name).in_features for name in branch.readers} == {tiny.HIDDEN}
            assert {block.get_submodule(name).out_features for name in branch.writers} == {tiny.HIDDEN}


def test_every_norm_of_the_stream_is_a_branchs_or_the_final_one(pair):
    family, model = pair
    norms = [norm for branch in family.branches for norm in branch.norms]
    assert len(norms) == len(set(norms))
    named = {f"{family.blocks}.{i}.{norm}" for i in range(tiny.NUM_BLOCKS) for norm in norms}
    named.add(family.final_norm)
    found = {
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm") and tuple(module.weight.shape) == (tiny.HIDDEN,)
    }
    assert named == found


def test_every_parameter_is_accounted_for(pair):
    """Nothing that touches the stream is left out; what is left lies between a branch's readers and writers."""
    family, model = pair
    parts = {*family.embeddings, family.final_norm, family.head}
    for i in range(tiny.NUM_BLOCKS):
        for branch in family.branches:
            names = (*branch.norms, *branch.readers, *branch.writers)
            parts |= {f"{family.blocks}.{i}.{name}" for name in names}
    left = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in parts]
    inner = {f"{family.blocks}.{i}.{family.attention}." for i in range(tiny.NUM_BLOCKS)}
    assert all(any(name.startswith(prefix) for prefix in inner) for name in left)
    assert all(tuple(model.get_parameter(name).shape) != (tiny.HIDDEN,) for name in left)


def test_every_embedding_table_is_listed(pair):
    family, model = pair
    found = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    assert set(family.embeddings) == found
    assert model.get_submodule(family.embeddings[0]) is model.get_input_embeddings()
    assert {model.get_submodule(name).embedding_dim for name in family.embeddings} == {tiny.HIDDEN}


def test_the_head_is_the_output_embeddings(pair):
    family, model = pair
    head = model.get_submodule(family.head)
    assert head is model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    assert (head.bias is not None) is family.head_bias


def test_paths_lead_from_readers_to_writers(pair):
    family, model = pair
    block = blocks_of(family, model)[0]
    steps = [path for branch in family.branches for path in branch.paths]
    for branch in family.branches:
        for path in branch.paths:
            for step in path:
                assert isinstance(block.get_submodule(step), nn.Module)
        for name in (*branch.readers, *branch.writers):
            assert sum(name == step or name.startswith(f"{step}.") for path in branch.paths for step in path) == 1
    assert sum(family.attention in path for path in steps) == 1
    assert len({branch.name for branch in family.branches}) == len(family.branches)


def test_every_reader_is_behind_the_norm_that_its_input_came_through(pair):
    """By what the stock block hands on: each reader's input is the output of its norm."""
    family, model = pair
    block = blocks_of(family, model)[0]
    wanted = {name for branch in family.branches for name in (*branch.norms, *branch.readers)}
    given, gave = dict[str, torch.Tensor](), dict[str, torch.Tensor]()

    def note(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            given[name], gave[name] = inputs[0], output

        return hook

    handles = [block.get_submodule(name).register_forward_hook(note(name)) for name in wanted]
    with torch.no_grad():
        model(input_ids=torch.arange(48)[None])
    for handle in handles:
        handle.remove()
    for branch in family.branches:
        groups = branch.readers_by_norm()
        assert tuple(groups) == branch.norms
        assert sorted(name for names in groups.values() for name in names) == sorted(branch.readers)
        for norm, readers in groups.items():
            assert readers
            assert all(are_rows(given[reader], gave[norm]) for reader in readers)
            everyone = [reader for reader in readers if ".expert." not in reader]
            assert all(torch.equal(given[reader].view_as(gave[norm]), gave[norm]) for reader in everyone)


def are_rows(some: torch.Tensor, every: torch.Tensor) -> bool:
    """Experts are given some of the tokens."""
    return all((row == every.flatten(0, -2)).all(-1).any() for row in some.flatten(0, -2))


def test_blocks_return_a_tuple_where_the_table_says_so(pair):
    family, model = pair
    outputs: list[Any] = []
    handle = blocks_of(family, model)[0].register_forward_hook(lambda block, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    handle.remove()
    assert [isinstance(output, tuple) for output in outputs] == [family.returns_tuple]


def test_units_are_as_many_as_the_writers_inputs_hold(pair):
    family, model = pair
    for units in family.units("neurons"):
        assert units.number(model.config) == blocks_of(family, model)[0].get_submodule(units.writer).in_features


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "codegen"])
def test_an_mlp_without_a_width_has_four_times_the_streams(model_type):
    family, model = make(model_type, n_inner=None)
    (units,) = family.units("neurons")
    assert units.number(model.config) == blocks_of(family, model)[0].get_submodule(units.writer).in_features
    assert units.number(model.config) == 4 * tiny.HIDDEN


def test_norms_are_of_the_kind_and_the_epsilon_that_the_table_says(pair):
    """By the formula, from the norm's output: no attribute of the module is looked at."""
    family, model = pair
    x = torch.randn(3, tiny.HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    epsilon = family.epsilon(model.config)
    assert epsilon == (1e-5 if model.config.model_type == "opt" else EPSILON)
    x *= (epsilon * 10) ** 0.5
    modules = [model.get_submodule(family.final_norm)]
    names = [norm for branch in family.branches for norm in branch.norms]
    modules += [block.get_submodule(name) for block in blocks_of(family, model) for name in names]
    for norm in modules:
        centered = x - x.mean(-1, keepdim=True) if family.norm == "layer" else x
        normed = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + epsilon)
        gain = norm.weight + 1 if family.norm == "rms_plus_one" else norm.weight
        expected = normed * gain + (norm.bias if family.norm == "layer" else 0)
        assert (norm(x) - expected).abs().max() < 1e-5


def test_dropout_is_a_key_of_the_config(pair):
    family, model = pair
    residual = {"opt": "dropout", "phi": "resid_pdrop", "phi3": "resid_pdrop", "gpt_neox": "hidden_dropout"}
    assert family.dropout == residual.get(model.config.model_type)
    assert family.dropout is None or getattr(model.config, family.dropout) == 0.0


def test_the_structure_survives_json(pair):
    family, _ = pair
    structure = family.structure()
    assert json.loads(json.dumps(structure)) == structure
    assert [branch["name"] for branch in structure["branches"]] == [branch.name for branch in family.branches]


def test_tables_are_frozen(pair):
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair[0].head = "other"


def refusal(config: Any) -> str:
    with pytest.raises(UnsupportedModel) as error:
        families.find(config)
    return str(error.value)


def opt_config(**changes: Any) -> Any:
    return tiny.tiny_config("opt", **changes)


def test_opt_350m_is_refused():
    assert refusal(opt_config(do_layer_norm_before=False)) == (
        "This opt model cannot be sliced exactly: it normalises after each branch (do_layer_norm_before=false, as "
        "OPT-350m). Other OPT sizes work."
    )


def test_opt_with_projected_embeddings_is_refused():
    assert refusal(opt_config(word_embed_proj_dim=16)) == (
        "This opt model cannot be sliced exactly: its embeddings are projected to the hidden size "
        "(word_embed_proj_dim differs). Other OPT sizes work."
    )


def test_opt_without_a_final_norm_is_refused():
    assert refusal(opt_config(_remove_final_layer_norm=True)) == (
        "This opt model cannot be sliced exactly: its head reads the stream without a norm "
        "(_remove_final_layer_norm=true)."
    )


def test_blocks_that_read_an_encoder_are_refused():
    assert refusal(tiny.tiny_config("gpt_bigcode", add_cross_attention=True, multi_query=False)) == (
        "This gpt_bigcode model cannot be sliced exactly: its blocks read an encoder's output too "
        "(add_cross_attention=true)."
    )


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3", "gemma3_text", "olmo2"])
def test_norms_of_what_is_written_are_refused(model_type):
    assert refusal(AutoConfig.for_model(model_type)) == (
        f"{model_type} cannot be sliced exactly: it normalises what a branch writes (post-norm), which a rotation of "
        f"the stream does not pass. Supported: {', '.join(families.names())}."
    )


@pytest.mark.parametrize("kind", ["sliced", "lowrank", "compact", "compact_sliced"])
def test_a_compressed_model_is_refused(kind):
    assert refusal(SimpleNamespace(model_type=f"compress_{kind}")) == (
        f"This is a compressed model already (compress_{kind}). Start from the dense one, with all "
        "stages in one recipe: compress run."
    )


def test_an_unknown_model_type_names_those_there_are():
    assert refusal(AutoConfig.for_model("gpt2")) == (
        f"The model type 'gpt2' is not supported. Supported: {', '.join(families.names())}."
    )
