"""Make a language model smaller in one shot, without training.

Importing this package makes transformers know its model class: a compressed checkpoint then loads with
`AutoModelForCausalLM.from_pretrained` and no `trust_remote_code`. Neither torch nor transformers is imported for it: as
soon as transformers loads one of its registries, our class for it is loaded too, and registered.
"""

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from compress.version import __version__

if TYPE_CHECKING:
    import torch

__all__ = ["__version__", "load"]


def load(model: str | Path, *, dtype: "torch.dtype | None" = None, device: "torch.device | str" = "cpu") -> Any:
    """A model that this program has written, base and adapter in one, or any other, as transformers' class.

    model: a folder, a hub id or an alias. dtype: by default the checkpoint's own. Packed weights stay packed in memory;
    where no kernel multiplies from them, a warning of the logger `compress` says so. Raises a CompressError for what
    a user can mend.
    """
    import torch

    from compress.models.stored_loading import load as open_named

    return open_named(str(model), dtype, torch.device(device))


def _import(name: str, _registry: ModuleType) -> None:
    importlib.import_module(name)


def _register_config(module: ModuleType) -> None:
    from transformers import AutoConfig

    module.CompressConfig.register_for_auto_class()
    AutoConfig.register(module.CompressConfig.model_type, module.CompressConfig, exist_ok=True)


def _register_model(module: ModuleType) -> None:
    from transformers import AutoModelForCausalLM

    module.CompressForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    AutoModelForCausalLM.register(module.CompressConfig, module.CompressForCausalLM, exist_ok=True)


for _kind, _register in (("configuration", _register_config), ("modeling", _register_model)):
    _module = f"compress.own_model.{_kind}_compress"
    wrapt.register_post_import_hook(_register, _module)
    wrapt.register_post_import_hook(partial(_import, _module), f"transformers.models.auto.{_kind}_auto")
