"""README.md of a checkpoint, its model card: what it is, how it was made and how to load it.

The text is card.md.jinja, filled from compress.json and quality.json. Names and commands in these come from users: an
`Untrusted` string can neither end what it stands in nor begin anything else.

The hub knows a model by `base_model` and how it came of it, `base_model_relation`: adapter, merge, quantized or
finetune. A pruned or factorized model is to it a finetune; without the key it would guess, by a GGUF file for instance.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoints.metadata import AdapterMetadata, Metadata, Origin
from compress.checkpoints.quality import Quality
from compress.errors import OutputError
from compress.io import atomic_write
from compress.models.packing import VLLM_RANKS
from compress.models.untrusted import parse_yaml

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = "README.md"
PLOTS = "plots"  # a folder beside it
PICTURE = re.compile(r"[A-Za-z0-9-]+\.png")
TEMPLATE = Path(__file__).with_name("card.md.jinja")
SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&$!])")
TICKS = re.compile("`+")
# The classes NAMEForCausalLM that vLLM was seen to run (docs/engines.md), `Compress` by its Transformers backend.
ADAPTED_BY_VLLM = ("Llama", "Mistral", "Qwen2", "Qwen3")  # with an adapter, too
OTHERS_BY_VLLM = ("Compress", "DeciLM", "GPTBigCode", "GPTNeoX", "Gemma", "OPT", "Phi", "Phi3", "Starcoder2")
RUN_BY_VLLM = ADAPTED_BY_VLLM + OTHERS_BY_VLLM
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
PASSED_ON = tuple(Origin.model_fields)
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
        line, fence = " ".join(self.split()).replace("|", "\N{BROKEN BAR}"), self._fence(1)
        return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"

    @property
    def block(self) -> str:
        return f"{self._fence(3)}\n{str.__str__(self)}\n{self._fence(3)}"

    def _fence(self, least: int) -> str:
        return "`" * max([least, *(1 + len(ticks) for ticks in TICKS.findall(self))])


def untrusted(value: Any) -> Any:
    """JSON with every string untrusted, keys apart."""
    if isinstance(value, str):
        return Untrusted(value)
    if isinstance(value, Mapping):
        return {key: untrusted(each) for key, each in value.items()}
    return [untrusted(each) for each in value] if isinstance(value, (list, tuple)) else value


def model_card(metadata: Metadata, quality: Quality | None = None, pictures: Sequence[str] = ()) -> str:
    """Fill the template. quality: measured since. pictures: files of the folder named by letters, digits and dashes."""
    from huggingface_hub import ModelCard

    tuning, linears = metadata.tuning, metadata.linears
    narrowed = [point for point in metadata.points if point.width < point.dense_width]
    measures = [] if quality is None else quality.measures
    card = ModelCard.from_template(
        card_data(metadata),
        str(TEMPLATE),
        metadata=untrusted(metadata.model_dump()),
        commands=Untrusted(metadata.command if tuning is None else f"{metadata.command}\n{tuning.command}"),
        measures=[{"name": Untrusted(each.name), "text": each.text} for each in measures],
        pictures=[{"name": Path(each).stem.replace("-", " "), "file": each} for each in pictures],
        widths={point.width for point in narrowed},
        dense_widths={point.dense_width for point in metadata.points},
        ranks=[linear.rank for linear in linears if linear.form and linear.rank],
        coded=untrusted([each.model_dump() for each in linears if each.bits or each.pattern]),
        not_for_vllm=Untrusted(why_not_vllm(metadata) or ""),
        vllm_rank=vllm_rank(metadata.adapter),
        perplexity=perplexity,
    )
    return f"{card}\n"


def card_as_html(metadata: Metadata) -> dict[str, str]:
    """The sections of the card as HTML, by their headings; "" is what comes before the first.

    Nothing in it is a link, a picture or HTML of somebody else's, whatever the escaping does.
    """
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
    tokens = reader.parse(FRONT_MATTER.sub("", model_card(metadata), count=1))
    sections, heading = {"": list[Any]()}, ""
    for place, token in enumerate(tokens):
        if token.type == "inline" and tokens[place - 1].type == "heading_open":
            heading = token.content if tokens[place - 1].tag == "h2" else heading
            sections.setdefault(heading, [])
        elif not token.type.startswith("heading"):
            sections[heading].append(token)
    return {name: reader.renderer.render(found, reader.options, {}) for name, found in sections.items()}


def card_data(metadata: Metadata) -> "ModelCardData":
    """The front matter. A model from a folder has no id that the hub could link to: it is left out."""
    from huggingface_hub import ModelCardData

    base = metadata.base_model if REPOSITORY.fullmatch(metadata.base_model) else None
    tuned_on = metadata.tuning.data.repository if metadata.tuning else None
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["compress", metadata.recipe.method],
        base_model_relation=None if base is None else "quantized" if metadata.quantized else "finetune",
        datasets=[tuned_on] if tuned_on and REPOSITORY.fullmatch(tuned_on) else None,
        **{key: value for key, value in metadata.origin.to_dict().items() if key in PASSED_ON},
    )


def why_not_vllm(metadata: Metadata) -> str | None:
    """A clause that says why vLLM does not serve it, or that this was not tried; None where it does."""
    adapter, name = metadata.adapter, metadata.architecture.removesuffix("ForCausalLM")
    if metadata.not_for_vllm:
        return f"vLLM cannot serve it: {metadata.not_for_vllm}"
    if adapter and vllm_rank(adapter) is None:
        return f"vLLM cannot serve it: its adapters have a rank of {VLLM_RANKS[-1]} at most"
    if name not in (ADAPTED_BY_VLLM if adapter else RUN_BY_VLLM):
        return f"vLLM was not tried with {metadata.architecture}{' and an adapter' if adapter else ''}"
    return None


def vllm_rank(adapter: AdapterMetadata | None) -> int | None:
    """What --max-lora-rank has to be for an adapter; None where there is none, or where vLLM has no such rank."""
    if adapter is None:
        return None
    largest = max([adapter.r, *adapter.rank_pattern.values()])
    return next((rank for rank in VLLM_RANKS if rank >= largest), None)


def perplexity(nats: float) -> float:
    """Of a cross-entropy, however large a file says it is."""
    return math.exp(min(nats, 700))


def write_card(folder: Path, metadata: Metadata, quality: Quality | None = None) -> None:
    """Write or replace the card, with the plots in `plots`. Raises OutputError where it cannot be written."""
    names = sorted(file.name for file in (folder / PLOTS).glob("*.png") if PICTURE.fullmatch(file.name))
    try:
        with atomic_write(folder / CARD) as unfinished:
            text = model_card(metadata, quality, [f"{PLOTS}/{name}" for name in names])
            unfinished.write_text(text, encoding="utf-8")
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
