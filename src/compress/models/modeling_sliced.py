"""A decoder whose residual stream has been rotated and sliced: the `compress_sliced` architecture.

This file and its config's are carried in every checkpoint of that type, so they stand alone: torch and transformers,
nothing else.

A residual branch reads the stream through a norm and adds its output to it. After SliceGPT (arXiv 2401.15024,
section 3) every stretch of the stream between two branches has a basis and a width of its own, and the stream passes
a branch through a shortcut, the change of basis:

    x_out = x_in S + f(RMSNorm(x_in))        x_in: (tokens, d_in), S: (d_in, d_out)

The model is the stock one (`text_config` describes it at its dense width) with narrower linears, gainless norms that
still divide by the dense width (the deleted coordinates count as zeros), and shortcuts. Attention, KV cache, masks and
positions are the stock code's own. Where all stretches share one basis (`shortcuts` is false), S is the identity.
"""

import functools
import itertools

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_sliced import SlicedConfig
from .modeling_experts import unfuse_experts


class GainlessRMSNorm(nn.Module):
    """x / sqrt(sum(x^2) / width + eps), in float32 where x has less; width is the dense one, whatever x has left."""

    def __init__(self, width, eps):
        super().__init__()
        self.width = width
        self.eps = eps

    def forward(self, x):
        precise = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean_square = precise.square().sum(-1, keepdim=True) / self.width
        return (precise * torch.rsqrt(mean_square + self.eps)).to(x.dtype)

    def extra_repr(self):
        return f"width={self.width}, eps={self.eps}"


class ResidualBlock:
    """The forward of a decoder block as a chain of residual branches; mixed into the stock block's class."""

    def forward(self, hidden_states, *args, **kwargs):
        for branch in self.structure["branches"]:
            update = self.run_branch(branch, hidden_states, **kwargs)
            hidden_states = self.run_shortcut(branch, hidden_states) + update
        # Where stock blocks return a tuple, attention weights come second; None is what fused attention has for them.
        return (hidden_states, None) if self.structure["returns_tuple"] else hidden_states

    def run_shortcut(self, branch, hidden_states):
        shortcut = getattr(self, shortcut_name(branch), None)
        return hidden_states if shortcut is None else shortcut(hidden_states)

    def run_branch(self, branch, hidden_states, **kwargs):
        """What the branch adds to the stream: the sum of its paths (two where attention and MLP are parallel)."""
        normed = [self.get_submodule(norm)(hidden_states) for norm in branch["norms"]] or [hidden_states]
        # One norm is for all paths, several are one for each.
        outputs = [self.run_path(*pair, **kwargs) for pair in zip(branch["paths"], itertools.cycle(normed))]
        update = functools.reduce(torch.add, outputs)
        update = update if self.multiplier is None else self.multiplier * update
        if not branch.get("post_norm"):  # checkpoints of earlier versions do not say it
            return update
        post_norm = self.get_submodule(branch["post_norm"])
        if branch["post_norm_of"] == "update":
            return post_norm(update)
        return post_norm(hidden_states + update) - hidden_states

    def run_path(self, path, x, **kwargs):
        for step in path:
            module = self.get_submodule(step)
            x = module(x, **kwargs) if step == self.structure["attention"] else module(x)
            x = x[0] if isinstance(x, tuple) else x
        return nn.functional.dropout(x, p=self.residual_dropout, training=self.training)


def shortcut_name(branch):
    return f"{branch['name']}_shortcut"


@functools.cache
def residual_class(stock_class):
    # A subclass of the stock block, so that what looks for that class (captured hidden states) still finds it.
    return type("ResidualBlock", (ResidualBlock, stock_class), {})


def as_residual_block(block, structure, stock_config):
    """Give a stock decoder block the forward of `ResidualBlock`, in place. Its modules and their names stay."""
    block.__class__ = residual_class(type(block))
    block.structure = structure
    block.residual_dropout = getattr(stock_config, structure["dropout"]) if structure["dropout"] else 0.0
    block.multiplier = getattr(stock_config, structure["multiplier"]) if structure.get("multiplier") else None
    return block


LOGIT_RULES = {
    "multiplier": torch.mul,
    "divisor": torch.div,
    "softcap": lambda logits, cap: cap * torch.tanh(logits / cap),
}


def finished_logits(logits, rules, stock_config):
    """What the stock model makes of the head's outputs; `rules` names the keys of the numbers in its config."""
    for rule, key in rules.items():
        number = getattr(stock_config, key)
        logits = logits if number is None else LOGIT_RULES[rule](logits, number)
    return logits


class SlicedForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SlicedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        # The stock causal LM's own name for it, which the structure's names begin with.
        self.base_model_prefix = config.structure["blocks"].split(".")[0]
        setattr(self, self.base_model_prefix, unfuse_experts(AutoModel.from_config(config.text_config)))
        self.lm_head = nn.Linear(config.stream_widths[-1], config.vocab_size, bias=needs_head_bias(config))
        slice_architecture(self, config)
        self.post_init()

    def _init_weights(self, module):
        self.base_model._init_weights(module)

    def get_input_embeddings(self):
        return self.base_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.base_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, position_ids=None, labels=None, logits_to_keep=0, return_dict=None, **kwargs):
        # Positions are named, so that generate() makes them where prompts are padded.
        outputs = self.base_model(input_ids=input_ids, position_ids=position_ids, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        logits = finished_logits(logits, self.config.structure.get("logits", {}), self.config.text_config)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if return_dict is False else result


def needs_head_bias(config):
    return config.reader_bias or config.structure["head_bias"]


def slice_architecture(model, config):
    """Narrow the stock modules of `model` to the widths of `config`, in place; the weights are left to the loader."""
    structure, widths = config.structure, config.stream_widths
    for name in structure["embeddings"]:
        table = model.get_submodule(name)
        table.weight = nn.Parameter(table.weight.new_empty(table.num_embeddings, widths[0]))
        table.embedding_dim = widths[0]
        table._is_hf_initialized = False  # its stock weight was; this one is not
    point = 0
    for index, block in enumerate(model.get_submodule(structure["blocks"])):
        as_residual_block(block, structure, config.text_config)
        mlp_width = config.mlp_widths[index] if config.mlp_widths else None
        for branch in structure["branches"]:
            slice_branch(block, branch, config, widths[point : point + 2], mlp_width)
            point += 1
    replace(model, structure["final_norm"], GainlessRMSNorm(config.norm_width, config.norm_eps))


def slice_branch(block, branch, config, widths, mlp_width):
    width_in, width_out = widths
    neurons = branch["neurons"] if mlp_width else None
    for norm in branch["norms"]:
        replace(block, norm, GainlessRMSNorm(config.norm_width, config.norm_eps))
    for name in branch["readers"]:
        linear = block.get_submodule(name)
        bias = linear.bias is not None or config.reader_bias
        stacks = neurons["readers"].get(name) if neurons else None
        replace(block, name, nn.Linear(width_in, stacks * mlp_width if stacks else linear.out_features, bias=bias))
    for name in branch["writers"]:
        linear = block.get_submodule(name)
        inner = mlp_width if neurons and name == neurons["writer"] else linear.in_features
        replace(block, name, nn.Linear(inner, width_out, bias=linear.bias is not None))
    if config.shortcuts:
        setattr(block, shortcut_name(branch), nn.Linear(width_in, width_out, bias=False))


def replace(root, name, module):
    parent, _, attribute = name.rpartition(".")
    setattr(root.get_submodule(parent), attribute, module)
