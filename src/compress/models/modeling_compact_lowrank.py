"""A factorised decoder whose linears are stored small; carried in every checkpoint of that type."""

from .configuration_compact_lowrank import CompactLowRankConfig
from .modeling_compact import CompactForCausalLM


class CompactLowRankForCausalLM(CompactForCausalLM):
    config_class = CompactLowRankConfig

    @staticmethod
    def build(text_config):
        from .modeling_lowrank import LowRankForCausalLM  # here: importing any of our files may import all others

        return LowRankForCausalLM(text_config)
