"""`compress lord`: linear layers as products of two thin ones."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from compress.cli.amounts import RANKS, Amount, parse_amount
from compress.cli.options import Amounts, Method, Output, in_panel
from compress.cli.reporting import reporting_errors
from compress.cli.run_options import RunOptions, TrialSamples, with_run_options
from compress.errors import Faults, UsageError

FRAC = "Share of each matrix's full rank to keep. A matrix whose factors would be no smaller stays dense."
RANK = "Rank of every matrix."
KEEP = "Share of all parameters to keep, a promise: ranks are spread over the matrices by what they lose."
SIZE = "Bytes the weights may take on disk, a promise: 4GB. Spread as with --keep-params."
MULTIPLE = "Ranks are rounded down to a multiple. Default: 128, or less for a narrow model."
METHOD = "anchored: ours, refitted to the dense model. lord: the paper's. svd-llm, asvd, svd: for comparison."
ALLOCATION = (
    "uniform: one share for all. energy: least variance lost. fisher: least loss, by its gradient. auto: by trial. "
    "Default: uniform with --rank-frac and --rank and for other methods than anchored, else fisher."
)
TARGET = "all, attention, mlp, or patterns of names such as *.down_proj; several with commas."
FORM = "pivot: the same function in fewer numbers than factors. auto: pivot where it is no slower."
MATERIALIZE = "Multiply the factors out again: a stock model of the old size, for engines that know no factors."
REFIT = "anchored: solve every linear again, towards the dense model, before its rank is cut. Default: --refit."
GRADIENT = "anchored: how much errors count by the loss's gradient; 0: no backward pass. Default: 0.9."
BIAS = (
    "Give linears without a bias one that keeps the mean of their outputs. Default: --bias for lord, as in the paper."
)


@reporting_errors
@with_run_options()
def factorize_model(
    run: RunOptions,
    rank_frac: Annotated[float | None, in_panel(Amounts, FRAC)] = None,
    rank: Annotated[int | None, in_panel(Amounts, RANK, min=1)] = None,
    keep_params: Annotated[float | None, in_panel(Amounts, KEEP)] = None,
    target_size: Annotated[str | None, in_panel(Amounts, SIZE)] = None,
    rank_multiple: Annotated[int | None, in_panel(Amounts, MULTIPLE, min=1)] = None,
    method: Annotated[Literal["anchored", "lord", "svd-llm", "asvd", "svd"], in_panel(Method, METHOD)] = "anchored",
    allocation: Annotated[
        Literal["auto", "uniform", "energy", "mixed", "fisher"] | None, in_panel(Method, ALLOCATION)
    ] = None,
    target: Annotated[str, in_panel(Method, TARGET)] = "all",
    form: Annotated[Literal["auto", "factors", "pivot"], in_panel(Method, FORM)] = "auto",
    refit: Annotated[bool | None, in_panel(Method, REFIT, flag="--refit/--no-refit")] = None,
    gradient_weight: Annotated[float | None, in_panel(Method, GRADIENT)] = None,
    bias: Annotated[bool | None, in_panel(Method, BIAS, flag="--bias/--no-bias")] = None,
    trial_samples: TrialSamples = None,
    materialize: Annotated[bool, in_panel(Output, MATERIALIZE, flag="--materialize")] = False,
) -> None:
    """Factorise linear layers: fewer numbers, less arithmetic (LoRD and past it).

    Example: compress lord --model starcoder --rank-frac 0.6
    """
    typed = {"rank_frac": rank_frac, "rank": rank, "keep_params": keep_params, "target_size": target_size}
    ours = {"refit": refit, "gradient_weight": gradient_weight}
    faults = Faults()
    with faults.noted():
        amount = parse_amount(typed, RANKS, trial_samples)
    with faults.noted():
        check_method(method, allocation, ours, bias=bias, form=form, materialize=materialize)
    resources = run.check(faults)

    from compress.recipe import lowrank

    options: dict[str, Any] = {
        "allocation": allocation or usual_allocation(method, amount),
        "target": [word.strip() for word in target.split(",")],
        "multiple": rank_multiple,
        "form": "dense" if materialize else form,
        "bias": bias,
    }
    if method == "anchored":
        options |= {"refit": refit is not False, "gradient_weight": 0.9 if gradient_weight is None else gradient_weight}
    stages = lowrank(method, amount.rule, measure_error=run.measure_error, **options)
    recipe = run.recipe(resources.source, f"lord-{method}", stages, budget=amount.budget)
    spelled = {**amount.typed, "rank_multiple": rank_multiple, "allocation": options["allocation"], "target": target}
    spelled |= {"form": form, "bias": bias, "materialize": materialize, **ours}
    spelled |= {"trial_samples": trial_samples if amount.budget else None}
    command = run.command("lord", method, resources.source, recipe, spelled)
    run.deliver(resources, recipe, amount=amount.in_name, command=command)


def usual_allocation(method: str, amount: Amount) -> str:
    """By what the loss feels where there is a budget to spend."""
    return "fisher" if amount.budget and method == "anchored" else "uniform"


def check_method(
    method: str,
    allocation: str | None,
    ours: Mapping[str, Any],
    *,
    bias: bool | None,
    form: str,
    materialize: bool,
) -> None:
    """Raises UsageError where options do not go together."""
    given = [name for name, value in ours.items() if value is not None]
    if given and method != "anchored":
        raise UsageError(
            f"--{given[0].replace('_', '-')} is an option of --method anchored, not of {method}. Leave it out."
        )
    weight = ours["gradient_weight"]
    if weight is not None and not 0 <= weight < 1:
        raise UsageError(f"--gradient-weight is from 0 up to below 1, got {weight}. Try 0.9.")
    if allocation == "auto" and method != "anchored":
        raise UsageError(f"--allocation auto compares by trial, which --method {method} cannot. Name another.")
    if bias is not None and method not in ("anchored", "lord"):
        raise UsageError(f"--method {method} adds no bias. Leave --{'' if bias else 'no-'}bias out.")
    if materialize and form != "auto":
        raise UsageError(
            f"--materialize multiplies the factors out, so that --form {form} has no effect. Leave one out."
        )
    if materialize and bias:
        raise UsageError("--materialize writes a stock model, which has no room for added biases. Leave --bias out.")
