"""`compress slim`: linear layers in fewer bits, sparse, with adapters for what they lose."""

from typing import Annotated, Literal

from compress.cli.compressing import RunOptions
from compress.cli.options import Amounts, Method, Output, in_panel, with_options
from compress.cli.recipes import Draft, check_method
from compress.cli.reporting import reporting_errors
from compress.cli.storing import (
    ACT_ORDER,
    ASYMMETRIC,
    GROUP,
    INPUTS,
    MATERIALIZE,
    REFIT,
    TARGET,
    amount_of,
    put_bits,
    put_storage,
)
from compress.errors import Problems

BITS = "Weight precision: 2 to 8 bits, fp8, or none. Default: 4."
SPARSITY = "Weight sparsity: 2:4 and its like, an unstructured share such as 50%, or none. Default: 2:4."
RANK = "Rank of the low-rank adapters: a share of each matrix's full rank below 1, or a number; 0: none. Default: 0.1."
METHOD = (
    "anchored: ours (ADMM, GPTQ, adapters fitted to the dense model). slim: the paper's (Wanda, SLiM-Quant, SLiM-LoRA)."
)
FAST = "anchored: 20 iterations of ADMM instead of 48, and one round of the adapter."
COMPACT = "Store it as small as we can, in our own architecture: 2:4 in 4 bits takes 2.75 bits a weight and scales."
FAST_ITERATIONS = 20
POLISH = 3  # rounds without an adapter; with one, every round of it polishes again


@reporting_errors
@with_options(RunOptions)
def slim_model(
    run: RunOptions,
    bits: Annotated[str | None, in_panel(Amounts, BITS)] = None,
    sparsity: Annotated[str | None, in_panel(Amounts, SPARSITY)] = None,
    adapter_rank: Annotated[float | None, in_panel(Amounts, RANK)] = None,
    group: Annotated[str | None, in_panel(Amounts, GROUP)] = None,
    inputs: Annotated[Literal["fp8", "int8"] | None, in_panel(Amounts, INPUTS)] = None,
    method: Annotated[Literal["anchored", "slim"], in_panel(Method, METHOD)] = "anchored",
    refit: Annotated[bool | None, in_panel(Method, REFIT, flag="--refit/--no-refit")] = None,
    fast: Annotated[bool, in_panel(Method, FAST, flag="--fast")] = False,
    act_order: Annotated[bool, in_panel(Method, ACT_ORDER, flag="--act-order")] = False,
    asymmetric: Annotated[bool, in_panel(Method, ASYMMETRIC, flag="--asymmetric")] = False,
    target: Annotated[str | None, in_panel(Method, TARGET)] = None,
    compact: Annotated[bool, in_panel(Output, COMPACT, flag="--compact")] = False,
    materialize: Annotated[bool, in_panel(Output, MATERIALIZE, flag="--materialize")] = False,
) -> None:
    """Quantize and prune linear layers, with low-rank adapters that correct the error (SLiM and past it).

    Example: compress slim --model llama-2-7b --bits 4 --sparsity 2:4 --adapter-rank 0.1
    """
    problems, draft = Problems(), Draft.preset("slim-anchored" if method == "anchored" else "slim")
    with problems.collect():
        check_method("anchored", method, fast=fast)
        put_bits(draft, bits)
        put_sparsity(draft, sparsity)
        put_adapters(draft, adapter_rank)
        switches = {"act_order": act_order, "asymmetric": asymmetric, "compact": compact, "materialize": materialize}
        put_storage(draft, group=group, inputs=inputs, refit=refit, target=target, **switches)
        if fast:
            hurry(draft)
    run.compress(draft, problems, verb="slim", amount=amount_of)


def put_sparsity(draft: Draft, sparsity: str | None) -> None:
    if sparsity == "none":
        draft.remove("slim.prune", "--sparsity none")
    else:
        draft.set("slim.prune.pattern", sparsity, f"--sparsity {sparsity}")


def put_adapters(draft: Draft, rank: float | None) -> None:
    """1 is a rank, 0.99 a share of it."""
    if rank == 0:
        draft.remove("slim.adapt", "--adapter-rank 0")
        stage = draft.stage("slim")
        stage |= {"polish": POLISH} if "polish" in stage else {}
    elif rank is not None:
        draft.set("slim.adapt.rank", int(rank) if rank.is_integer() else rank, f"--adapter-rank {rank:g}")


def hurry(draft: Draft) -> None:
    stage = draft.stage("slim")
    if "prune" in stage:
        stage["prune"]["iterations"] = FAST_ITERATIONS
    if "adapt" in stage:
        stage["adapt"]["rounds"] = 1
