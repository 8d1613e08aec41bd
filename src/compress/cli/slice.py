"""`compress slice`: a narrower residual stream."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from compress.cli.amounts import SLICING, Amount, parse_amount
from compress.cli.options import Amounts, Method, Output, in_panel
from compress.cli.reporting import reporting_errors
from compress.cli.run_options import RunOptions, TrialSamples, with_run_options
from compress.errors import Faults, UsageError

RATIO = "Share of the hidden size to delete: 0.25; from first to last block, 0.1:0.3; or one a block, 0.1,0.2"
KEEP = "Share of all parameters to keep, a promise: hidden size and MLP width are chosen."
SIZE = "Bytes the weights may take on disk, a promise: 4GB. Chosen as with --keep-params."
ENERGY = "Keep what holds this share of the stream's energy."
METHOD = "anchored: ours, refitted to the dense model. slicegpt: the paper's, a rotation a layer."
ROTATION = "One basis for the whole stream, which keeps a stock shape, or one a layer with shortcuts. Default: shared."
REFIT = "Solve readers and writers of the stream again, towards the dense model. Default: --refit."
GRADIENT = "How much the shared basis goes by the loss's gradient; 0: by variance alone. Default: 0.9."
MLP = "Share of each MLP's neurons to delete; chosen under a budget."
KV = "Share of the KV groups to delete, with their query heads."
ALLOCATION = "Under a budget: as many neurons in every block, or free, beyond any stock shape. Default: uniform."
SIGNAL = "slicegpt: principal components of the stream before or after the norm. Default: stream."
ORIENTATION = "slicegpt: span the kept space by its components, or rotated at random. Default: pca."
HEAD = "slicegpt: slice the head's input as well."
ROUND = "Widths are rounded down to a multiple. Default: what suits the architecture."
EXPORT = "gguf: also a GGUF file for llama.cpp, for llama-shaped results."


@reporting_errors
@with_run_options()
def slice_model(
    run: RunOptions,
    ratio: Annotated[str | None, in_panel(Amounts, RATIO)] = None,
    keep_params: Annotated[float | None, in_panel(Amounts, KEEP)] = None,
    target_size: Annotated[str | None, in_panel(Amounts, SIZE)] = None,
    explained_variance: Annotated[float | None, in_panel(Amounts, ENERGY)] = None,
    mlp_ratio: Annotated[float | None, in_panel(Amounts, MLP)] = None,
    kv_ratio: Annotated[float | None, in_panel(Amounts, KV)] = None,
    round_to: Annotated[int | None, in_panel(Amounts, ROUND, min=1)] = None,
    method: Annotated[Literal["anchored", "slicegpt"], in_panel(Method, METHOD)] = "anchored",
    rotation: Annotated[Literal["shared", "per-layer"] | None, in_panel(Method, ROTATION)] = None,
    refit: Annotated[bool | None, in_panel(Method, REFIT, flag="--refit/--no-refit")] = None,
    gradient_weight: Annotated[float | None, in_panel(Method, GRADIENT)] = None,
    allocation: Annotated[Literal["uniform", "free"] | None, in_panel(Method, ALLOCATION)] = None,
    trial_samples: TrialSamples = None,
    signal: Annotated[Literal["stream", "normed"] | None, in_panel(Method, SIGNAL)] = None,
    final_orientation: Annotated[Literal["pca", "random"] | None, in_panel(Method, ORIENTATION)] = None,
    slice_head: Annotated[bool | None, in_panel(Method, HEAD, flag="--slice-head")] = None,
    export: Annotated[Literal["hf", "gguf"], in_panel(Output, EXPORT)] = "hf",
) -> None:
    """Make a model narrower: fewer dimensions of the residual stream, fewer neurons (SliceGPT and past it).

    Example: compress slice --model llama-2-7b --keep-params 0.75
    """
    typed = {"ratio": ratio, "keep_params": keep_params, "target_size": target_size}
    how: dict[str, dict[str, Any]] = {
        "anchored": {
            "rotation": rotation,
            "refit": refit,
            "gradient_weight": gradient_weight,
            "mlp_ratio": mlp_ratio,
            "kv_ratio": kv_ratio,
            "allocation": allocation,
        },
        "slicegpt": {"signal": signal, "final_orientation": final_orientation, "slice_head": slice_head},
    }
    faults = Faults()
    with faults.noted():
        amount = parse_amount({**typed, "explained_variance": explained_variance}, SLICING, trial_samples)
    with faults.noted():
        mine = options_of(method, how)
        if allocation == "free" and (mlp_ratio is not None or (keep_params is None and target_size is None)):
            raise UsageError("--allocation free spends a budget on neurons: give --keep-params or --target-size alone.")
    resources = run.check(faults)
    common = {"round_to": round_to}
    recipe = run.recipe(
        resources.source,
        method,
        stages_of(method, amount, {**mine, **common, "measure_error": run.measure_error}),
        budget=amount.budget and {**amount.budget, "allocation": allocation or "uniform"},
    )
    trials = {"trial_samples": trial_samples} if amount.budget else {}
    spelled = {**amount.typed, **mine, **common, **trials, "export": export}
    command = run.command("slice", method, resources.source, recipe, spelled)
    run.deliver(resources, recipe, amount=amount.in_name, command=command, export=export)


def options_of(method: str, how: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The given options of a method. Raises UsageError where one of another method is given."""
    for other, options in how.items():
        given = [name for name, value in options.items() if value is not None]
        if other != method and given:
            flag = given[0].replace("_", "-")
            raise UsageError(f"--{flag} is an option of --method {other}, not of {method}. Leave one of them out.")
    mine = {name: value for name, value in how[method].items() if value is not None}
    for name in ("mlp_ratio", "kv_ratio"):
        if not 0 < mine.get(name, 0.5) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is a share above 0 and below 1, got {mine[name]}. Try 0.25.")
    if not 0 <= mine.get("gradient_weight", 0) < 1:
        raise UsageError(f"--gradient-weight is from 0 up to below 1, got {mine['gradient_weight']}. Try 0.9.")
    return mine


def stages_of(method: str, amount: Amount, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the method does, as a recipe has it."""
    from compress.recipe import anchored, slicegpt

    if method == "slicegpt":
        return slicegpt(amount.rule, **options)
    own = dict(options)
    mlp, kv, _ = (own.pop(name, None) for name in ("mlp_ratio", "kv_ratio", "allocation"))
    units = {kind: {"ratio": ratio} for kind, ratio in (("neurons", mlp), ("kv_groups", kv)) if ratio is not None}
    if amount.budget:
        units = {"neurons": {}, **units}  # open, unless it is said
    return anchored(amount.rule, units=units, **own)
