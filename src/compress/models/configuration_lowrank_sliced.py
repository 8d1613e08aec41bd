"""The config of a factorised model of the sliced architecture; carried in every checkpoint of that type."""

from .configuration_lowrank import LowRankConfig


class LowRankSlicedConfig(LowRankConfig):
    model_type = "compress_lowrank_sliced"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # without this method transformers would make one of its own

    @staticmethod
    def parse_text_config(model_type=None, **data):
        from .configuration_sliced import SlicedConfig  # here: importing any of our files may import all others

        return SlicedConfig(**data)
