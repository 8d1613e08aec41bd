"""A decoder whose linears are stored small: the `compress_compact` architecture.

This file and its config's are carried in every checkpoint of that type, so they stand alone: torch and transformers,
nothing else. The model is the one that `text_config` describes, its forward included; only linears have been replaced.

A linear computes y = W x + b + B (A x). Of W only the numbers that a pattern keeps are stored, as codes of a few bits,
and for each group of the pattern which of them these are. W is never held whole: a product makes a block of its rows,
uses it and lets it go.
"""

import functools
import itertools
import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .configuration_compact import CompactConfig
from .modeling_experts import unfuse_experts

FLOAT8 = torch.float8_e4m3fn
# How many of a weight's numbers are made at a time: on a CPU what its caches hold, elsewhere so many that starting the
# kernels does not count.
BLOCK = {"cpu": 2**20}
BLOCK_ELSEWHERE = 2**24


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
def factors(keep, group, size, word, device):
    """(keep, words, combinations): what a number of `size` bytes is multiplied by to stand in its place in a group.

    A group is as many words as it takes; in those where a number has no place its factor is 0.
    """
    places = combinations(keep, group, device).T[:, None]
    per_word = word.itemsize // size
    words = torch.arange(math.ceil(group / per_word), device=device)[:, None]
    return torch.where(places // per_word == words, 1 << 8 * size * (places % per_word), 0).to(word)


UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.int64}  # by the bytes of a number
STORED = ("codes", "scale", "values", "places", "shares")


class StoredMatrix(nn.Module):
    """A matrix (rows, columns) of which some numbers are stored, and the others are zero.

    codes   (rows, bytes) uint8: of each number code + 2^(bits - 1), or its byte where it is an 8-bit float
    scale   (rows or 1, groups): what the codes of `scale_group` neighbouring columns are multiplied by; the last group
            may be smaller
    values  (rows, kept): in place of both, the numbers themselves
    places  (rows, bytes) uint8: of each group of the pattern the number of its combination; without a pattern none
    shares  (columns,): what a column is multiplied by besides; with `finer` only

    Of the numbers that are kept those come first that are the first of their group, then the second ones, and so on.
    entry: `bits` (none for values), `floating`, `scale_group` (or `tensor`, `channel`), `pattern` (keep and group, or
    none), `finer`.
    """

    def __init__(self, rows, columns, entry):
        super().__init__()
        self.num_rows = rows
        self.columns = columns
        self.bits = entry["bits"]
        self.floating = entry["floating"]
        self.keep, self.group = entry["pattern"] or (1, 1)
        shared = entry["scale_group"]
        self.scale_group = columns if isinstance(shared, str) else shared
        codes = scale = values = places = shares = None
        if self.bits is None:
            values = torch.zeros(rows, self.kept)
        else:
            codes = torch.zeros(rows, packed_bytes(self.kept, self.bits), dtype=torch.uint8)
            scale = torch.zeros(1 if shared == "tensor" else rows, math.ceil(columns / self.scale_group))
        if self.keep < self.group:
            width = packed_bytes(columns // self.group, place_bits(self.keep, self.group))
            places = torch.zeros(rows, width, dtype=torch.uint8)
        if entry["finer"]:
            shares = torch.ones(columns)
        for name, tensor in zip(STORED, (codes, scale, values, places, shares), strict=True):
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
        codes = unpack_bits(self.codes[start:stop], self.bits, self.kept)
        if not self.floating:
            codes -= 1 << (self.bits - 1)  # wraps: the byte of a negative number
        codes = self.spread(codes.contiguous(), start, stop).view(FLOAT8 if self.floating else torch.int8)
        return codes.to(dtype).mul_(self.scales(start, stop, dtype))

    def spread(self, kept, start, stop):
        """(rows, kept) to (rows, columns), zeros between them."""
        if self.places is None:
            return kept
        rows, groups, size = len(kept), self.columns // self.group, kept.element_size()
        places = unpack_bits(self.places[start:stop], place_bits(self.keep, self.group), groups).flatten().int()
        word = torch.int32 if self.group * size <= 4 else torch.int64
        table = factors(self.keep, self.group, size, word, kept.device)
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
            scale = scale[..., None].expand(-1, -1, self.scale_group).flatten(1)[:, : self.columns]
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
    """y = W x + b + B (A x). How W, A and B are stored is the subclass's affair."""

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

    entry: how `weight` is stored, `bias`, `rank` (0 for no adapter), and `adapter_bits` and `adapter_group` of both
    factors' codes, which run along n and along m.
    """

    def __init__(self, in_features, out_features, entry):
        super().__init__(in_features, out_features, entry["bias"])
        self.weight = StoredMatrix(out_features, in_features, entry)
        self.first = self.second = None
        if entry["rank"]:
            factor = {"bits": entry["adapter_bits"], "scale_group": entry["adapter_group"]}
            factor |= {"floating": False, "pattern": None, "finer": False}
            self.first = StoredMatrix(entry["rank"], in_features, factor)
            self.second = StoredMatrix(entry["rank"], out_features, factor)

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


class CompactForCausalLM(PreTrainedModel, GenerationMixin):
    config_class: type[CompactConfig] = CompactConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.model = self.build(config.text_config)
        self._no_split_modules = list(self.model._no_split_modules or [])
        compact_architecture(self.model, config.linears)
        self.post_init()

    @staticmethod
    def build(text_config):
        return unfuse_experts(AutoModelForCausalLM.from_config(text_config))

    def _init_weights(self, module):
        self.model._init_weights(module)

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.model.set_output_embeddings(value)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
        # Named, so that generate() takes a mask, makes positions where prompts are padded and asks for the last logits.
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self.model(**named, logits_to_keep=logits_to_keep, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.model.prepare_inputs_for_generation(*args, **kwargs)


def compact_architecture(model, linears):
    """Put small linears into the places that `linears` names, in place; what they store is left to the loader."""
    for name, entry in linears.items():
        parent, _, attribute = name.rpartition(".")
        linear = model.get_submodule(name)
        compact = CompactLinear(linear.in_features, linear.out_features, entry)
        setattr(model.get_submodule(parent), attribute, compact.to(linear.weight.dtype))
