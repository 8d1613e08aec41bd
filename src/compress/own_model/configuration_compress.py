"""The config of `CompressForCausalLM`; carried in every checkpoint of that class."""

from types import SimpleNamespace

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig


class CompressConfig(PretrainedConfig):
    """The config of a stock model and what is done to it.

    text_config: the config of the stock model that everything else changes.
    structure: the names of the stock model's parts: `embeddings`, `blocks`, `final_norm`, `head` below the causal LM,
        `branches` below a block (each: `name`, `norms`, `paths`, `readers`, `writers`), `attention` (the step of a path
        that takes masks, positions and cache), `dropout` (the key of the residual dropout in `text_config`),
        `multiplier` (the key of what branches' outputs are multiplied by), `logits` (what is done to the head's
        outputs, with the keys of the numbers), `head_bias`, `returns_tuple` (whether stock blocks return a tuple).
    slicing: None, or
        `stream_widths`: the width of the residual stream after the embeddings and after each branch, in order.
        `shortcuts`: whether the stream has another basis after every branch and passes it by a matrix.
        `mlp_widths`: of the MLPs, one a block, where they are not all as `text_config` says; else None.
        `norm_width`, `norm_eps`: RMSNorm(x) = x / sqrt(sum(x^2) / norm_width + norm_eps), norm_width the dense width.
        `reader_bias`: whether norm offsets were folded into the readers, so that each has a bias.
    mlp_widths: of the MLPs of a model that is not sliced so, one a block, where they are not all as `text_config` says;
        else None.
    factors: by the name of each factorized linear: `rank`, `form` (`factors` or `pivot`) and `bias`.
    storage: by the name of each linear stored in few bits, factors apart: how, as `CompactLinear` reads it.

    What it has not itself it has of `text_config`: engines that ask for sizes need not know that there is one.
    """

    model_type = "compress"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers reads it as a plain class attribute)
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self, text_config=None, structure=None, slicing=None, mlp_widths=None, factors=None, storage=None, **kwargs
    ):
        # transformers also makes a config without arguments.
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.structure = structure
        self.slicing = slicing
        self.mlp_widths = mlp_widths
        self.factors = factors or {}
        self.storage = storage or {}
        kwargs.setdefault("tie_word_embeddings", bool(text_config and text_config.tie_word_embeddings))
        super().__init__(**kwargs)

    def __getattr__(self, name):
        if name.startswith("_") or name == "text_config":
            raise AttributeError(name)
        return getattr(self.text_config, name)

    def get_text_config(self, decoder=None, encoder=None):
        """This one: a model with another text config is one of several modalities to engines."""
        return self

    @property
    def block_configs(self):
        """The blocks as vLLM's DeciLMForCausalLM reads them, a Llama with an MLP width in each."""
        groups = self.num_attention_heads // self.num_key_value_heads
        attention = SimpleNamespace(no_op=False, n_heads_in_group=groups)
        mlps = [SimpleNamespace(no_op=False, intermediate_size=width) for width in self.mlp_widths or ()]
        return [SimpleNamespace(attention=attention, ffn=mlp) for mlp in mlps]

    @property
    def vocab_size(self):
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, number):
        self.text_config.vocab_size = number
