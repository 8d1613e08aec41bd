"""The config of a factorised model whose linears are stored small; carried in every checkpoint of that type."""

from .configuration_compact import CompactConfig


class CompactLowRankConfig(CompactConfig):
    model_type = "compress_compact_lowrank"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # without this method transformers would make one of its own

    @staticmethod
    def parse_text_config(model_type=None, **data):
        from .configuration_lowrank import LowRankConfig  # here: importing any of our files may import all others

        return LowRankConfig(**data)
