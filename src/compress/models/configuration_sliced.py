"""The config of the `compress_sliced` architecture; carried in every checkpoint of that type."""

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig


class SlicedConfig(PretrainedConfig):
    """
    text_config: the stock config of the dense model.
    structure: the names of the stock model's parts: `embeddings`, `blocks`, `final_norm`, `head` below the causal LM,
        `branches` below a block (each: `name`, `norms`, `paths`, `readers`, `writers`), `attention` (the step of a path
        that takes masks, positions and cache), `dropout` (the key of the residual dropout in the stock config),
        `multiplier` (the key of what branches' outputs are multiplied by), `logits` (what is done to the head's
        outputs, with the keys of the numbers), `returns_tuple` (whether stock blocks return a tuple).
    stream_widths: the width of the residual stream after the embeddings and after each branch, in order.
    shortcuts: whether the stream has another basis behind every branch and passes it by a matrix.
    mlp_widths: of the MLPs, one a block, where they are not all as `text_config` says.
    norm_width, norm_eps: RMSNorm(x) = x / sqrt(sum(x^2) / norm_width + norm_eps), norm_width the dense width.
    reader_bias: whether norm offsets were folded into the readers, so that each has a bias.
    """

    model_type = "compress_sliced"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers reads it as a plain class attribute)
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(  # noqa: PLR0913 (the keys of config.json)
        self,
        text_config=None,
        structure=None,
        stream_widths=(),
        shortcuts=True,
        mlp_widths=None,
        norm_width=0,
        norm_eps=0.0,
        reader_bias=False,
        **kwargs,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.structure = structure
        self.stream_widths = list(stream_widths)
        self.shortcuts = shortcuts
        self.mlp_widths = mlp_widths
        self.norm_width = norm_width
        self.norm_eps = norm_eps
        self.reader_bias = reader_bias
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return self.text_config.vocab_size
