"""README.md of a checkpoint, its model card: what it is, how it was made and how to load it.

The text is card.md.jinja, filled from compress.json and quality.json. Names and commands in these come from users: an
`Untrusted` string can neither end what it stands in nor begin anything else.

The hub knows a model by `base_model` and how it came of it, `base_model_relation`: adapter, merge, quantized or
finetune. A pruned or factorized model is to it a finetune; without the key it would guess, by a GGUF file for instance.
"""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.architectures.packed import VLLM_RANKS
from compress.checkpoints.facts import Facts
from compress.checkpoints.measures import Measures
from compress.durable import whole
from compress.errors import OutputError
from compress.models.yaml_text import parse_yaml

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&$!])")
TICKS = re.compile("`+")
TRAINED = {
    "lora": "LoRA weights",
    "factors": "The low-rank factors",
    "adapters": "The low-rank adapters, with all other weights frozen,",
    "all": "All weights",
}
# Of the classes that a result is written in: those that vLLM has, and those for which it has no adapters.
IN_VLLM = (
    "GemmaForCausalLM",
    "GPTBigCodeForCausalLM",
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "OPTForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Starcoder2ForCausalLM",
)
WITHOUT_ADAPTERS = ("GPTNeoXForCausalLM", "Starcoder2ForCausalLM")

FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
PASSED_ON = ("license", "license_name", "license_link", "language")
LOOKED_AT = 2**16  # characters of a card
LONGEST = 200  # of a value


class Untrusted(str):
    """A string that a template prints as escaped text in one line.

    Only printing escapes; the filters of jinja would see the string as it is.
    """

    def __str__(self) -> str:
        return SPECIAL.sub(r"\\\1", " ".join(self.split()))

    @property
    def code(self) -> str:
        """A code span in one line; a bar would end a table's cell."""
        line = " ".join(self.split()).replace("|", "\N{BROKEN BAR}")
        fence = "`" * (1 + self._longest_ticks())
        return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"

    @property
    def block(self) -> str:
        """A fenced code block."""
        fence = "`" * max(3, 1 + self._longest_ticks())
        return f"{fence}\n{str.__str__(self)}\n{fence}"

    def _longest_ticks(self) -> int:
        return max(map(len, TICKS.findall(self)), default=0)


def untrusted(value: Any) -> Any:
    """JSON with every string untrusted, keys apart."""
    if isinstance(value, str):
        return Untrusted(value)
    if isinstance(value, Mapping):
        return {key: untrusted(each) for key, each in value.items()}
    return [untrusted(each) for each in value] if isinstance(value, (list, tuple)) else value


def model_card(facts: Mapping[str, Any], quality: Measures | None = None) -> str:
    """Fill the template.

    facts: what compress.json holds. quality: what has been measured since.
    """
    from huggingface_hub import ModelCard

    tuning = facts.get("tuning")
    commands = facts["command"] if tuning is None else f"{facts['command']}\n{tuning['command']}"
    narrowed = [point for point in facts["points"] if point["width"] < point["dense_width"]]
    measures = [] if quality is None else quality.listed()
    card = ModelCard.from_template(
        card_data(facts),
        str(TEMPLATE),
        facts=untrusted({"origin": {}, **facts}),
        commands=Untrusted(commands),
        measures=[{"name": Untrusted(each.name), "text": each.text} for each in measures],
        widths={point["width"] for point in narrowed},
        dense_widths={point["dense_width"] for point in facts["points"]},
        ranks=[linear["rank"] for linear in facts["linears"] if linear.get("form") and linear.get("rank")],
        coded=untrusted([each for each in facts["linears"] if each.get("bits") or each.get("pattern")]),
        not_for_vllm=Untrusted(why_not_vllm(facts) or ""),
        vllm_rank=vllm_rank(facts),
        trained=TRAINED,
        span=span,
        perplexity=perplexity,
    )
    return f"{card}\n"


def card_data(facts: Mapping[str, Any]) -> "ModelCardData":
    """The front matter. A model from a folder has no id that the hub could link to: it is left out."""
    from huggingface_hub import ModelCardData

    base = facts["base_model"] if REPOSITORY.fullmatch(facts["base_model"]) else None
    tuned_on = (facts.get("tuning") or {}).get("data", {}).get("repository")
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["compress", facts["recipe"]["method"]],
        base_model_relation=None if base is None else "quantized" if facts["quantized"] else "finetune",
        datasets=[tuned_on] if tuned_on and REPOSITORY.fullmatch(tuned_on) else None,
        **facts.get("origin", {}),
    )


def why_not_vllm(facts: Mapping[str, Any]) -> str | None:
    """Why vLLM does not serve it; None where it does."""
    architecture, adapter = facts["architecture"], facts["adapter"]
    if architecture not in IN_VLLM:
        return f"it has no {architecture}"
    if facts["not_for_vllm"]:
        return str(facts["not_for_vllm"])
    if adapter and architecture in WITHOUT_ADAPTERS:
        return f"it has no adapters for {architecture}"
    if adapter and vllm_rank(facts) is None:
        return f"its adapters have a rank of {VLLM_RANKS[-1]} at most"
    return None


def vllm_rank(facts: Mapping[str, Any]) -> int | None:
    """What --max-lora-rank has to be for the adapter; None where there is none, or where vLLM has no such rank."""
    if not facts["adapter"]:
        return None
    largest = max([facts["adapter"]["r"], *facts["adapter"]["rank_pattern"].values()])
    return next((rank for rank in VLLM_RANKS if rank >= largest), None)


def span(values: Collection[int]) -> str:
    least, largest = min(values), max(values)
    return f"{least:,}" if least == largest else f"{least:,} to {largest:,}"


def perplexity(nats: float) -> float:
    """Of a cross-entropy, however large a file says it is."""
    return math.exp(min(nats, 700))


def rewrite_card(folder: Path, facts: Facts, quality: Measures | None) -> None:
    """Replace the card, whole or not at all. Raises OutputError where it cannot be written."""
    try:
        with whole(folder / CARD) as unfinished:
            unfinished.write_text(model_card(facts.model_dump(), quality), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder / CARD} cannot be written ({error}). Free space, or mend its rights.") from error


def read_origin(folder: Path) -> dict[str, Any]:
    """License and language from the card of the model in a folder; empty where it has none that can be read."""
    try:
        with (folder / CARD).open(encoding="utf-8") as file:
            found = FRONT_MATTER.match(file.read(LOOKED_AT))
        data = parse_yaml(found[1])[0] if found else None
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: data[key] for key in PASSED_ON if is_usable(key, data.get(key))}


def is_usable(key: str, value: Any) -> bool:
    """Whether a value is a short line of text, or for the language a list of such."""
    if key == "language" and isinstance(value, list):
        return 0 < len(value) <= LONGEST and all(is_usable("", each) for each in value)
    return isinstance(value, str) and 0 < len(value) <= LONGEST and value.isprintable()
