"""A sliced decoder whose linears are stored small; carried in every checkpoint of that type."""

from .configuration_compact_sliced import CompactSlicedConfig
from .modeling_compact import CompactForCausalLM


class CompactSlicedForCausalLM(CompactForCausalLM):
    config_class = CompactSlicedConfig

    @staticmethod
    def build(text_config):
        from .modeling_sliced import SlicedForCausalLM  # here: importing any of our files may import all others

        return SlicedForCausalLM(text_config)
