"""Make a language model smaller in one shot, without training.

Importing this package makes transformers know its architectures: a compressed checkpoint then loads with
`AutoModelForCausalLM.from_pretrained` and no `trust_remote_code`. Neither torch nor transformers is imported for it: as
soon as transformers loads one of its registries our class for it is loaded too, and what is loaded is registered.
"""

import importlib
from types import ModuleType

import wrapt

from compress.version import __version__

__all__ = ["__version__"]

CONFIG = "compress.models.configuration_sliced"
MODEL = "compress.models.modeling_sliced"


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _load_config(_registry: ModuleType) -> None:
    importlib.import_module(CONFIG)


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _load_model(_registry: ModuleType) -> None:
    importlib.import_module(MODEL)


@wrapt.when_imported(CONFIG)
def _register_config(module: ModuleType) -> None:
    from transformers import AutoConfig

    module.SlicedConfig.register_for_auto_class()
    AutoConfig.register(module.SlicedConfig.model_type, module.SlicedConfig, exist_ok=True)


@wrapt.when_imported(MODEL)
def _register_model(module: ModuleType) -> None:
    from transformers import AutoModelForCausalLM

    module.SlicedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    AutoModelForCausalLM.register(module.SlicedConfig, module.SlicedForCausalLM, exist_ok=True)
