"""`compress slice`: a narrower residual stream. `compress lord`: linear layers as products of two thin ones."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from compress.cli.compressing import DEPTH, EXPORT, TARGET, TYPE, RunOptions, amount_of
from compress.cli.console import reporting_errors
from compress.cli.options import Amounts, Method, Output, flag_of, names_in, parse_size, with_options
from compress.cli.recipes import Draft, check_method, plain_value
from compress.errors import Problems, UsageError

if TYPE_CHECKING:
    from compress.recipe import Recipe

BUDGETS = {"keep_params": "--keep-params 0.75", "target_size": "--target-size 4GB"}
SLICING = {
    **{"ratio": "--ratio 0.25", "drop_blocks": "--drop-blocks 4", **BUDGETS},
    "explained_variance": "--explained-variance 0.99",
}
RANKS = {"rank_frac": "--rank-frac 0.6", "rank": "--rank 1024", **BUDGETS}
PREFIXES = {"drop_blocks": "db", "keep_params": "kp", "explained_variance": "ev", "rank_frac": "rf", "rank": "r"}
LONGEST_NAME = 40  # characters: a ratio for each of many blocks is longer than a file's name may be
Amount = tuple[str, Any]  # the one option that says how much, and what was typed

KEEP = (
    "Share of all parameters to keep at most; depth, hidden size and MLP width, or ranks, are chosen by what they lose."
)
SIZE = "Size of the weights on disk at most: 4GB. Chosen as with --keep-params."


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(RunOptions):
    keep_params: Annotated[float | None, Amounts(KEEP)] = None
    target_size: Annotated[str | None, Amounts(SIZE)] = None
    type_: Annotated[str | None, Output(TYPE, "--type", sets="slim.quantize.gguf_type")] = None
    export: Annotated[Literal["hf", "gguf"], Output(EXPORT)] = "hf"

    def amount(self, examples: Mapping[str, str], **others: Any) -> Amount:
        """Raises UsageError unless exactly one option says how much. examples: of each of these options."""
        typed = {"keep_params": self.keep_params, "target_size": self.target_size, **others}
        given = [(option, value) for option, value in typed.items() if value is not None]
        if len(given) != 1:
            raise UsageError(f"Say how much to delete by one of {', '.join(examples.values())}; got {len(given)}.")
        return given[0]

    def put_type(self, draft: Draft, amount: Amount) -> None:
        """With --type: quantize what the recipe gives, in the same walk, as `compress quantize --type` does."""
        if self.type_ is not None and amount[0] in BUDGETS:
            raise UsageError(
                f"--type has to know every width beforehand, which {flag_of(amount[0])} leaves open. Give a ratio "
                f"or a rank instead, or run compress quantize --type {self.type_} on the result."
            )
        if self.type_ is not None:
            stores = [stage for stage in Draft.preset("gguf").stages if stage["stage"] != "refit"]
            draft.data["stages"] = [*draft.stages, *stores]

    def in_name(self, recipe: "Recipe", amount: Amount) -> str:
        """The amount as the default output folder says it."""
        name = f"{PREFIXES.get(amount[0], '')}{amount[1]}"
        if len(name) > LONGEST_NAME:
            name = f"ratios-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        name = name.replace(":", "-").replace(" ", "")
        return name if self.type_ is None else f"{name}-{amount_of(recipe)}"


def put_amount(draft: Draft, stage: str, amount: Amount) -> None:
    """Into the recipe's budget, or as the stage's own rule in place of a budget."""
    option, value = amount
    flag = f"{flag_of(option)} {value}"
    draft.data.pop("budget", None)
    if option in BUDGETS:
        draft.set(f"budget.{option}", parse_size(value, flag_of(option)) if option == "target_size" else value, flag)
        return
    draft.remove("budget", flag)
    if option == "ratio":  # one share, FIRST:LAST from the first block to the last, or one a block with commas between
        rules = {"linear_ratios": ":", "block_ratios": ","}
        option = next((rule for rule, between in rules.items() if between in value), "ratio")
        value = [plain_value(word) for word in value.split(rules[option])] if option in rules else plain_value(value)
    draft.set(f"{stage}.{option}", value, flag)


RATIO = "Share of the hidden size to delete: 0.25; from first to last block, 0.1:0.3; or one a block, 0.1,0.2"
ENERGY = "Keep the principal components that hold this share of the stream's variance."
SLICE_METHOD = "anchored: ours, refitted to the dense model. slicegpt: the paper's, a rotation per layer."
ROTATION = "One rotation for the whole stream (a stock architecture), or one per layer with shortcuts. Default: shared."
SLICE_REFIT = "Solve the layers that read and write the stream again, toward the dense model. Default: --refit."
MLP = "Share of the MLP neurons to delete; chosen under a budget."
NEURONS = "Under a budget: as many neurons in every block, or free, without a stock architecture. Default: uniform."
ROUND = "Round widths down to a multiple. Default: what suits the architecture."
Neurons = Annotated[Literal["uniform", "free"] | None, Method(NEURONS, sets="budget.allocation")]


@reporting_errors
@with_options(BudgetOptions)
def slice_model(
    run: BudgetOptions,
    ratio: Annotated[str | None, Amounts(RATIO)] = None,
    explained_variance: Annotated[float | None, Amounts(ENERGY)] = None,
    mlp_ratio: Annotated[float | None, Amounts(MLP)] = None,
    kv_ratio: Annotated[float | None, Amounts("Share of the KV groups to delete, with their query heads.")] = None,
    drop_blocks: Annotated[int | None, Amounts(DEPTH)] = None,
    round_to: Annotated[int | None, Amounts(ROUND, sets="slice.round_to")] = None,
    method: Annotated[Literal["anchored", "slicegpt"], Method(SLICE_METHOD)] = "anchored",
    rotation: Annotated[Literal["shared", "per-layer"] | None, Method(ROTATION)] = None,
    refit: Annotated[bool | None, Method(SLICE_REFIT, "--refit/--no-refit")] = None,
    allocation: Neurons = None,
) -> None:
    """Slice a model: fewer hidden dimensions, fewer MLP neurons (SliceGPT and past it).

    Example: compress slice --model llama-2-7b --keep-params 0.75
    """
    problems, draft = Problems(), Draft.preset(method)
    with problems.collect():
        others = (ratio, explained_variance, run.keep_params, run.target_size, mlp_ratio, kv_ratio)
        depth_alone = drop_blocks is not None and all(each is None for each in others)
        depth = {"drop_blocks": drop_blocks} if depth_alone else {}
        amount = run.amount(SLICING, ratio=ratio, explained_variance=explained_variance, **depth)
    ours = {"rotation": rotation, "refit": refit, "mlp_ratio": mlp_ratio, "kv_ratio": kv_ratio}
    problems.check(check_method, method, **ours, allocation=allocation, drop_blocks=drop_blocks)
    with problems.collect():
        if not problems.found:
            if depth_alone:
                draft.data.pop("budget")
                draft.data["stages"] = [entry for entry in draft.stages if entry["stage"] == "refit"]
            else:
                set_widths(draft, amount, rotation=rotation, refit=refit)
            if refit is False:
                draft.remove_stage("refit")
            prune(draft, "neurons", "--mlp-ratio", mlp_ratio)
            prune(draft, "kv_groups", "--kv-ratio", kv_ratio)
            if drop_blocks is not None or amount[0] not in BUDGETS:
                draft.remove_stage("drop_blocks")
            if drop_blocks:
                draft.stages.insert(0, {"stage": "drop_blocks"})
                draft.set("drop_blocks.count", drop_blocks, f"--drop-blocks {drop_blocks}")
            run.put_type(draft, amount)
    run.compress(draft, problems, verb="slice", amount=lambda recipe: run.in_name(recipe, amount), export=run.export)


def set_widths(draft: Draft, amount: Amount, *, rotation: str | None, refit: bool | None) -> None:
    """Say how much of the stream stays and how it is rotated."""
    draft.stage("slice").pop("ratio", None)
    put_amount(draft, "slice", amount)
    if rotation == "per-layer":
        rotate = {"stage": "rotate", "signal": "normed", "stream": "compressed" if refit is False else "dense"}
        draft.stages[draft.stages.index(draft.stage("rotate_shared"))] = rotate
    if amount[0] not in BUDGETS:
        draft.remove_stage("prune_units")


def prune(draft: Draft, units: str, option: str, ratio: float | None) -> None:
    """Delete a told share of the units; where neurons are left open, the budget decides."""
    if ratio is None:
        return
    kinds = [entry.get("units") for entry in draft.stages]
    if units not in kinds:
        kinds.append(units)
        draft.stages.append({"stage": "prune_units", "units": units})
    draft.set(f"stages.{kinds.index(units)}.ratio", ratio, f"{option} {ratio}")


FRAC = "Share of each matrix's full rank to keep. A matrix whose factors would be no smaller stays dense."
LORD_METHOD = "anchored: ours, refitted to the dense model. lord: the paper's. svd-llm, asvd, svd: for comparison."
ALLOCATION = (
    "uniform: one share for all. energy: least variance lost. fisher: least loss, by its gradient. mixed: half-way "
    "between. auto: the best of these by trial. Default: fisher under a budget with --method anchored, else uniform."
)
FORM = "pivot: the same function in fewer parameters than factors. auto: pivot where it is no slower. Default: auto."
MATERIALIZE = "Multiply the factors out again: a stock model of the old size."
LORD_REFIT = "anchored: solve every linear again, toward the dense model, before its rank is cut. Default: --refit."
BIAS = (
    "Add the bias that keeps the mean of the outputs to linears without one. Default: --bias for lord, as in the paper."
)
Method_ = Annotated[Literal["anchored", "lord", "svd-llm", "asvd", "svd"], Method(LORD_METHOD)]
Ranks = Annotated[
    Literal["auto", "uniform", "energy", "mixed", "fisher"] | None,
    Method(ALLOCATION, sets="factorize.allocation"),
]
Form = Annotated[Literal["auto", "factors", "pivot"] | None, Method(FORM, sets="factorize.form")]


@reporting_errors
@with_options(BudgetOptions)
def factorize_model(
    run: BudgetOptions,
    rank_frac: Annotated[float | None, Amounts(FRAC)] = None,
    rank: Annotated[int | None, Amounts("Rank of every matrix.")] = None,
    method: Method_ = "anchored",
    allocation: Ranks = None,
    target: Annotated[str | None, Method(TARGET, sets=("factorize.target", names_in))] = None,
    form: Form = None,
    refit: Annotated[bool | None, Method(LORD_REFIT, "--refit/--no-refit")] = None,
    bias: Annotated[bool | None, Method(BIAS, "--bias/--no-bias", sets="factorize.bias")] = None,
    materialize: Annotated[bool, Output(MATERIALIZE, "--materialize", sets=("factorize.form", "dense"))] = False,
) -> None:
    """Factorize linear layers into low-rank products: fewer parameters, less arithmetic (LoRD and past it).

    Example: compress lord --model starcoder --rank-frac 0.6
    """
    problems, draft = Problems(), Draft.preset("lord-anchored" if method == "anchored" else "lord")
    with problems.collect():
        amount = run.amount(RANKS, rank_frac=rank_frac, rank=rank)
    problems.check(check_method, method, refit=refit)
    with problems.collect():
        if not problems.found:
            draft.data["method"] = f"lord-{method}"
            stage = draft.stage("factorize")
            stage["method"] = method
            stage.pop("rank_frac", None)
            if amount[0] not in BUDGETS:
                stage.pop("allocation", None)
            put_amount(draft, "factorize", amount)
            if refit is False:
                draft.remove_stage("refit")
            run.put_type(draft, amount)
    run.compress(draft, problems, verb="lord", amount=lambda recipe: run.in_name(recipe, amount), export=run.export)
