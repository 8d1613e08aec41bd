"""`compress lord`: linear layers as products of two thin ones."""

from typing import Annotated, Literal

from compress.cli.compressing import RunOptions
from compress.cli.options import Amounts, Method, Output, in_panel, with_options
from compress.cli.recipes import RANKS, Amount, Draft, check_method, names_in
from compress.cli.reporting import reporting_errors
from compress.errors import Problems

FRAC = "Share of each matrix's full rank to keep. A matrix whose factors would be no smaller stays dense."
RANK = "Rank of every matrix."
KEEP = "Share of all parameters to keep at most; ranks are allocated to the matrices by what they lose."
SIZE = "Size of the weights on disk at most: 4GB. Ranks are allocated as with --keep-params."
METHOD = "anchored: ours, refitted to the dense model. lord: the paper's. svd-llm, asvd, svd: for comparison."
ALLOCATION = (
    "uniform: one share for all. energy: least variance lost. fisher: least loss, by its gradient. mixed: half-way "
    "between. auto: the best of these by trial. Default: fisher under a budget with --method anchored, else uniform."
)
TARGET = (
    "Linear layers to compress: all, attention, mlp, or name patterns such as *.down_proj, with commas. Default: all."
)
FORM = "pivot: the same function in fewer parameters than factors. auto: pivot where it is no slower. Default: auto."
MATERIALIZE = "Multiply the factors out again: a stock model of the old size."
REFIT = "anchored: solve every linear again, toward the dense model, before its rank is cut. Default: --refit."
BIAS = (
    "Add the bias that keeps the mean of the outputs to linears without one. Default: --bias for lord, as in the paper."
)


@reporting_errors
@with_options(RunOptions)
def factorize_model(
    run: RunOptions,
    rank_frac: Annotated[float | None, in_panel(Amounts, FRAC)] = None,
    rank: Annotated[int | None, in_panel(Amounts, RANK)] = None,
    keep_params: Annotated[float | None, in_panel(Amounts, KEEP)] = None,
    target_size: Annotated[str | None, in_panel(Amounts, SIZE)] = None,
    method: Annotated[Literal["anchored", "lord", "svd-llm", "asvd", "svd"], in_panel(Method, METHOD)] = "anchored",
    allocation: Annotated[
        Literal["auto", "uniform", "energy", "mixed", "fisher"] | None, in_panel(Method, ALLOCATION)
    ] = None,
    target: Annotated[str | None, in_panel(Method, TARGET)] = None,
    form: Annotated[Literal["auto", "factors", "pivot"] | None, in_panel(Method, FORM)] = None,
    refit: Annotated[bool | None, in_panel(Method, REFIT, flag="--refit/--no-refit")] = None,
    bias: Annotated[bool | None, in_panel(Method, BIAS, flag="--bias/--no-bias")] = None,
    materialize: Annotated[bool, in_panel(Output, MATERIALIZE, flag="--materialize")] = False,
) -> None:
    """Factorize linear layers into low-rank products: fewer parameters, less arithmetic (LoRD and past it).

    Example: compress lord --model starcoder --rank-frac 0.6
    """
    problems, draft = Problems(), Draft.preset("lord-anchored" if method == "anchored" else "lord")
    with problems.collect():
        amount = Amount.of(RANKS, rank_frac=rank_frac, rank=rank, keep_params=keep_params, target_size=target_size)
    with problems.collect():
        check_method("anchored", method, refit=refit)
    if not problems.found:
        with problems.collect():
            draft.data["method"] = f"lord-{method}"
            stage = draft.stage("factorize")
            stage["method"] = method
            stage.pop("rank_frac", None)
            if not amount.is_budget:
                stage.pop("allocation", None)
            amount.put(draft, "factorize")
            draft.set("factorize.allocation", allocation, f"--allocation {allocation}")
            draft.set("factorize.target", names_in(target), f"--target {target}")
            draft.set("factorize.form", form, f"--form {form}")
            draft.set("factorize.form", "dense" if materialize else None, "--materialize")
            draft.set("factorize.bias", bias, "--bias" if bias else "--no-bias")
            if refit is False:
                draft.remove_stage("refit")
    run.compress(draft, problems, verb="lord", amount=lambda _: amount.in_name)
