"""Make a language model smaller in one shot, without training.

Importing this package makes transformers know its architectures: a compressed checkpoint then loads with
`AutoModelForCausalLM.from_pretrained` and no `trust_remote_code`. Neither torch nor transformers is imported for it: as
soon as transformers loads one of its registries our class for it is loaded too, and what is loaded is registered.
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

# Of each architecture: the end of its modules' names in `compress.models`, the start of its classes' names, and what
# has to be imported before it. Importing one of our own modules first imports the registries on its way.
ARCHITECTURES = {
    "sliced": ("Sliced", "transformers.models.auto.{kind}_auto"),
    "lowrank": ("LowRank", "transformers.models.auto.{kind}_auto"),
    "compact": ("Compact", "transformers.models.auto.{kind}_auto"),
    "lowrank_sliced": ("LowRankSliced", "compress.models.{kind}_lowrank"),
    "compact_sliced": ("CompactSliced", "compress.models.{kind}_compact"),
    "compact_lowrank": ("CompactLowRank", "compress.models.{kind}_compact"),
    "compact_lowrank_sliced": ("CompactLowRankSliced", "compress.models.{kind}_compact"),
}


def load(model: str | Path, *, dtype: "torch.dtype | None" = None, device: "torch.device | str" = "cpu") -> Any:
    """A model that this program has written, base and adapter in one, or any other, as transformers' class.

    model: a folder, a hub id or an alias. dtype: by default the checkpoint's own. Packed weights stay packed in memory;
    where no kernel multiplies from them, a warning of the logger `compress` says so. Raises a CompressError for what
    a user can mend.
    """
    import torch

    from compress.models.opening import load as open_named

    return open_named(str(model), dtype, torch.device(device))


def _register_config(class_name: str, module: ModuleType) -> None:
    from transformers import AutoConfig

    config_class = getattr(module, f"{class_name}Config")
    config_class.register_for_auto_class()
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _register_model(class_name: str, module: ModuleType) -> None:
    from transformers import AutoModelForCausalLM

    model_class = getattr(module, f"{class_name}ForCausalLM")
    model_class.register_for_auto_class("AutoModelForCausalLM")
    AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)


def _load(name: str, _before: ModuleType) -> None:
    importlib.import_module(name)


for _name, (_class_name, _before) in ARCHITECTURES.items():
    for _kind, _register in (("configuration", _register_config), ("modeling", _register_model)):
        _module = f"compress.models.{_kind}_{_name}"
        wrapt.register_post_import_hook(partial(_register, _class_name), _module)
        wrapt.register_post_import_hook(partial(_load, _module), _before.format(kind=_kind))
