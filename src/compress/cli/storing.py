"""What `slim` and `quantize` share: how their flags change the `slim` stage."""

from typing import TYPE_CHECKING, Any

from compress.cli.options import flag_of
from compress.cli.recipes import Draft, names_in, plain_value

if TYPE_CHECKING:
    from compress.recipe import Recipe

GROUP = "Quantization granularity: tensor, channel, or a group size. Default: 128, or channel where 128 is no divisor."
INPUTS = "Quantize activations too, per token, at run time: fp8 with fp8 weights, int8 with integer weights."
ACT_ORDER = "GPTQ in order of decreasing activation (desc_act)."
ASYMMETRIC = "Asymmetric quantization, with zero points."
TARGET = (
    "Linear layers to compress: all, attention, mlp, or name patterns such as *.down_proj, with commas. Default: all."
)
REFIT = "Solve every linear again, toward the dense model, before it is compressed. Default: --refit for our methods."
MATERIALIZE = "Write the compressed weights as dense ones: a stock model of the old size, for any engine."


def put_bits(draft: Draft, bits: str | None) -> None:
    """2 to 8, `fp8`, or `none`, which leaves the weights as they are."""
    flag = f"--bits {bits}"
    if bits == "none":
        draft.remove("slim.quantize", flag)
    elif bits == "fp8":
        quantize = draft.stage("slim")["quantize"]
        if quantize["method"] == "slim":  # which is of integers
            quantize["method"] = "mse"
        draft.set("slim.quantize.bits", 8, flag)
        draft.set("slim.quantize.floating", True, flag)
    else:
        draft.set("slim.quantize.bits", bits if bits is None else plain_value(bits), flag)


def put_storage(
    draft: Draft,
    *,
    group: str | None,
    inputs: str | None,
    refit: bool | None,
    target: str | None,
    **switches: bool,
) -> None:
    """switches: act_order, asymmetric, compact and materialize."""
    fields = {
        "act_order": ("slim.quantize.act_order", True),
        "asymmetric": ("slim.quantize.symmetric", False),
        "compact": ("slim.form", "compact"),
        "materialize": ("slim.form", "dense"),
    }
    draft.set("slim.quantize.group", group if group is None else plain_value(group), f"--group {group}")
    draft.set("slim.inputs", inputs, f"--inputs {inputs}")
    draft.set("slim.target", names_in(target), f"--target {target}")
    for name, on in switches.items():
        address, value = fields[name]
        draft.set(address, value if on else None, flag_of(name))
    has_refit = any(entry["stage"] == "refit" for entry in draft.stages)
    if refit and not has_refit:
        draft.stages.insert(0, {"stage": "refit"})
    if refit is False:
        draft.remove_stage("refit")


def amount_of(recipe: "Recipe") -> str:
    """Bits, sparsity and adapters, as the default output folder says them."""
    slim: Any = next(stage for stage in recipe.stages if stage.stage == "slim")
    words = []
    if slim.quantize is not None:
        bits = "fp8" if slim.quantize.floating else slim.quantize.bits
        words.append((slim.quantize.gguf_type or f"w{bits}").replace(",", "-").replace("=", "-").replace("*", "x"))
    if slim.prune is not None:
        words.append(slim.prune.pattern.replace(":", "-").replace("%", "pc"))
    if slim.adapt is not None:
        words.append(f"r{slim.adapt.rank:g}")
    return "-".join(words)
