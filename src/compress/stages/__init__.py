"""Stages, one file each: a configuration, a plan of sizes, and one `apply` at one kind of site.

A stage names the statistics it needs and the stages that must come before it; nothing outside its file names it.
"""

import importlib
import pkgutil

from compress.stages._stage import StageConfig


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def stage_class(name: str) -> type[StageConfig]:
    """Find a stage by name: `fold_norms` is `FoldNorms` in stages/fold_norms.py."""
    class_name = "".join(word.capitalize() for word in name.split("_"))
    found: type[StageConfig] = getattr(importlib.import_module(f"compress.stages.{name}"), class_name)
    return found
