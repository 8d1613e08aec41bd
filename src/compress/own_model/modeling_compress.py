"""A stock decoder that has been sliced, factorized, stored in few bits, or all of these: the `compress` architecture.

This file and its config's are carried in every checkpoint of that type, so that it loads with `trust_remote_code`; they
import torch and transformers alone. The model is the stock one that `text_config` describes, with its names and its
code for attention, KV cache, masks and positions. What the config says is then done to it, in this order:

    slicing  every stretch of the residual stream between two branches has its own basis and width
    factors  linears are products of two thin ones
    storage  linears keep some of their numbers, in few bits, and may have a low-rank adapter

Experts, which transformers fuses, are linears one by one: they can be factorized and stored like any other.
"""

import dataclasses
import functools
import itertools
import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_compress import CompressConfig

HALF = (torch.float16, torch.bfloat16)


class CompressForCausalLM(PreTrainedModel, GenerationMixin):
    config_class: type[CompressConfig] = CompressConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["correction"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        structure = config.structure
        self.head_name = structure["head"]
        self._tied_weights_keys = {f"{self.head_name}.weight": f"{structure['embeddings'][0]}.weight"}
        # The stock causal LM's own name for it, which the structure's names begin with.
        self.base_model_prefix = structure["blocks"].split(".")[0]
        setattr(self, self.base_model_prefix, unfuse_experts(AutoModel.from_config(config.text_config)))
        if config.slicing is None:
            width, bias = self.get_input_embeddings().embedding_dim, structure["head_bias"]
            narrow_mlps(self, structure, config.mlp_widths)
        else:
            slice_stream(self, config)
            width, bias = config.slicing["stream_widths"][-1], config.slicing["reader_bias"] or structure["head_bias"]
        self.set_output_embeddings(nn.Linear(width, config.vocab_size, bias=bias))
        factorize_linears(self, config.factors)
        store_linears(self, config.storage)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, PivotLinear):
            # From a model without weights the buffer comes empty; the checkpoint's takes its place.
            module.order.copy_(torch.arange(module.out_features, dtype=torch.int32))
        self.base_model._init_weights(module)

    def get_input_embeddings(self):
        return self.base_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.base_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return getattr(self, self.head_name)

    def set_output_embeddings(self, value):
        setattr(self, self.head_name, value)

    # Named, so that generate() takes a mask, makes positions where prompts are padded and asks for the last logits.
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        labels=None,
        logits_to_keep=0,
        return_dict=None,
        **kwargs,
    ):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        outputs = self.base_model(**inputs, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(outputs.last_hidden_state[:, kept, :])
        logits = finished_logits(logits, self.config.structure["logits"], self.config.text_config)
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


class CompressModel(PreTrainedModel):
    """The stock model below the head, changed as the config says: what vLLM's Transformers backend puts a head on."""

    config_class: type[CompressConfig] = CompressConfig
    _supports_attention_backend = True

    def __new__(cls, config):
        return CompressForCausalLM(config).base_model


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


def replace(root, name, module):
    parent, _, attribute = name.rpartition(".")
    setattr(root.get_submodule(parent), attribute, module)


# ---- Experts ----


class Expert(nn.Module):
    """A gated MLP whose output is multiplied by each token's share before the last linear, which has no bias.

    So what that linear is given says how much its error counts in the stream.
    """

    def __init__(self, gate_proj, up_proj, down_proj, act_fn):
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn

    def forward(self, x, shares):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * shares)


class SparseMLP(nn.Module):
    """The stock block's function: each token goes to its `top_k` experts, whose outputs are added up by their shares.

    gate: the router. expert: all of them. normalizes: the shares of a token's experts add up to 1.
    shared_expert, shared_expert_gate: an expert of every token and what its share comes from, if the block has one; 1
        without the latter.
    scores: None where shares are of a softmax, or DeepSeek-V3's `SigmoidScores`.
    """

    def __init__(self, gate, expert, top_k, normalizes, shared_expert=None, shared_expert_gate=None, scores=None):
        super().__init__()
        self.gate = gate
        self.expert = nn.ModuleList(expert)
        self.top_k = top_k
        self.normalizes = normalizes
        self.shared_expert = shared_expert
        self.shared_expert_gate = shared_expert_gate
        self.scores = scores
        if scores is not None:
            self.correction = nn.Parameter(scores.correction, requires_grad=False)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        update = None
        for number, tokens, shares in self.assignments(x):
            expert = self.shared_expert if number == len(self.expert) else self.expert[number]
            given = expert(x[tokens], shares)
            if update is None:
                update = given.new_zeros(len(x), given.shape[-1])
            update.index_add_(0, tokens, given)
        return update.view(*hidden_states.shape[:-1], update.shape[-1])

    def assignments(self, x):
        """The number of each expert that has some of x (tokens, d), their indices (n,) and its shares of them (n, 1).

        The shared expert comes after the last one, with all tokens.
        """
        shares, chosen = self.route(x)
        for number in chosen.unique().tolist():
            tokens, place = torch.where(chosen == number)
            yield number, tokens, shares[tokens, place, None]
        if self.shared_expert is not None:
            everyone = torch.arange(len(x), device=x.device)
            gate = self.shared_expert_gate
            yield len(self.expert), everyone, x.new_ones(len(x), 1) if gate is None else torch.sigmoid(gate(x))

    def route(self, x):
        """The shares of the chosen experts and their numbers, (tokens, top_k) each; in float32 where x has less."""
        if self.scores is not None:
            return self.scored(x)
        logits = self.gate(x)
        shares, chosen = torch.softmax(logits.float() if logits.dtype in HALF else logits, dim=-1).topk(self.top_k)
        if self.normalizes:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.to(x.dtype), chosen

    def scored(self, x):
        """`route` of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): the best of the best groups, by two scores each."""
        is_half = x.dtype in HALF and isinstance(self.gate, nn.Linear)
        logits = nn.functional.linear(x.float(), self.gate.weight.float()) if is_half else self.gate(x)
        scores = logits.sigmoid()
        rank = scores + self.correction
        groups = rank.view(len(x), self.scores.groups, -1)
        best = groups.topk(2, dim=-1).values.sum(-1).topk(self.scores.top_groups, dim=-1).indices
        out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, False)
        chosen = groups.masked_fill(out[..., None], -math.inf).flatten(1).topk(self.top_k, dim=-1).indices
        shares = scores.gather(1, chosen)
        if self.normalizes:
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        return (shares * self.scores.scale).to(x.dtype), chosen


@dataclasses.dataclass(frozen=True)
class SigmoidScores:
    """Routing by sigmoid scores, as DeepSeek-V3 has it.

    correction: (experts,), added to the scores that choose. scale: of all shares. Of so many groups top_groups count.
    """

    correction: torch.Tensor
    scale: float
    groups: int
    top_groups: int


def unfuse_experts(model):
    """Put a SparseMLP with the same weights into the place of every stock sparse MLP, in place; hand the model back."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(getattr(getattr(child, "experts", None), "gate_up_proj", None), nn.Parameter):
                setattr(module, name, unfused(child))
    return model


def unfused(stock):
    experts, act_fn = [], stock.experts.act_fn
    for gate_up, down in zip(stock.experts.gate_up_proj, stock.experts.down_proj, strict=True):
        gate, up = gate_up.chunk(2)
        experts.append(Expert(linear(gate), linear(up), linear(down), act_fn))
    shared = getattr(stock, "shared_expert", None) or getattr(stock, "shared_experts", None)
    if shared is not None:
        shared = Expert(shared.gate_proj, shared.up_proj, shared.down_proj, shared.act_fn)
    scores, correction = None, getattr(stock.gate, "e_score_correction_bias", None)
    if correction is not None:
        router = stock.gate
        scores = SigmoidScores(correction, router.routed_scaling_factor, router.num_group, router.topk_group)
    return SparseMLP(
        linear(stock.gate.weight),
        experts,
        stock.gate.top_k,
        getattr(stock.gate, "norm_topk_prob", True),  # Mixtral's always add up to 1
        shared,
        getattr(stock, "shared_expert_gate", None),
        scores,
    )


def linear(weight):
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return made


# ---- Slicing ----


def slice_stream(model, config):
    """Narrow the stock modules of `model` to the widths of `config`, in place; the weights are left to the loader.

    A residual branch reads the stream through a norm and adds its output to it. After SliceGPT (arXiv 2401.15024,
    section 3) the stream passes a branch through a shortcut, the change of basis:

        x_out = x_in S + f(RMSNorm(x_in))        x_in: (tokens, d_in), S: (d_in, d_out)

    Linears are narrower, norms have no gain and still divide by the dense width: the deleted coordinates count as
    zeros. Where the whole stream has one basis (`shortcuts` is false), S is the identity.
    """
    structure, slicing = config.structure, config.slicing
    widths = slicing["stream_widths"]
    for name in structure["embeddings"]:
        table = model.get_submodule(name)
        table.weight = nn.Parameter(table.weight.new_empty(table.num_embeddings, widths[0]))
        table.embedding_dim = widths[0]
        table._is_hf_initialized = False  # its stock weight was; this one is not
    narrow_mlps(model, structure, slicing["mlp_widths"])
    point = 0
    for index, block in enumerate(model.get_submodule(structure["blocks"])):
        as_residual_block(block, structure_of(structure, index), config.text_config)
        for branch in block.structure["branches"]:
            slice_branch(block, branch, slicing, *widths[point : point + 2])
            point += 1
    replace(model, structure["final_norm"], GainlessRMSNorm(slicing["norm_width"], slicing["norm_eps"]))


def narrow_mlps(model, structure, widths):
    """Give the MLPs of `model` widths of their own, one a block, in place; None where they are as they should be."""
    blocks = enumerate(model.get_submodule(structure["blocks"]) if widths else ())
    for width, (index, block) in zip(widths or (), blocks, strict=True):
        branches = structure_of(structure, index)["branches"]
        for neurons in filter(None, (branch["neurons"] for branch in branches)):
            for name, stacks in neurons["readers"].items():
                resize(block, name, outputs=stacks * width)
            resize(block, neurons["writer"], inputs=width)


def slice_branch(block, branch, slicing, width_in, width_out):
    for norm in branch["norms"]:
        replace(block, norm, GainlessRMSNorm(slicing["norm_width"], slicing["norm_eps"]))
    for name in branch["readers"]:
        resize(block, name, inputs=width_in, bias=slicing["reader_bias"])
    for name in branch["writers"]:
        resize(block, name, outputs=width_out)
    if slicing["shortcuts"]:
        setattr(block, shortcut_name(branch), nn.Linear(width_in, width_out, bias=False))


def structure_of(structure, index):
    """The structure with the branches of one block."""
    return {**structure, "branches": structure.get("others", {}).get(str(index), structure["branches"])}


def resize(block, name, inputs=None, outputs=None, bias=False):
    """Put a linear of another shape into the place of one, with a bias where that one has one or `bias` is true."""
    old = block.get_submodule(name)
    inputs, outputs = inputs or old.in_features, outputs or old.out_features
    replace(block, name, nn.Linear(inputs, outputs, bias=bias or old.bias is not None))


def shortcut_name(branch):
    return f"{branch['name']}_shortcut"


class GainlessRMSNorm(nn.Module):
    """x / sqrt(sum(x^2) / width + eps), in float32 where x has less; width is the dense one, whatever x has left."""

    def __init__(self, width, eps):
        super().__init__()
        self.width = width
        self.eps = eps

    def forward(self, x):
        precise = x.float() if x.dtype in HALF else x
        mean_square = precise.square().sum(-1, keepdim=True) / self.width
        return (precise * torch.rsqrt(mean_square + self.eps)).to(x.dtype)

    def extra_repr(self):
        return f"width={self.width}, eps={self.eps}"


POSITIONS = ("position_embeddings", "position_ids")  # which a recurrence has no use for


class ResidualBlock:
    """The forward of a decoder block as a chain of residual branches; mixed into the stock block's class."""

    def forward(self, hidden_states, *args, **kwargs):
        for branch in self.structure["branches"]:
            update = self.run_branch(branch, hidden_states, **kwargs)
            shortcut = getattr(self, shortcut_name(branch), None)
            hidden_states = (hidden_states if shortcut is None else shortcut(hidden_states)) + update
        # Where stock blocks return a tuple, attention weights come second; None is what fused attention has for them.
        return (hidden_states, None) if self.structure["returns_tuple"] else hidden_states

    def run_branch(self, branch, hidden_states, **kwargs):
        """What the branch adds to the stream: the sum of its paths (two where attention and MLP are parallel)."""
        normed = [self.get_submodule(norm)(hidden_states) for norm in branch["norms"]] or [hidden_states]
        # One norm is for all paths, several are one for each.
        outputs = [self.run_path(*pair, **kwargs) for pair in zip(branch["paths"], itertools.cycle(normed))]
        update = functools.reduce(torch.add, outputs)
        update = update if self.multiplier is None else self.multiplier * update
        if not branch["post_norm"]:
            return update
        post_norm = self.get_submodule(branch["post_norm"])
        if branch["post_norm_of"] == "update":
            return post_norm(update)
        return post_norm(hidden_states + update) - hidden_states

    def run_path(self, path, x, **kwargs):
        for step in path:
            module = self.get_submodule(step)
            if step == self.structure["attention"]:
                x = module(x, **kwargs)
            elif step == self.structure.get("recurrent"):
                given = {name: value for name, value in kwargs.items() if name not in POSITIONS}
                x = module(x, cache_params=given.pop("past_key_values", None), **given)
            else:
                x = module(x)
            x = x[0] if isinstance(x, tuple) else x
        return nn.functional.dropout(x, p=self.residual_dropout, training=self.training)


@functools.cache
def residual_class(stock_class):
    # A subclass of the stock block, so that what looks for that class (captured hidden states) still finds it.
    return type("ResidualBlock", (ResidualBlock, stock_class), {})


def as_residual_block(block, structure, stock_config):
    """Give a stock decoder block the forward of `ResidualBlock`, in place. Its modules and their names stay."""
    block.__class__ = residual_class(type(block))
    block.structure = structure
    block.residual_dropout = getattr(stock_config, structure["dropout"]) if structure["dropout"] else 0.0
    block.multiplier = getattr(stock_config, structure["multiplier"]) if structure["multiplier"] else None
    return block


# ---- Factors ----


class LowRankLinear(nn.Module):
    """y = second(first(x)): r (m + n) numbers and the bias. Plain linears, for gradients, LoRA and quantization."""

    def __init__(self, in_features, out_features, rank, bias):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x):
        return self.second(self.first(x))


class PivotLinear(nn.Module):
    """r of the outputs are first(x), the others second of those: r (m + n - r) numbers and the bias, the same function.

    order: where output i lies after the two (PIFA, arXiv 2501.19090).
    """

    def __init__(self, in_features, out_features, rank, bias):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.first = nn.Linear(in_features, rank, bias=bias)
        self.second = nn.Linear(rank, out_features - rank, bias=bias)
        self.order = nn.Buffer(torch.arange(out_features, dtype=torch.int32))

    def forward(self, x):
        pivots = self.first(x)
        outputs = torch.cat([pivots, self.second(pivots)], dim=-1)
        # As a matrix: for these alone torch picks columns fast.
        return outputs.view(-1, self.out_features).index_select(1, self.order).view_as(outputs)


FORMS = {"factors": LowRankLinear, "pivot": PivotLinear}


def factorize_linears(model, factors):
    """Put factors into the places that `factors` names, in place; the weights are left to the loader."""
    for name, entry in factors.items():
        linear = model.get_submodule(name)
        thin = FORMS[entry["form"]](linear.in_features, linear.out_features, entry["rank"], entry["bias"])
        replace(model, name, thin.to(linear.weight.dtype))


# ---- Storage ----

FLOAT8 = torch.float8_e4m3fn
# How many of a weight's numbers are made at a time: on a CPU what its caches hold, elsewhere so many that starting the
# kernels does not count.
BLOCK = {"cpu": 2**20}
BLOCK_ELSEWHERE = 2**24
UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.int64}  # by the bytes of a number


def store_linears(model, storage):
    """Put small linears into the places that `storage` names, in place; what they store is left to the loader."""
    for name, entry in storage.items():
        linear = model.get_submodule(name)
        compact = CompactLinear(linear.in_features, linear.out_features, entry, bias=linear.bias is not None)
        replace(model, name, compact.to(linear.weight.dtype))


def unpack_bits(planes, bits, count):
    """Numbers of `bits` bits each, from 0 on: (rows, bits * eighth) uint8 to (rows, count), uint8 where they fit.

    A row's numbers are cut into eight stretches of the same length, `eighth`, the last ones filled with zeros. One of
    each stretch, low bits first, makes `bits` bytes, and these lie as far apart: whole stretches are shifted at a time.
    """
    dtype = torch.uint8 if bits <= 8 else torch.int32
    planes = planes.view(len(planes), bits, -1)
    numbers = torch.empty(len(planes), 8, planes.shape[2], dtype=dtype, device=planes.device)
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        number = planes[:, first].to(dtype) >> shift
        for later in range(1, math.ceil((shift + bits) / 8)):
            number |= planes[:, first + later].to(dtype) << (8 * later - shift)
        numbers[:, place] = number & ((1 << bits) - 1)
    return numbers.flatten(1)[:, :count]


def packed_bytes(count, bits):
    """Bytes that `count` numbers of `bits` bits take in a row."""
    return math.ceil(count / 8) * bits


def place_bits(keep, group):
    """Bits for the number of a combination."""
    return math.ceil(math.log2(math.comb(group, keep)))


@functools.cache
def combinations(keep, group, device):
    """(combinations, keep): the places in a group that each combination keeps, in the order of their numbers."""
    return torch.tensor(list(itertools.combinations(range(group), keep)), device=device)


@functools.cache
def place_factors(keep, group, size, word, device):
    """(keep, words, combinations): what a number of `size` bytes is multiplied by to stand in its place in a group.

    A group is as many words as it takes; in those where a number has no place its factor is 0.
    """
    places = combinations(keep, group, device).T[:, None]
    per_word = word.itemsize // size
    words = torch.arange(math.ceil(group / per_word), device=device)[:, None]
    return torch.where(places // per_word == words, 1 << 8 * size * (places % per_word), 0).to(word)


class StoredMatrix(nn.Module):
    """A matrix (rows, columns) of which some numbers are stored, and the others are zero.

    codes   (rows, bytes) uint8: of each number code + 2^(bits - 1), or its byte where it is an 8-bit float
    scale   (rows or 1, groups): what the codes of `group_size` neighboring columns are multiplied by; the last group
            may be smaller
    values  (rows, kept): in place of both, the numbers themselves
    places  (rows, bytes) uint8: of each group of the pattern the number of its combination; without a pattern none
    shares  (columns,): what a column is multiplied by besides; with `important_inputs` only

    Of the numbers that are kept those come first that are the first of their group, then the second ones, and so on.
    quantization: `num_bits`, `type` (`int` or `float`), `strategy` and `group_size` in the words of compressed-tensors;
    None for values. pattern: keep and group, or None.
    """

    def __init__(self, rows, columns, quantization, pattern=None, important_inputs=False):
        super().__init__()
        self.num_rows = rows
        self.columns = columns
        quantization = quantization or {}
        self.num_bits = quantization.get("num_bits")
        self.is_float = quantization.get("type") == "float"
        self.group_size = quantization.get("group_size") or columns
        self.keep, self.group = pattern or (1, 1)
        stored = dict.fromkeys(("codes", "scale", "values", "places", "shares"))
        if self.num_bits is None:
            stored["values"] = torch.zeros(rows, self.kept)
        else:
            stored["codes"] = torch.zeros(rows, packed_bytes(self.kept, self.num_bits), dtype=torch.uint8)
            scales = 1 if quantization["strategy"] == "tensor" else rows
            stored["scale"] = torch.zeros(scales, math.ceil(columns / self.group_size))
        if self.keep < self.group:
            width = packed_bytes(columns // self.group, place_bits(self.keep, self.group))
            stored["places"] = torch.zeros(rows, width, dtype=torch.uint8)
        if important_inputs:
            stored["shares"] = torch.ones(columns)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)

    @property
    def kept(self):
        """How many numbers of a row are stored."""
        return self.columns // self.group * self.keep

    @property
    def num_parameters(self):
        return self.num_rows * self.kept

    def rows(self, start, stop, dtype):
        """(stop - start, columns), as they are without the storage."""
        if self.values is not None:
            return self.spread(self.values[start:stop].to(dtype), start, stop)
        codes = unpack_bits(self.codes[start:stop], self.num_bits, self.kept)
        if not self.is_float:
            codes -= 1 << (self.num_bits - 1)  # wraps: the byte of a negative number
        codes = self.spread(codes.contiguous(), start, stop).view(FLOAT8 if self.is_float else torch.int8)
        return codes.to(dtype).mul_(self.scales(start, stop, dtype))

    def spread(self, kept, start, stop):
        """(rows, kept) to (rows, columns), zeros between them."""
        if self.places is None:
            return kept
        rows, groups, size = len(kept), self.columns // self.group, kept.element_size()
        places = unpack_bits(self.places[start:stop], place_bits(self.keep, self.group), groups).flatten().int()
        word = torch.int32 if self.group * size <= 4 else torch.int64
        table = place_factors(self.keep, self.group, size, word, kept.device)
        whole = torch.zeros(rows, groups, table.shape[1], dtype=word, device=kept.device)
        numbers = kept.view(UNSIGNED[size]).view(rows, self.keep, groups)
        for nth in range(self.keep):
            number = numbers[:, nth].to(word)
            for which, factor in enumerate(table[nth]):
                whole[..., which] += number * factor.index_select(0, places).view(rows, groups)
        return whole.view(kept.dtype)[..., : self.group].flatten(1)

    def scales(self, start, stop, dtype):
        """What each code is multiplied by, in a shape that broadcasts."""
        scale = self.scale if len(self.scale) == 1 else self.scale[start:stop]
        scale = scale.to(dtype)
        if scale.shape[1] > 1:
            scale = scale[..., None].expand(-1, -1, self.group_size).flatten(1)[:, : self.columns]
        return scale if self.shares is None else scale * self.shares.to(dtype)


class BlockedProduct(torch.autograd.Function):
    """x W^T + b, (tokens, n) to (tokens, m), a block of W's rows at a time; for the gradient they are made again."""

    @staticmethod
    def forward(ctx, x, bias, linear):
        ctx.linear = linear
        y = x.new_empty(len(x), linear.out_features)
        for start, stop in linear.blocks(x.device):
            own = None if bias is None else bias[start:stop]
            y[:, start:stop] = nn.functional.linear(x, linear.rows(start, stop, x.dtype), own)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x_gradient = gradient.new_zeros(len(gradient), ctx.linear.in_features)
        for start, stop in ctx.linear.blocks(gradient.device):
            x_gradient.addmm_(gradient[:, start:stop], ctx.linear.rows(start, stop, gradient.dtype))
        return x_gradient, gradient.sum(0) if ctx.needs_input_grad[1] else None, None


class AdaptedLinear(nn.Module):
    """y = W x + b + B (A x). How W, A and B are stored is the subclass's affair; W is never made whole."""

    def __init__(self, in_features, out_features, bias):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @property
    def num_parameters(self):
        """Numbers stored: of W, A, B and b; not scales and places."""
        raise NotImplementedError

    def rows(self, start, stop, dtype):
        """(stop - start, n): rows of W."""
        raise NotImplementedError

    def adapter(self, dtype):
        """A (r, n) and B^T (r, m); None where there are none."""
        raise NotImplementedError

    def blocks(self, device):
        """Ranges of rows, about the numbers of `BLOCK` in each."""
        rows = max(1, BLOCK.get(device.type, BLOCK_ELSEWHERE) // self.in_features)
        return [(start, min(start + rows, self.out_features)) for start in range(0, self.out_features, rows)]

    def without_adapter(self, x):
        """W x + b of each, (tokens, n) to (tokens, m)."""
        return BlockedProduct.apply(x, self.bias, self)

    def forward(self, x):
        flat = x.reshape(-1, self.in_features)
        y = self.without_adapter(flat)
        factors = self.adapter(x.dtype)
        if factors is not None:
            first, second = factors
            y = torch.addmm(y, flat @ first.T, second)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class CompactLinear(AdaptedLinear):
    """`weight` (m, n), and of the adapter `first`, A (r, n), and `second`, B^T (r, m).

    entry: how the `weights` are quantized, the `pattern` that is kept, `important_inputs`, the `rank` (0 for no
    adapter), and how the `adapter` is quantized, whose groups run along n and along m.
    """

    def __init__(self, in_features, out_features, entry, *, bias):
        super().__init__(in_features, out_features, bias)
        how = (entry["weights"], entry["pattern"], entry["important_inputs"])
        self.weight = StoredMatrix(out_features, in_features, *how)
        self.first = self.second = None
        if entry["rank"]:
            self.first = StoredMatrix(entry["rank"], in_features, entry["adapter"])
            self.second = StoredMatrix(entry["rank"], out_features, entry["adapter"])

    @property
    def num_parameters(self):
        stored = [part.num_parameters for part in (self.weight, self.first, self.second) if part is not None]
        return sum(stored) + (0 if self.bias is None else self.out_features)

    def rows(self, start, stop, dtype):
        return self.weight.rows(start, stop, dtype)

    def adapter(self, dtype):
        if self.first is None:
            return None
        return tuple(factor.rows(0, factor.num_rows, dtype) for factor in (self.first, self.second))
