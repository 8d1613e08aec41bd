"""`compress slim`: linear layers in fewer bits, sparse, with adapters. `compress quantize`: in fewer bits alone."""

from dataclasses import dataclass
from typing import Annotated, Literal

from compress.cli.compressing import EXPORT, TARGET, TYPE, RunOptions, amount_of
from compress.cli.options import Amounts, Method, Output, flag_of, in_panel, names_in, with_options
from compress.cli.recipes import Draft, check_method, plain_value
from compress.cli.reporting import reporting_errors
from compress.errors import Problems, UsageError

FLOATS = {"fp8": (8, None), "nvfp4": (4, 16), "mxfp4": (4, 32)}  # bits, and inputs that share a scale
FAST_ITERATIONS = 20
POLISH = 3  # rounds without an adapter; with one, every round of it polishes again

GROUP = (
    "Quantization granularity: tensor, channel, a group size, or 128x128 blocks of fp8. Default: 128, or channel where "
    "128 is no divisor."
)
INPUTS = "Quantize activations too, per token, at run time: fp8 with fp8 weights, int8 with integer weights."
REFIT = "Solve every linear again, toward the dense model, before it is compressed. Default: --refit for our methods."
ACT_ORDER = "GPTQ in order of decreasing activation (desc_act)."
ASYMMETRIC = "Asymmetric quantization, with zero points."
COMPACT = (
    "Store it as small as we can, in our own architecture: 2:4 in 4 bits takes 2.75 bits a weight and scales. Default: "
    "packed, as compressed-tensors reads it."
)
MATERIALIZE = "Write the compressed weights as dense ones: a stock model of the old size, for any engine."


@dataclass(frozen=True, kw_only=True)
class StorageOptions(RunOptions):
    """What both commands take: fields of the `slim` stage."""

    group: Annotated[str | None, in_panel(Amounts, GROUP)] = None
    inputs: Annotated[Literal["fp8", "int8"] | None, in_panel(Amounts, INPUTS)] = None
    refit: Annotated[bool | None, in_panel(Method, REFIT, flag="--refit/--no-refit")] = None
    act_order: Annotated[bool, in_panel(Method, ACT_ORDER, flag="--act-order")] = False
    asymmetric: Annotated[bool, in_panel(Method, ASYMMETRIC, flag="--asymmetric")] = False
    target: Annotated[str | None, in_panel(Method, TARGET)] = None
    compact: Annotated[bool, in_panel(Output, COMPACT, flag="--compact")] = False
    materialize: Annotated[bool, in_panel(Output, MATERIALIZE, flag="--materialize")] = False
    type_: Annotated[str | None, in_panel(Amounts, TYPE, flag="--type")] = None

    def put(self, draft: Draft) -> None:
        draft.put("slim.quantize", group=None if self.group is None else plain_value(self.group))
        draft.put("slim", inputs=self.inputs, target=names_in(self.target))
        for name, address, value in (
            ("act_order", "slim.quantize.act_order", True),
            ("asymmetric", "slim.quantize.symmetric", False),
            ("compact", "slim.form", "compact"),
            ("materialize", "slim.form", "dense"),
        ):
            draft.set(address, value if getattr(self, name) else None, flag_of(name))
        draft.set("slim.quantize.gguf_type", self.type_, f"--type {self.type_}")
        if self.refit and not any(entry["stage"] == "refit" for entry in draft.stages):
            draft.stages.insert(0, {"stage": "refit"})
        if self.refit is False:
            draft.remove_stage("refit")

    def check_type(self, bits: str | None) -> None:
        """Raises UsageError for options that say what --type says too."""
        others = ("group", "inputs", "asymmetric", "compact", "materialize")
        given = ["--bits"] if bits else [flag_of(name) for name in others if getattr(self, name)]
        if self.type_ is not None and given:
            raise UsageError(f"{given[0]} has no effect with --type, which says all of that. Leave one out.")


def put_bits(draft: Draft, bits: str | None) -> None:
    """2 to 8, `fp8`, `nvfp4`, `mxfp4`, or `none`, which leaves the weights as they are."""
    flag = f"--bits {bits}"
    if bits == "none":
        draft.remove("slim.quantize", flag)
    elif bits in FLOATS:
        quantize = draft.stage("slim")["quantize"]
        if quantize["method"] == "slim":  # which is of integers
            quantize["method"] = "mse"
        for field, value in zip(("bits", "group", "floating"), (*FLOATS[bits], True), strict=True):
            draft.set(f"slim.quantize.{field}", value, flag)
    elif bits is None or bits.lstrip("-").isdigit():
        draft.set("slim.quantize.bits", bits if bits is None else plain_value(bits), flag)
    else:
        raise UsageError(f"{flag}: there are 2 to 8 bits, {', '.join(FLOATS)}. Name one of them.")


SPARSITY = "Weight sparsity: 2:4 and its like, an unstructured share such as 50%, or none. Default: 2:4."
RANK = "Rank of the low-rank adapters: a share of each matrix's full rank below 1, or a number; 0: none. Default: 0.1."
SLIM_METHOD = (
    "anchored: ours (ADMM, GPTQ, adapters fitted to the dense model). slim: the paper's (Wanda, SLiM-Quant, SLiM-LoRA)."
)
FAST = "anchored: 20 iterations of ADMM instead of 48, and one round of the adapter."


@reporting_errors
@with_options(StorageOptions)
def slim_model(
    run: StorageOptions,
    bits: Annotated[
        str | None, in_panel(Amounts, "Weight precision: 2 to 8 bits, fp8, nvfp4, mxfp4, or none. Default: 4.")
    ] = None,
    sparsity: Annotated[str | None, in_panel(Amounts, SPARSITY)] = None,
    adapter_rank: Annotated[float | None, in_panel(Amounts, RANK)] = None,
    method: Annotated[Literal["anchored", "slim"], in_panel(Method, SLIM_METHOD)] = "anchored",
    fast: Annotated[bool, in_panel(Method, FAST, flag="--fast")] = False,
    export: Annotated[Literal["hf", "gguf"], in_panel(Output, EXPORT)] = "hf",
) -> None:
    """Quantize and prune linear layers, with low-rank adapters that correct the error (SLiM and past it).

    No engine runs 2:4 faster any more: to serve a model, take compress quantize instead.

    Example: compress slim --model llama-2-7b --bits 4 --sparsity 2:4 --adapter-rank 0.1
    """
    ours = "slim-anchored" if run.type_ is None else "gguf"
    problems, draft = Problems(), Draft.preset(ours if method == "anchored" else "slim")
    stage = draft.stage("slim")
    with problems.collect():
        check_method(method, fast=fast, type=run.type_)
        run.check_type(bits)
        if run.type_ is not None and (sparsity, adapter_rank) != ("none", 0):
            raise UsageError(
                "A GGUF file has no adapters, and pruned weights take as much room there as others. With --type, give "
                "--sparsity none --adapter-rank 0, which is compress quantize --type."
            )
        put_bits(draft, bits)
        if sparsity == "none":
            draft.remove("slim.prune", "--sparsity none")
        else:
            draft.set("slim.prune.pattern", sparsity, f"--sparsity {sparsity}")
        if adapter_rank == 0:
            draft.remove("slim.adapt", "--adapter-rank 0")
            stage |= {"polish": POLISH} if "polish" in stage else {}
        elif adapter_rank is not None:  # 1 is a rank, 0.99 a share of it
            rank = int(adapter_rank) if adapter_rank.is_integer() else adapter_rank
            draft.set("slim.adapt.rank", rank, f"--adapter-rank {adapter_rank:g}")
        run.put(draft)
        if fast and "prune" in stage:
            stage["prune"]["iterations"] = FAST_ITERATIONS
        if fast and "adapt" in stage:
            stage["adapt"]["rounds"] = 1
    run.compress(draft, problems, verb="slim", amount=amount_of, export=export)


METHOD = "gptq, or round-to-nearest with scales of least squared error (mse) or by the maximum (absmax). Default: gptq."


@reporting_errors
@with_options(StorageOptions)
def quantize_model(
    run: StorageOptions,
    bits: Annotated[
        str | None, in_panel(Amounts, "Weight precision: 2 to 8 bits, fp8, nvfp4 or mxfp4. Default: 4.")
    ] = None,
    method: Annotated[Literal["gptq", "mse", "absmax"] | None, in_panel(Method, METHOD)] = None,
) -> None:
    """Quantize linear layers, each fitted toward the dense model (GPTQ and past it); --type writes one GGUF file.

    Example: compress quantize --model llama-2-7b --bits 4 --group 128
    """
    problems, draft = Problems(), Draft.preset("quantize" if run.type_ is None else "gguf")
    with problems.collect():
        run.check_type(bits)
        put_bits(draft, bits)
        draft.put("slim.quantize", method=method)
        run.put(draft)
    run.compress(draft, problems, verb="quantize", amount=amount_of)
