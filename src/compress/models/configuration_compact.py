"""The config of the `compress_compact` architecture; carried in every checkpoint of that type."""

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig


class CompactConfig(PretrainedConfig):
    """
    text_config: the config of the model whose linears are stored small; `get_text_config()` finds it.
    linears: by the linear's name in that model how it is stored, as `CompactLinear` reads it.
    """

    model_type = "compress_compact"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers reads it as a plain class attribute)
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, text_config=None, linears=None, **kwargs):
        if isinstance(text_config, dict):
            text_config = self.parse_text_config(**text_config)
        self.text_config = text_config
        self.linears = linears or {}
        kwargs.setdefault("tie_word_embeddings", bool(text_config and text_config.tie_word_embeddings))
        super().__init__(**kwargs)

    @staticmethod
    def parse_text_config(**data):
        return AutoConfig.for_model(**data)

    def get_text_config(self, *args, **kwargs):
        # transformers also asks a config that was made without arguments.
        return self if self.text_config is None else self.text_config.get_text_config(*args, **kwargs)

    @property
    def vocab_size(self):
        return self.text_config.vocab_size
