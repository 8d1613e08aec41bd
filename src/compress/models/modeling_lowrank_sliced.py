"""A sliced decoder some of whose linears are factorised too; carried in every checkpoint of that type."""

from .configuration_lowrank_sliced import LowRankSlicedConfig
from .modeling_lowrank import LowRankForCausalLM


class LowRankSlicedForCausalLM(LowRankForCausalLM):
    config_class = LowRankSlicedConfig

    @staticmethod
    def build(text_config):
        from .modeling_sliced import SlicedForCausalLM  # here: importing any of our files may import all others

        return SlicedForCausalLM(text_config)
