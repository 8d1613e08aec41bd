"""README.md of a checkpoint: what it is, how it was made, how to load it.

Names and commands come from users. Wherever they stand in the text, they can neither end what they stand in nor begin
anything else.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.checkpoints.adapter import VLLM_RANKS
from compress.checkpoints.facts import Facts
from compress.checkpoints.front_matter import CARD, front_matter
from compress.checkpoints.measures import Measures
from compress.durable import whole
from compress.errors import OutputError

REGISTERS = "import compress  # registers it; without the package, pass trust_remote_code=True"
SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&$!])")
TICKS = re.compile("`+")
TRAINED = {
    "lora": "the weights of a LoRA",
    "factors": "the factors",
    "adapters": "the adapters, beside weights that stayed as they were,",
    "all": "all weights",
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


def model_card(facts: Mapping[str, Any], quality: Measures | None = None) -> str:
    """
    facts: what compress.json holds. quality: what has been measured of it since.
    """
    size, dense = facts["size"], facts["dense_size"]
    calibration = facts["recipe"]["calibration"]
    removed = 1 - size["parameters"] / dense["parameters"]
    share = f"{removed:.1%} removed" if removed >= 0 else f"{-removed:.1%} added"
    return f"""{front_matter(facts)}# {plain_text(facts["name"])}

{plain_text(facts["base_model"])}, made smaller by compress {version_of(facts)} with the method
{code(facts["recipe"]["method"])}: one pass over {calibration["samples"]} windows of {calibration["seq_len"]} tokens of
{code(calibration["source"])}, no training{"" if facts.get("tuning") is None else " up to here"}.{changes(facts)}
{tuned(facts)}
| | parameters | bytes |
|---|---|---|
| dense | {dense["parameters"]:,} | {dense["bytes"]:,} |
| this model | {size["parameters"]:,} ({share}) | {size["bytes"]:,} |

Everything is counted: shortcut matrices, biases, scales, adapters, embeddings, a head that no longer shares the
embeddings' weights.
{storage(facts)}{divergence(facts)}{measured(quality)}
## Load it

{loading(facts)}{serving_gguf(facts)}

## Make it again

{code_block(commands(facts))}

compress.json holds the recipe, versions, fingerprints and a report on every point of the residual stream.
{licence(facts)}
"""


def version_of(facts: Mapping[str, Any]) -> str:
    return plain_text(str(facts["versions"].get("compress", "")))


def rewrite_card(folder: Path, facts: Facts, quality: Measures | None) -> None:
    """The card anew, whole or not at all. Raises OutputError where it cannot be written."""
    try:
        with whole(folder / CARD) as unfinished:
            unfinished.write_text(model_card(facts.model_dump(), quality), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder / CARD} cannot be written ({error}). Free space, or mend its rights.") from error


def tuned(facts: Mapping[str, Any]) -> str:
    """What was trained, on what and towards what, and what became of it."""
    tuning = facts.get("tuning")
    if tuning is None:
        return ""
    data, losses, elsewhere = tuning["data"], tuning["held_out"], tuning["unlike"]
    teacher = tuning["teacher"]
    towards = "its next tokens" if teacher is None else f"the distribution of {code(teacher)} on it"
    steps = f"{tuning['steps']:,} steps, the best of them number {tuning['best_step']:,}."
    before, after = (f"{math.exp(losses[when]):.2f}" for when in ("before", "after"))
    said = [
        f"Then {TRAINED[tuning['trained']]} were trained towards {towards}, on {data['windows']:,} windows of "
        f"{data['seq_len']:,} tokens of {code(data['source'])}:",
        f"{steps} On windows of that text held out, perplexity went from {before} to {after}.",
    ]
    if elsewhere is not None:
        rise = math.expm1(elsewhere["after"] - elsewhere["before"])
        said += [f"On {code(elsewhere['source'])}, which it was not trained on, it changed by {rise:+.1%}."]
        said += ["**That is worse: keep to texts of the kind that it was trained on.**"] if elsewhere["worse"] else []
    if data["licence"]:
        said += [f"The licence of {code(data['source'])} is {data['licence']}: it may bind what was trained on it."]
    return "\n" + "\n".join(said) + "\n"


def commands(facts: Mapping[str, Any]) -> str:
    tuning = facts.get("tuning")
    return str(facts["command"]) if tuning is None else f"{facts['command']}\n{tuning['command']}"


def plain_text(value: str) -> str:
    """As text in one line, whatever it holds."""
    return SPECIAL.sub(r"\\\1", " ".join(value.split()))


def code(value: str) -> str:
    """As code in one line, whatever it holds."""
    line = " ".join(value.split()).replace("|", "\N{BROKEN BAR}")
    fence = "`" * (1 + longest(line))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def code_block(value: str) -> str:
    fence = "`" * max(3, 1 + longest(value))
    return f"{fence}\n{value}\n{fence}"


def longest(text: str) -> int:
    """Of the runs of backticks in it."""
    return max(map(len, TICKS.findall(text)), default=0)


def changes(facts: Mapping[str, Any]) -> str:
    """A sentence on what of the model is not as it was."""
    found = [each for each in (narrower(facts["points"]), *thinner(facts), *coded(facts)) if each]
    return f"\n{'; '.join(found)}." if found else ""


def narrower(points: Iterable[Mapping[str, Any]]) -> str:
    widths = {point["width"] for point in points if point["width"] < point["dense_width"]}
    dense = {point["dense_width"] for point in points}
    if not widths:
        return ""
    return f"Its residual stream is {span(widths)} wide instead of {span(dense)}"


def thinner(facts: Mapping[str, Any]) -> list[str]:
    ranks = [linear["rank"] for linear in facts["linears"] if linear.get("form") and linear.get("rank")]
    if not ranks:
        return []
    said = f"{len(ranks)} of its linear layers are products of two thinner ones, of rank {span(ranks)}"
    return [said + (", multiplied out" if facts["loads_without_our_code"] else "")]


def coded(facts: Mapping[str, Any]) -> list[str]:
    linears = [linear for linear in facts["linears"] if linear.get("bits") or linear.get("pattern")]
    if not linears:
        return []
    bits, pattern, rank = (linears[0].get(key) for key in ("bits", "pattern", "adapter_rank"))
    said = [f"have {plain_text(bits) if isinstance(bits, str) else f'{bits}-bit'} weights"] if bits else []
    said += [f"are pruned to {plain_text(pattern)}"] if pattern else []
    said += ["have a low-rank adapter that corrects the error"] if rank else []
    written = "" if facts["storage"] else ", all written as dense weights"
    return [f"{len(linears)} of its linear layers {', '.join(said)}{written}"]


def span(values: Iterable[int]) -> str:
    least, largest = min(found := list(values)), max(found)
    return f"{least:,}" if least == largest else f"{least:,} to {largest:,}"


def divergence(facts: Mapping[str, Any]) -> str:
    found = facts["held_out_divergence"]
    if found is None:
        return ""
    return f"""
On calibration windows that nothing was fitted on, its next-token distribution diverges from the dense model's by
{found:.3f} nats a token (Kullback-Leibler).
"""


def measured(quality: Measures | None) -> str:
    """What was measured since, as a table."""
    measures = [] if quality is None else quality.listed()
    if not measures:
        return ""
    rows = "\n".join(f"| {plain_text(each.name)} | {each.text} |" for each in measures)
    return f"""
## Measured

| | ± standard error |
|---|---|
{rows}
"""


def storage(facts: Mapping[str, Any]) -> str:
    """What of the stored linears, and what would take as many bytes."""
    if not facts["alternatives"]:
        return ""
    rows = "\n".join(
        f"| {plain_text(each['name'])} | {each['bits_per_weight']:.2f} | {each['bytes']:,} |"
        for each in facts["alternatives"]
    )
    return f"""
Of the linear layers that are stored in fewer bits, and what else takes about as many bytes:

| stored as | bits a weight, all counted | bytes of the model |
|---|---|---|
{rows}
"""


def licence(facts: Mapping[str, Any]) -> str:
    origin = facts.get("origin") or {}
    named = origin.get("license_name") or origin.get("license")
    if named:
        return f"The licence is the base model's: {code(named)}."
    return "The licence is the base model's; the card of the model that was compressed named none."


def loading(facts: Mapping[str, Any]) -> str:
    return adapted(facts) if facts["adapter"] else plain(facts)


def serving_gguf(facts: Mapping[str, Any]) -> str:
    if facts.get("export") != "gguf":
        return ""
    return "\n\nWith llama.cpp, from the GGUF file in this folder:\n\n```\nllama-cli -m PATH/*.gguf\n```"


def why_not_vllm(facts: Mapping[str, Any]) -> str | None:
    """Why vLLM does not serve it; None where it does."""
    if facts["not_for_vllm"]:
        return plain_text(facts["not_for_vllm"])
    if facts["architecture"] not in IN_VLLM:
        return f"it has no {facts['architecture']}"
    if facts["adapter"] and facts["architecture"] in WITHOUT_ADAPTERS:
        return f"it has no adapters for {facts['architecture']}"
    return None


def adapted(facts: Mapping[str, Any]) -> str:
    """For a checkpoint with an adapter beside it."""
    stock = facts["loads_without_our_code"]
    what = "A plain" if stock else "In an architecture of its own, whose code is in this folder: a"
    ours = "" if stock else f"{REGISTERS}\n"
    return f"""{what} `{facts["architecture"]}` and, in `adapter/`, a LoRA that corrects its error. Both in one
call, from the packed weights, with compress:

```python
import compress
from transformers import AutoTokenizer

model = compress.load("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

With transformers and peft, the weights unpacked:

```python
{ours}from peft import PeftModel
from transformers import AutoModelForCausalLM{", CompressedTensorsConfig" if facts["quantized"] else ""}

model = AutoModelForCausalLM.from_pretrained("PATH"{unpacking(facts)})
model = PeftModel.from_pretrained(model, "PATH/adapter")
```

{serving(facts)}"""


def unpacking(facts: Mapping[str, Any]) -> str:
    return ", quantization_config=CompressedTensorsConfig(dequantize=True)" if facts["quantized"] else ""


def serving(facts: Mapping[str, Any]) -> str:
    if reason := why_not_vllm(facts):
        return f"vLLM cannot serve it: {reason}."
    ranks = [facts["adapter"]["r"], *facts["adapter"]["rank_pattern"].values()]
    rank = next(rank for rank in VLLM_RANKS if rank >= max(ranks))
    return f"""With vLLM; requests name the model `corrected`:

```
vllm serve PATH --enable-lora --lora-modules corrected=PATH/adapter --max-lora-rank {rank}
```"""


def plain(facts: Mapping[str, Any]) -> str:
    stock, unpacks = facts["loads_without_our_code"], facts["unpacks_while_loading"]
    said = [f"A plain `{facts['architecture']}`: whatever loads that class loads this, transformers among them."]
    if not stock:
        said = ["In an architecture of its own, whose code is in this folder."]
        if any(linear.get("form") for linear in facts["linears"]):
            said += ["For engines that know no factors, `--materialize` writes the stock model, multiplied out."]
    if facts["quantized"] and facts["storage"] == "packed":
        said += ["For its packed weights transformers needs compressed-tensors."]
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer"
        + (", CompressedTensorsConfig" if unpacks else ""),
        *([] if stock else [REGISTERS]),
        "",
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{unpacking(facts) if unpacks else ""})',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
    ]
    shown = " ".join(said) + "\n\n```python\n" + "\n".join(lines) + "\n```"
    return f"{shown}\n\n{serving_plain(facts)}" if stock else shown


def serving_plain(facts: Mapping[str, Any]) -> str:
    if reason := why_not_vllm(facts):
        return f"vLLM cannot serve it: {reason}."
    return "With vLLM:\n\n```\nvllm serve PATH\n```"
