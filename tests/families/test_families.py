"""What every family's table has to say truly of the stock model, and which models are refused, in which words."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

import tiny
from compress import families
from compress.errors import UnsupportedModel
from compress.families import BranchTable, Family
from compress.models.loading import with_blocks
from compress.own_model.modeling_compress import as_residual_block, finished_logits, structure_of, unfuse_experts

EPSILON = 0.0625
# What a family's table may depend on, of its tiny config.
TABLE_KEYS = (
    "n_routed_experts",
    "first_k_dense_replace",
    "num_local_experts",
    "num_experts",
    "num_hidden_layers",
    "layer_types",
    "moe_layers",
    "mamba_n_heads",
)


def make(model_type: str, **changes: Any) -> tuple[Family, Any]:
    """A family and a tiny stock model of it whose epsilon is not the usual one."""
    keys = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon")
    epsilons: dict[str, Any] = dict.fromkeys(keys, EPSILON)
    model = unfuse_experts(tiny.tiny_model(model_type, **epsilons, **changes))
    return families.find(model.config), model


# Families whose models are built in one of several ways, by their config.
OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "falcon, a norm each": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, one after the other": ("falcon", {"parallel_attn": False, "alibi": True, "bias": True}),
    "deepseek_v3, a dense block": ("deepseek_v3", {"first_k_dense_replace": 1, "q_lora_rank": None}),
    "qwen2_moe, every second sparse": ("qwen2_moe", {"decoder_sparse_step": 2, "intermediate_size": 40}),
    "granitemoehybrid, Mamba in some blocks": ("granitemoehybrid", tiny.HYBRID),
    "opt, norms behind": ("opt", {"do_layer_norm_before": False}),
    "opt, 350m": ("opt", tiny.OPT_350M),
    "opt, no final norm": ("opt", {"_remove_final_layer_norm": True}),
    "qwen2_moe, three experts": ("qwen2_moe", {"num_experts": 3}),
}


@pytest.fixture(scope="module", params=[*families.names(), *OTHERWISE])
def pair(request) -> tuple[Family, Any]:
    model_type, changes = OTHERWISE.get(request.param, (request.param, {}))
    return make(model_type, **changes)


def blocks_of(family: Family, model: nn.Module) -> list[Any]:
    blocks: Any = model.get_submodule(family.blocks)
    return list(blocks)


def test_every_family_has_a_tiny_model():
    assert families.names() == sorted(tiny.EVERY)
    assert not tiny.FAMILIES.keys() & tiny.OTHERS.keys()


@pytest.mark.parametrize("model_type", families.names())
def test_a_family_is_found_by_the_name_of_its_model(model_type):
    config = tiny.tiny_config(model_type)
    same = {key: getattr(config, key) for key in TABLE_KEYS if getattr(config, key, None) is not None}
    assert families.find(AutoConfig.for_model(model_type, **same)) == families.find(config)


@pytest.mark.parametrize("variant", OTHERWISE)
def test_a_family_may_depend_on_the_config(variant):
    model_type, changes = OTHERWISE[variant]
    dense = tiny.tiny_config(model_type)
    assert families.find(dense) != families.find(tiny.tiny_config(model_type, **changes))


def test_blocks_keep_their_branches_where_others_are_left_out(pair):
    family, model = pair
    kept = [0, tiny.NUM_BLOCKS - 1]
    left = families.find(with_blocks(model.config, kept))
    for new, old in enumerate(kept):
        for found, branch in zip(left.branches_of(new), family.branches_of(old), strict=True):
            assert (found.readers, found.writers) == (branch.readers, branch.writers)


def test_every_linear_of_a_block_is_a_reader_or_a_writer_exactly_once(pair):
    family, model = pair
    for number, block in enumerate(blocks_of(family, model)):
        branches = family.branches_of(number)
        listed = [name for branch in branches for name in (*branch.readers, *branch.writers, *branch.inner)]
        assert len(listed) == len(set(listed))
        assert set(listed) == {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        for branch in branches:
            assert {block.get_submodule(name).in_features for name in branch.readers} == {tiny.HIDDEN}
            assert {block.get_submodule(name).out_features for name in branch.writers} == {tiny.HIDDEN}


def test_every_norm_of_the_stream_is_a_branchs_or_the_final_one(pair):
    family, model = pair
    norms = [norm for branch in family.branches for norm in (*branch.norms, branch.post_norm) if norm]
    assert len(norms) == len(set(norms))
    named = {f"{family.blocks}.{i}.{norm}" for i in range(tiny.NUM_BLOCKS) for norm in norms}
    named |= {family.final_norm} - {None}

    def is_of_the_stream(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return weight is None or tuple(weight.shape) == (tiny.HIDDEN,)

    modules = dict(model.named_modules())
    inner = (f".{family.attention}.", f".{family.recurrent}.")
    kinds = {n: m for n, m in modules.items() if type(m).__name__.endswith("Norm") and not any(i in n for i in inner)}
    assert named == {name for name, module in kinds.items() if is_of_the_stream(module)}


def test_every_parameter_is_accounted_for(pair):
    """Nothing that touches the stream is left out; what is left lies between a branch's readers and writers."""
    family, model = pair
    parts = {*family.embedding_parts, *family.head_parts}
    for i in range(tiny.NUM_BLOCKS):
        for branch in family.branches_of(i):
            names = (*branch.norms, *branch.readers, *branch.writers, branch.post_norm)
            parts |= {f"{family.blocks}.{i}.{name}" for name in names}
    left = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in parts]
    within = (family.attention, family.recurrent)
    inner = {f"{family.blocks}.{i}.{name}." for i in range(tiny.NUM_BLOCKS) for name in within}
    assert all(name.endswith(".correction") or any(name.startswith(prefix) for prefix in inner) for name in left)
    assert all(tuple(model.get_parameter(name).shape) != (tiny.HIDDEN,) for name in left)


def test_every_embedding_table_is_listed(pair):
    family, model = pair
    found = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    assert set(family.embeddings) == found
    assert model.get_submodule(family.embeddings[0]) is model.get_input_embeddings()
    widths = [model.get_submodule(name).embedding_dim for name in family.embeddings]
    assert widths[1:] == [tiny.HIDDEN] * (len(widths) - 1)
    assert (widths[0] == tiny.HIDDEN) is (family.project_in is None) is (family.project_out is None)


def test_the_head_is_the_output_embeddings(pair):
    family, model = pair
    head = model.get_submodule(family.head)
    assert head is model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    assert (head.bias is not None) is family.head_bias


def test_paths_lead_from_readers_to_writers(pair):
    family, model = pair
    for number, block in enumerate(blocks_of(family, model)):
        check_paths(family, family.branches_of(number), block)


def check_paths(family: Family, branches: tuple[BranchTable, ...], block: Any) -> None:
    steps = [path for branch in branches for path in branch.paths]
    for branch in branches:
        for path in branch.paths:
            for step in path:
                assert isinstance(block.get_submodule(step), nn.Module)
        for name in (*branch.readers, *branch.writers):
            assert sum(name == step or name.startswith(f"{step}.") for path in branch.paths for step in path) == 1
    assert sum(family.attention in path or family.recurrent in path for path in steps) == 1
    assert len({branch.name for branch in branches}) == len(branches)
    assert [branch.name for branch in branches] == [branch.name for branch in family.branches]


def test_every_reader_is_behind_the_norm_that_its_input_came_through(pair):
    """By what the stock block hands on: each reader's input is the output of its norm."""
    family, model = pair
    for number in {0, *family.others, tiny.NUM_BLOCKS - 1}:
        check_readers(model, family.branches_of(number), blocks_of(family, model)[number])


def check_readers(model: Any, branches: tuple[BranchTable, ...], block: Any) -> None:
    wanted = {name for branch in branches for name in (*branch.norms, *branch.readers)}
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
    for branch in branches:
        groups = branch.readers_by_norm()
        assert tuple(groups) == (branch.norms or (None,))
        assert sorted(name for names in groups.values() for name in names) == sorted(branch.readers)
        for norm, readers in groups.items():
            assert readers
            source = given[readers[0]] if norm is None else gave[norm]
            assert all(are_rows(given[reader], source) for reader in readers)
            everyone = [reader for reader in readers if ".expert." not in reader]
            assert all(torch.equal(given[reader].view_as(source), source) for reader in everyone)


def are_rows(some: torch.Tensor, every: torch.Tensor) -> bool:
    """Experts are given some of the tokens."""
    return all((row == every.flatten(0, -2)).all(-1).any() for row in some.flatten(0, -2))


def test_a_block_is_the_chain_of_its_branches(pair):
    """The stock block's output from the table alone: norms behind, multipliers and parallel paths included."""
    family, model = pair
    seen: list[Any] = []
    handles = [
        block.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
        for block in blocks_of(family, model)
    ]
    with torch.no_grad():
        model(input_ids=torch.arange(24)[None], use_cache=False)
        for handle in handles:
            handle.remove()
        assert len(seen) == tiny.NUM_BLOCKS
        for number, (block, inputs, kwargs, output) in enumerate(seen):
            own = as_residual_block(copy.copy(block), structure_of(family.structure(), number), model.config)
            found = own.forward(*inputs, **kwargs)
            found, expected = (y[0] if isinstance(y, tuple) else y for y in (found, output))
            assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def test_logits_are_the_heads_outputs_finished_and_blocks_return_what_the_table_says(pair):
    family, model = pair
    outputs: list[Any] = []
    kinds: list[bool] = []
    blocks_of(family, model)[0].register_forward_hook(lambda block, inputs, y: kinds.append(isinstance(y, tuple)))
    model.get_submodule(family.head).register_forward_hook(lambda head, inputs, output: outputs.append(output))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None]).logits
    assert torch.equal(finished_logits(outputs[0], family.logits, model.config), logits)
    assert torch.equal(outputs[0], logits) is (not family.logits or model.config.model_type == "gemma3_text")
    assert kinds == [family.returns_tuple]


def test_norms_are_of_the_kind_and_the_epsilon_that_the_table_says(pair):
    """By the formula, from the norm's output: no attribute of the module is looked at."""
    family, model = pair
    x = torch.randn(3, tiny.HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    epsilon = family.epsilon(model.config)
    assert epsilon == (1e-5 if model.config.model_type in ("opt", "olmo") else EPSILON)
    x *= (epsilon * 10) ** 0.5
    modules = [model.get_submodule(family.final_norm)] if family.final_norm else []
    names = [norm for branch in family.branches for norm in (*branch.norms, branch.post_norm) if norm]
    modules += [block.get_submodule(name) for block in blocks_of(family, model) for name in names]
    for norm in modules:
        centered = x - x.mean(-1, keepdim=True) if family.norm == "layer" else x
        normed = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + epsilon)
        gain, offset = (getattr(norm, name, None) for name in ("weight", "bias"))
        assert (gain is not None) is family.norm_gain
        assert (offset is not None) is (family.norm == "layer" and family.norm_offset)
        gain = 1 if gain is None else gain + 1 if family.norm == "rms_plus_one" else gain
        expected = normed * gain + (0 if offset is None else offset)
        assert (norm(x) - expected).abs().max() < 1e-5


REMEDY = "Use compress lord or compress slim, which leave its stream as it is."


BEHIND = "it normalizes what a branch writes (post-norm), which a rotation of the stream does not pass."
INEXACT: list[tuple[str, dict[str, Any], str]] = [
    (
        *("opt", tiny.OPT_350M),
        "it normalizes the stream after each branch (do_layer_norm_before=false, as OPT-350m).",
    ),
    (
        *("opt", {"word_embed_proj_dim": 16}),
        "its embeddings are projected to the hidden size (word_embed_proj_dim differs).",
    ),
    (
        *("opt", {"_remove_final_layer_norm": True}),
        "its head reads the stream without a norm (_remove_final_layer_norm=true).",
    ),
    *((name, {}, BEHIND) for name in ("gemma2", "gemma3_text", "olmo2", "olmo3", "glm4")),
]


@pytest.mark.parametrize(("model_type", "changes", "reason"), INEXACT)
def test_what_cannot_be_sliced_exactly_is_told(model_type, changes, reason):
    config = tiny.tiny_config(model_type, **changes)
    with pytest.raises(UnsupportedModel) as error:
        families.check_exact(config, families.find(config))
    assert str(error.value) == f"This {model_type} model cannot be sliced exactly: {reason} {REMEDY}"


REFUSED = {
    "blocks that read an encoder": (
        tiny.tiny_config("gpt_bigcode", add_cross_attention=True, multi_query=False),
        "This gpt_bigcode model is not supported: its blocks read an encoder's output too (add_cross_attention=true).",
    ),
    "images and text": (
        AutoConfig.for_model("gemma3"),
        "gemma3 is not supported: its config is that of text and images together. Compress the language model alone: "
        "load it with Gemma3ForCausalLM.from_pretrained, write it with save_pretrained (model type gemma3_text), and "
        "start from that.",
    ),
    "conv1d": (
        AutoConfig.for_model("gpt2"),
        "gpt2 is not supported: its linear layers are Conv1D modules, whose weights lie the other way round. "
        "gpt_bigcode has the same blocks in plain linears.",
    ),
    "compressed": (
        SimpleNamespace(model_type="compress"),
        "This is a compressed model already. Start from the dense one, with all stages in one recipe: compress run.",
    ),
    "unknown": (
        AutoConfig.for_model("bloom"),
        f"The model type 'bloom' is not supported. Supported: {', '.join(families.names())}.",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_told(kind):
    config, said = REFUSED[kind]
    with pytest.raises(UnsupportedModel) as error:
        families.find(config)
    assert str(error.value) == said
