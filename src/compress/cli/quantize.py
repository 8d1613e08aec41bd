"""`compress slim`: linear layers in few bits, sparse, with adapters. `compress quantize`: in few bits alone. `compress
auto`: name a size, get the best model of that size."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from operator import not_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.compressing import DEPTH, EXPORT, MODEL, TARGET, TYPE, RunOptions, amount_of, keeping_what_is_done
from compress.cli.console import progress_bar, reporting_errors, seeing_interrupts
from compress.cli.options import Amounts, Method, Output, flag_of, names_in, parse_size, with_options
from compress.cli.recipes import Draft, check_method, plain_value
from compress.cli.tables import gigabytes, print_json, print_rows
from compress.errors import Problems, UsageError
from compress.process import launch

if TYPE_CHECKING:
    from compress.pipeline.frontier import Frontier
    from compress.planning.prepare import Job

FLOATS = {
    "fp8": {"num_bits": 8, "type": "float"},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
}
FAST_ITERATIONS = 20
FEW_BITS = ("2", "3")  # where zero points are worth their bytes
POLISH = 3  # rounds without an adapter; with one, every round of it polishes again

GROUP = (
    "Quantization granularity: tensor, channel, a group size, or 128x128 blocks of fp8. Default: 128, or channel where "
    "128 is no divisor."
)
INPUTS = "Quantize activations too, per token, at run time: fp8 with fp8 weights, int8 with integer weights."
REFIT = "Solve every linear again, toward the dense model, before it is compressed. Default: --refit for our methods."
ACT_ORDER = "GPTQ in order of decreasing activation (desc_act), groups as they lie. Default: --act-order."
ASYMMETRIC = (
    "Asymmetric quantization, with zero points. Default: of packed weights in 2 or 3 bits alone (compress quantize)."
)
HEAD_BITS = "Bits of the head, 2 to 8, where it is not the embeddings' table. Default: it stays in the model's dtype."
EMBEDDING_BITS = (
    "Bits of the embeddings' table, which have to be the linears'; transformers unpacks it while it loads. Default: it "
    "stays in the model's dtype."
)
COMPACT = (
    "Store it as small as we can, in our own architecture: 2:4 in 4 bits takes 2.75 bits a weight and scales. Default: "
    "packed, as compressed-tensors reads it."
)
MATERIALIZE = "Write the compressed weights as dense ones: a stock model of the old size, for any engine."


ORDERS = {True: "weight", False: "none"}
BITS = "Weight precision: 2 to 8 bits, fp8, nvfp4 or mxfp4. Default: 4."


@dataclass(frozen=True, kw_only=True)
class StorageOptions(RunOptions):
    """What both commands take: fields of the `slim` stage."""

    group: Annotated[str | None, Amounts(GROUP)] = None
    inputs: Annotated[Literal["fp8", "int8"] | None, Amounts(INPUTS, sets="slim.input_activations")] = None
    refit: Annotated[bool | None, Method(REFIT, "--refit/--no-refit")] = None
    act_order: Annotated[bool | None, Method(ACT_ORDER, sets=("slim.quantize.actorder", ORDERS.get))] = None
    asymmetric: Annotated[bool | None, Method(ASYMMETRIC, sets=("slim.quantize.symmetric", not_))] = None
    target: Annotated[str | None, Method(TARGET, sets=("slim.target", names_in))] = None
    compact: Annotated[bool, Output(COMPACT, "--compact", sets=("slim.form", "compact"))] = False
    materialize: Annotated[bool, Output(MATERIALIZE, "--materialize", sets=("slim.form", "dense"))] = False
    type_: Annotated[str | None, Amounts(TYPE, "--type", sets="slim.quantize.gguf_type")] = None
    head_bits: Annotated[int | None, Amounts(HEAD_BITS, sets="quantize_embeddings.head_bits")] = None
    embedding_bits: Annotated[int | None, Amounts(EMBEDDING_BITS, sets="quantize_embeddings.embedding_bits")] = None

    def put(self, draft: Draft, bits: str | None) -> None:
        """Put the bits and the refit in. Raises UsageError for options that say what --type says too."""
        others = ("group", "inputs", "asymmetric", "compact", "materialize", "head_bits", "embedding_bits")
        given = ["--bits"] if bits else [flag_of(name) for name in others if getattr(self, name) not in (None, False)]
        if self.type_ is not None and given:
            raise UsageError(f"{given[0]} has no effect with --type, which says all of that. Leave one out.")
        put_bits(draft, bits)
        if self.group is not None:
            size = plain_value(self.group)
            word = "group" if isinstance(size, int) else "block" if size == "128x128" else size
            for field, value in {"strategy": word, "group_size": size if word == "group" else None}.items():
                draft.set(f"slim.quantize.{field}", value, f"--group {self.group}")
        if (self.head_bits, self.embedding_bits) != (None, None):
            draft.stages.append({"stage": "quantize_embeddings"})
        if self.refit and not any(entry["stage"] == "refit" for entry in draft.stages):
            draft.stages.insert(0, {"stage": "refit"})
        if self.refit is False:
            draft.remove_stage("refit")


def put_bits(draft: Draft, bits: str | None) -> None:
    """2 to 8, `fp8`, `nvfp4`, `mxfp4`, or `none`, which leaves the weights as they are."""
    flag = f"--bits {bits}"
    if bits == "none":
        draft.remove("slim.quantize", flag)
    elif bits in FLOATS:
        quantize = draft.stage("slim")["quantize"]
        if quantize["method"] == "slim":  # which is of integers
            quantize["method"] = "mse"
        for field, value in FLOATS[bits].items():
            draft.set(f"slim.quantize.{field}", value, flag)
    elif bits is None or bits.lstrip("-").isdigit():
        draft.set("slim.quantize.num_bits", bits if bits is None else plain_value(bits), flag)
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
    bits: Annotated[str | None, Amounts(BITS.replace(" or mxfp4", ", mxfp4, or none"))] = None,
    sparsity: Annotated[str | None, Amounts(SPARSITY)] = None,
    adapter_rank: Annotated[float | None, Amounts(RANK)] = None,
    method: Annotated[Literal["anchored", "slim"], Method(SLIM_METHOD)] = "anchored",
    fast: Annotated[bool, Method(FAST, "--fast")] = False,
    export: Annotated[Literal["hf", "gguf"], Output(EXPORT)] = "hf",
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
        if run.type_ is not None and (sparsity, adapter_rank) != ("none", 0):
            raise UsageError(
                "A GGUF file has no adapters, and pruned weights take as much room there as others. With --type, give "
                "--sparsity none --adapter-rank 0, which is compress quantize --type."
            )
        run.put(draft, bits)
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
    bits: Annotated[str | None, Amounts(BITS)] = None,
    method: Annotated[Literal["gptq", "mse", "absmax"] | None, Method(METHOD, sets="slim.quantize.method")] = None,
) -> None:
    """Quantize linear layers, each fitted toward the dense model (GPTQ and past it); --type writes one GGUF file.

    Example: compress quantize --model llama-2-7b --bits 4 --group 128
    """
    problems, draft = Problems(), Draft.preset("quantize" if run.type_ is None else "gguf")
    with problems.collect():
        run.put(draft, bits)
        if method in ("mse", "absmax") and run.act_order is not None:
            raise UsageError(f"--act-order is an option of --method gptq, not of {method}. Leave it out.")
        beside = (run.asymmetric, run.inputs, run.head_bits, run.embedding_bits, run.set_)
        if bits in FEW_BITS and not run.compact and all(each is None for each in beside):
            draft.stage("slim")["quantize"]["symmetric"] = False
    run.compress(draft, problems, verb="quantize", amount=amount_of)


# The best types for a size.

FOR = (
    "What runs the result: llama.cpp, one GGUF file; vllm or transformers, packed linears as compressed-tensors reads "
    "them. Default: llama.cpp, or that of --from."
)
AT_MOST = "Bytes of the weights' files at most: 88.2MB, 4GB. Never exceeded."
LATENCY = (
    "Decode time of a token at most, as a share of the dense model's in llama.cpp on this machine: 0.6. Both are timed "
    "there."
)
TRIALS = "Sets of types to measure, each a forward pass over a few windows. Default: 0, what is predicted is taken."
TIME = "Seconds of --trials at most; what has been found by then is taken."
BETWEEN = "Find the types at twelve sizes, such as 40MB:120MB, and write a table and a picture in place of a model."
FROM = "Take what a --frontier has found, which needs no survey and no trials."


@dataclass(frozen=True, kw_only=True)
class AutoOptions(RunOptions):
    frontier: Annotated[str | None, Amounts(BETWEEN, metavar="LEAST:MOST")] = None
    from_: Annotated[Path | None, Method(FROM, "--from")] = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Raises UsageError unless --frontier says two."""
        words = (self.frontier or "").split(":")
        sizes = [parse_size(word, "--frontier") for word in words] if len(words) == 2 else [0, 0]
        if not 0 < sizes[0] < sizes[1]:
            raise UsageError(f"--frontier {self.frontier}: name two sizes, the smaller one first: 40MB:120MB.")
        return sizes[0], sizes[1]

    def deliver(self, job: "Job", like: Any) -> None:
        job = replace(job, frontier=self.from_)
        if self.frontier is None or self.show_recipe or self.dry_run:
            super().deliver(job, like)
            return
        if launch().count > 1:
            raise UsageError("--frontier runs in one process. Start it without torchrun.")
        from compress.checkpoints.run_folder import RUN
        from compress.pipeline import map_frontier

        kept = keeping_what_is_done("what was found is kept", (job.partial / RUN).exists)
        with kept, seeing_interrupts(), progress_bar("preparing") as progress:
            found = map_frontier(job, self.sizes, progress)
        show_frontier(job, found, as_json=self.json)


@reporting_errors
@with_options(AutoOptions)
def auto_model(
    run: AutoOptions,
    model: Annotated[str | None, typer.Option(help=f"{MODEL} Default: that of --from, else demo.")] = None,
    target_size: Annotated[str | None, Amounts(AT_MOST)] = None,
    target_latency: Annotated[float | None, Amounts(LATENCY, sets="budget.target_latency")] = None,
    for_: Annotated[Literal["llama.cpp", "vllm", "transformers"] | None, Output(FOR, "--for")] = None,
    drop_blocks: Annotated[int | None, Amounts(DEPTH)] = None,
    trials: Annotated[int | None, Method(TRIALS, min=0, sets="budget.trials")] = None,
    time: Annotated[float | None, Method(TIME, sets="budget.trial_seconds")] = None,
) -> None:
    """Find the best types for a size, for one of three engines: each matrix gets its own, by what the loss feels.

    Where types alone do not reach the size, or cost more, blocks are left out.

    Example: compress auto --model llama-2-7b --target-size 3.5GB --for vllm
    """
    problems, data = Problems(), None
    with problems.collect():
        if [target_size, target_latency, run.frontier].count(None) != 2:
            raise UsageError(
                "Say how large by --target-size 88MB, how fast by --target-latency 0.6, or --frontier 40MB:120MB; one "
                "of the three."
            )
        if run.from_ is not None and target_size is None:
            raise UsageError("--from takes one size of a frontier. Say which by --target-size.")
        if drop_blocks and (run.frontier or run.from_):
            raise UsageError("A frontier keeps all blocks. Leave --drop-blocks out.")
    if run.from_ is not None:
        from compress.pipeline.frontier import read_frontier

        with problems.collect():
            data = read_frontier(run.from_).model_dump()
    is_gguf = for_ in (None, "llama.cpp")
    draft = Draft(data["recipe"]) if data is not None else Draft.preset("auto" if is_gguf else "auto-packed")
    if not problems.found:
        with problems.collect():
            if run.frontier is not None:  # whose trials are in the middle
                draft.set("budget.target_size", round(math.sqrt(math.prod(run.sizes))), f"--frontier {run.frontier}")
            elif target_size is not None:
                draft.set(
                    "budget.target_size", parse_size(target_size, "--target-size"), f"--target-size {target_size}"
                )
            else:
                draft.remove("budget.target_size", f"--target-latency {target_latency}")
            if drop_blocks == 0 or run.frontier is not None:
                draft.remove_stage("drop_blocks")
            draft.set("drop_blocks.count", drop_blocks or None, f"--drop-blocks {drop_blocks}")
            if for_ is not None:
                field, value = ("gguf_type", "auto") if is_gguf else ("engine", for_)
                draft.set(f"slim.quantize.{field}", value, f"--for {for_}")
    amount = target_size or ("frontier" if target_latency is None else f"{target_latency:g}-time")
    base = "demo" if data is None else data["base_model"]
    run.compress(draft, problems, verb="auto", amount=lambda _: amount, model=model or base)


def show_frontier(job: "Job", found: "Frontier", *, as_json: bool) -> None:
    if as_json:
        points = [point.to_dict() for point in found.points]
        print_json({"out": str(job.out), "points": points, "factors": found.factors})
        return
    rows = [
        {
            "bytes": f"{point.bytes:,}",
            "size": gigabytes(point.bytes),
            "predicted, nats": f"{point.predicted:.4f}",
            "measured, nats": None if point.measured is None else f"{point.measured:.4f}",
            "mostly": ", ".join(f"{name} x {count}" for name, count in Counter(point.types.values()).most_common(3)),
        }
        for point in found.points
    ]
    print_rows(f"{job.model.name}: {job.out}", rows)
