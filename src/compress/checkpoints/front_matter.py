"""The metadata at the top of a model card, as the hub reads it, and what of it comes from the input's own card.

The hub knows a model by `base_model` and how it came of it, `base_model_relation`: adapter, merge, quantized or
finetune. A pruned or factorised model is to it a finetune; left to itself it would guess, by a GGUF file for instance.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.models.yaml_text import parse_yaml

CARD = "README.md"
BLOCK = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
PASSED_ON = ("license", "license_name", "license_link", "language")
LOOKED_AT = 2**16  # characters of a card
LONGEST = 200  # of a value


def front_matter(facts: Mapping[str, Any]) -> str:
    """Between two lines of dashes. A model from a folder has no id that the hub could link to: it is left out."""
    from huggingface_hub import ModelCardData

    base = facts["base_model"] if REPOSITORY.fullmatch(facts["base_model"]) else None
    relation = None if base is None else "quantized" if facts["quantized"] else "finetune"
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["compress", facts["recipe"]["method"]],
        base_model_relation=relation,
        datasets=trained_on(facts),
        **facts.get("origin", {}),
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n"


def trained_on(facts: Mapping[str, Any]) -> list[str] | None:
    """The data set of the hub that the checkpoint was tuned on."""
    repository = (facts.get("tuning") or {}).get("data", {}).get("repository")
    return [repository] if repository and REPOSITORY.fullmatch(repository) else None


def read_origin(folder: Path) -> dict[str, Any]:
    """Licence and language from the card of the model in a folder; empty where it has none that can be read."""
    try:
        with (folder / CARD).open(encoding="utf-8") as file:
            found = BLOCK.match(file.read(LOOKED_AT))
        data = parse_yaml(found[1])[0] if found else None
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: data[key] for key in PASSED_ON if fits(key, data.get(key))}


def fits(key: str, value: Any) -> bool:
    return is_plain(value) or (key == "language" and are_plain(value))


def is_plain(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST and value.isprintable()


def are_plain(values: Any) -> bool:
    return isinstance(values, list) and 0 < len(values) <= LONGEST and all(map(is_plain, values))
