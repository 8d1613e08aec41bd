"""A sliced and factorised decoder whose linears are stored small; carried in every checkpoint of that type."""

from .configuration_compact_lowrank_sliced import CompactLowRankSlicedConfig
from .modeling_compact import CompactForCausalLM


class CompactLowRankSlicedForCausalLM(CompactForCausalLM):
    config_class = CompactLowRankSlicedConfig

    @staticmethod
    def build(text_config):
        # here: importing any of our files may import all others
        from .modeling_lowrank_sliced import LowRankSlicedForCausalLM

        return LowRankSlicedForCausalLM(text_config)
