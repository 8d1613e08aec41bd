"""The config of a sliced, factorised model whose linears are stored small; carried in each checkpoint of that type."""

from .configuration_compact import CompactConfig


class CompactLowRankSlicedConfig(CompactConfig):
    model_type = "compress_compact_lowrank_sliced"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # without this method transformers would make one of its own

    @staticmethod
    def parse_text_config(model_type=None, **data):
        # here: importing any of our files may import all others
        from .configuration_lowrank_sliced import LowRankSlicedConfig

        return LowRankSlicedConfig(**data)
