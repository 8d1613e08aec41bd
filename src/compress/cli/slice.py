"""`compress slice`: a narrower residual stream."""

from typing import Annotated, Literal

from compress.cli.compressing import RunOptions
from compress.cli.options import Amounts, Method, Output, in_panel, with_options
from compress.cli.recipes import SLICING, Amount, Draft, check_method
from compress.cli.reporting import reporting_errors
from compress.errors import Problems

RATIO = "Share of the hidden size to delete: 0.25; from first to last block, 0.1:0.3; or one a block, 0.1,0.2"
KEEP = "Share of all parameters to keep at most; hidden size and MLP width are chosen."
SIZE = "Size of the weights on disk at most: 4GB. Chosen as with --keep-params."
ENERGY = "Keep the principal components that hold this share of the stream's variance."
METHOD = "anchored: ours, refitted to the dense model. slicegpt: the paper's, a rotation per layer."
ROTATION = "One rotation for the whole stream (a stock architecture), or one per layer with shortcuts. Default: shared."
REFIT = "Solve the layers that read and write the stream again, toward the dense model. Default: --refit."
MLP = "Share of the MLP neurons to delete; chosen under a budget."
KV = "Share of the KV groups to delete, with their query heads."
ALLOCATION = "Under a budget: as many neurons in every block, or free, without a stock architecture. Default: uniform."
ROUND = "Round widths down to a multiple. Default: what suits the architecture."
EXPORT = "gguf: also write a GGUF file for llama.cpp (Llama-like architectures)."


@reporting_errors
@with_options(RunOptions)
def slice_model(
    run: RunOptions,
    ratio: Annotated[str | None, in_panel(Amounts, RATIO)] = None,
    keep_params: Annotated[float | None, in_panel(Amounts, KEEP)] = None,
    target_size: Annotated[str | None, in_panel(Amounts, SIZE)] = None,
    explained_variance: Annotated[float | None, in_panel(Amounts, ENERGY)] = None,
    mlp_ratio: Annotated[float | None, in_panel(Amounts, MLP)] = None,
    kv_ratio: Annotated[float | None, in_panel(Amounts, KV)] = None,
    round_to: Annotated[int | None, in_panel(Amounts, ROUND)] = None,
    method: Annotated[Literal["anchored", "slicegpt"], in_panel(Method, METHOD)] = "anchored",
    rotation: Annotated[Literal["shared", "per-layer"] | None, in_panel(Method, ROTATION)] = None,
    refit: Annotated[bool | None, in_panel(Method, REFIT, flag="--refit/--no-refit")] = None,
    allocation: Annotated[Literal["uniform", "free"] | None, in_panel(Method, ALLOCATION)] = None,
    export: Annotated[Literal["hf", "gguf"], in_panel(Output, EXPORT)] = "hf",
) -> None:
    """Slice a model: fewer hidden dimensions, fewer MLP neurons (SliceGPT and past it).

    Example: compress slice --model llama-2-7b --keep-params 0.75
    """
    problems, draft = Problems(), Draft.preset(method)
    with problems.collect():
        amount = Amount.of(
            SLICING,
            ratio=ratio,
            keep_params=keep_params,
            target_size=target_size,
            explained_variance=explained_variance,
        )
    with problems.collect():
        ours = {"rotation": rotation, "refit": refit, "mlp_ratio": mlp_ratio, "kv_ratio": kv_ratio}
        check_method("anchored", method, **ours, allocation=allocation)
    if not problems.found:
        with problems.collect():
            draft.stage("slice").pop("ratio", None)
            amount.put(draft, "slice")
            draft.set("slice.round_to", round_to, f"--round-to {round_to}")
            draft.set("budget.allocation", allocation, f"--allocation {allocation}")
            if method == "anchored":
                change_stages(draft, amount, per_layer=rotation == "per-layer", refit=refit is not False)
                prune(draft, mlp_ratio, kv_ratio)
    run.compress(draft, problems, verb="slice", amount=lambda _: amount.in_name, export=export)


def change_stages(draft: Draft, amount: Amount, *, per_layer: bool, refit: bool) -> None:
    """Of the anchored recipe."""
    if per_layer:
        rotate = {"stage": "rotate", "signal": "normed", "stream": "dense" if refit else "compressed"}
        draft.stages[draft.stages.index(draft.stage("rotate_shared"))] = rotate
    if not refit:
        draft.remove_stage("refit")
    if not amount.is_budget:
        draft.remove_stage("prune_units")


def prune(draft: Draft, mlp_ratio: float | None, kv_ratio: float | None) -> None:
    """Delete told shares of the units; where neurons are left open, the budget decides."""
    for units, option, ratio in (("neurons", "--mlp-ratio", mlp_ratio), ("kv_groups", "--kv-ratio", kv_ratio)):
        if ratio is None:
            continue
        found = [entry for entry in draft.stages if entry.get("units") == units]
        if not found:
            draft.stages.append({"stage": "prune_units", "units": units})
        place = draft.stages.index(found[0]) if found else len(draft.stages) - 1
        draft.set(f"stages.{place}.ratio", ratio, f"{option} {ratio}")
