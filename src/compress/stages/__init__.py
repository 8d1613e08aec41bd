"""Stages: a configuration, a plan of sizes, and one `apply` at one kind of site.

A stage names the statistics it needs and the stages that must come before it; nothing outside its file names it.
"""

import functools
import importlib
import pkgutil

from compress.stages._stage import StageConfig


@functools.cache
def classes() -> dict[str, type[StageConfig]]:
    """Every stage by its name, which its field `stage` has: the classes of the files here."""
    found = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    kinds = [
        kind
        for module in map(importlib.import_module, (f"{__name__}.{name}" for name in found))
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, StageConfig) and kind.__module__ == module.__name__
    ]
    return {kind.model_fields["stage"].default: kind for kind in kinds}
