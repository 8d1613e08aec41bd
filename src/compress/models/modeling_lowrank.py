"""A decoder some of whose linears are products of two thin ones: the `compress_lowrank` architecture.

This file and its config's are carried in every checkpoint of that type, so they stand alone: torch and transformers,
nothing else. The model is the one that `text_config` describes, its forward included; only linears have been replaced,
each by two plain ones, so that gradients, LoRA and quantization find what they know.
"""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .configuration_lowrank import LowRankConfig
from .modeling_experts import unfuse_experts


class LowRankLinear(nn.Module):
    """y = second(first(x)): r (m + n) numbers and the bias."""

    form = "factors"

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

    order: where output i lies behind the two (PIFA, arXiv 2501.19090).
    """

    form = "pivot"

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


class LowRankForCausalLM(PreTrainedModel, GenerationMixin):
    config_class: type[LowRankConfig] = LowRankConfig
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
        factorize_architecture(self.model, config.factors)
        self.post_init()

    @staticmethod
    def build(text_config):
        return unfuse_experts(AutoModelForCausalLM.from_config(text_config))

    def _init_weights(self, module):
        if isinstance(module, PivotLinear):
            # From a model without weights the buffer comes empty; the checkpoint's takes its place.
            module.order.copy_(torch.arange(module.out_features, dtype=torch.int32))
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


def factorize_architecture(model, factors):
    """Put factors into the places that `factors` names, in place; the weights are left to the loader."""
    for name, entry in factors.items():
        parent, _, attribute = name.rpartition(".")
        linear = model.get_submodule(name)
        form = FORMS[entry["form"]]
        thin = form(linear.in_features, linear.out_features, entry["rank"], entry["bias"])
        setattr(model.get_submodule(parent), attribute, thin.to(linear.weight.dtype))
