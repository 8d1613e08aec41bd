"""`compress slice`: a narrower residual stream. `compress lord`: linear layers as products of two thin ones."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from compress.cli.compressing import EXPORT, TARGET, TYPE, RunOptions, amount_of
from compress.cli.options import Amounts, Method, Output, flag_of, in_panel, names_in, parse_size, with_options
from compress.cli.recipes import Draft, check_method, plain_value
from compress.cli.reporting import reporting_errors
from compress.errors import Problems, UsageError

if TYPE_CHECKING:
    from compress.recipe import Recipe

BUDGETS = {"keep_params": "--keep-params 0.75", "target_size": "--target-size 4GB"}
SLICING = {
    "ratio": "--ratio 0.25",
    "drop_blocks": "--drop-blocks 4",
    **BUDGETS,
    "explained_variance": "--explained-variance 0.99",
}
RANKS = {"rank_frac": "--rank-frac 0.6", "rank": "--rank 1024", **BUDGETS}
PREFIXES = {"drop_blocks": "db", "keep_params": "kp", "explained_variance": "ev", "rank_frac": "rf", "rank": "r"}
LONGEST_NAME = 40  # characters: a ratio for each of many blocks is longer than a file's name may be

KEEP = (
    "Share of all parameters to keep at most; depth, hidden size and MLP width, or ranks, are chosen by what they lose."
)
SIZE = "Size of the weights on disk at most: 4GB. Chosen as with --keep-params."


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(RunOptions):
    keep_params: Annotated[float | None, in_panel(Amounts, KEEP)] = None
    target_size: Annotated[str | None, in_panel(Amounts, SIZE)] = None
    type_: Annotated[str | None, in_panel(Output, TYPE, flag="--type")] = None
    export: Annotated[Literal["hf", "gguf"], in_panel(Output, EXPORT)] = "hf"

    def amount(self, examples: Mapping[str, str], **others: Any) -> "Amount":
        """Raises UsageError unless exactly one option says how much. examples: of each of these options."""
        typed = {"keep_params": self.keep_params, "target_size": self.target_size, **others}
        given = {option: value for option, value in typed.items() if value is not None}
        if len(given) != 1:
            raise UsageError(f"Say how much to delete by one of {', '.join(examples.values())}; got {len(given)}.")
        return Amount(*next(iter(given.items())))

    def put_type(self, draft: Draft, amount: "Amount") -> None:
        """With --type: quantize what the recipe gives, in the same walk, as `compress quantize --type` does."""
        if self.type_ is None:
            return
        if amount.is_budget:
            raise UsageError(
                f"--type has to know every width beforehand, which {flag_of(amount.option)} leaves open. Give a ratio "
                f"or a rank instead, or run compress quantize --type {self.type_} on the result."
            )
        stores = [stage for stage in Draft.preset("gguf").stages if stage["stage"] != "refit"]
        draft.data["stages"] = [*draft.stages, *stores]
        draft.set("slim.quantize.gguf_type", self.type_, f"--type {self.type_}")

    def in_name(self, recipe: "Recipe", amount: "Amount") -> str:
        return amount.in_name if self.type_ is None else f"{amount.in_name}-{amount_of(recipe)}"


@dataclass(frozen=True)
class Amount:
    """The one option that says how much, as it was typed."""

    option: str
    value: Any

    @property
    def is_budget(self) -> bool:
        return self.option in BUDGETS

    @property
    def in_name(self) -> str:
        """As the default output folder says it."""
        name = f"{PREFIXES.get(self.option, '')}{self.value}"
        if len(name) > LONGEST_NAME:
            return f"ratios-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return name.replace(":", "-").replace(" ", "")

    def put(self, draft: Draft, stage: str) -> None:
        """Into the recipe's budget, or as the stage's own rule in place of a budget."""
        flag = f"{flag_of(self.option)} {self.value}"
        draft.data.pop("budget", None)
        if self.is_budget:
            value = parse_size(self.value, "--target-size") if self.option == "target_size" else self.value
            draft.set(f"budget.{self.option}", value, flag)
        else:
            draft.remove("budget", flag)
            rule, value = ratio_rule(self.value) if self.option == "ratio" else (self.option, self.value)
            draft.set(f"{stage}.{rule}", value, flag)


def ratio_rule(ratio: str) -> tuple[str, Any]:
    """One share, FIRST:LAST from the first block to the last, or one a block with commas between."""
    if ":" in ratio:
        return "linear_ratios", [plain_value(word) for word in ratio.split(":")]
    if "," in ratio:
        return "block_ratios", [plain_value(word) for word in ratio.split(",")]
    return "ratio", plain_value(ratio)


RATIO = "Share of the hidden size to delete: 0.25; from first to last block, 0.1:0.3; or one a block, 0.1,0.2"
ENERGY = "Keep the principal components that hold this share of the stream's variance."
SLICE_METHOD = "anchored: ours, refitted to the dense model. slicegpt: the paper's, a rotation per layer."
ROTATION = "One rotation for the whole stream (a stock architecture), or one per layer with shortcuts. Default: shared."
SLICE_REFIT = "Solve the layers that read and write the stream again, toward the dense model. Default: --refit."
MLP = "Share of the MLP neurons to delete; chosen under a budget."
KV = "Share of the KV groups to delete, with their query heads."
DEPTH = "Number of blocks to leave out, those that the model misses least; chosen under a budget, 0 for none."
NEURONS = "Under a budget: as many neurons in every block, or free, without a stock architecture. Default: uniform."
ROUND = "Round widths down to a multiple. Default: what suits the architecture."


@reporting_errors
@with_options(BudgetOptions)
def slice_model(
    run: BudgetOptions,
    ratio: Annotated[str | None, in_panel(Amounts, RATIO)] = None,
    explained_variance: Annotated[float | None, in_panel(Amounts, ENERGY)] = None,
    mlp_ratio: Annotated[float | None, in_panel(Amounts, MLP)] = None,
    kv_ratio: Annotated[float | None, in_panel(Amounts, KV)] = None,
    drop_blocks: Annotated[int | None, in_panel(Amounts, DEPTH)] = None,
    round_to: Annotated[int | None, in_panel(Amounts, ROUND)] = None,
    method: Annotated[Literal["anchored", "slicegpt"], in_panel(Method, SLICE_METHOD)] = "anchored",
    rotation: Annotated[Literal["shared", "per-layer"] | None, in_panel(Method, ROTATION)] = None,
    refit: Annotated[bool | None, in_panel(Method, SLICE_REFIT, flag="--refit/--no-refit")] = None,
    allocation: Annotated[Literal["uniform", "free"] | None, in_panel(Method, NEURONS)] = None,
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
    with problems.collect():
        ours = {"rotation": rotation, "refit": refit, "mlp_ratio": mlp_ratio, "kv_ratio": kv_ratio}
        check_method(method, **ours, allocation=allocation, drop_blocks=drop_blocks)
    if not problems.found:
        with problems.collect():
            if depth_alone:
                draft.data.pop("budget")
                draft.data["stages"] = [entry for entry in draft.stages if entry["stage"] == "refit"]
            else:
                set_widths(draft, amount, rotation=rotation, refit=refit, round_to=round_to, allocation=allocation)
            if refit is False:
                draft.remove_stage("refit")
            prune(draft, "neurons", "--mlp-ratio", mlp_ratio)
            prune(draft, "kv_groups", "--kv-ratio", kv_ratio)
            if drop_blocks is not None or not amount.is_budget:
                draft.remove_stage("drop_blocks")
            if drop_blocks:
                draft.stages.insert(0, {"stage": "drop_blocks"})
                draft.set("drop_blocks.count", drop_blocks, f"--drop-blocks {drop_blocks}")
            run.put_type(draft, amount)
    run.compress(draft, problems, verb="slice", amount=lambda recipe: run.in_name(recipe, amount), export=run.export)


def set_widths(
    draft: Draft,
    amount: Amount,
    *,
    rotation: str | None,
    refit: bool | None,
    round_to: int | None,
    allocation: str | None,
) -> None:
    """Say how much of the stream stays and how it is rotated."""
    draft.stage("slice").pop("ratio", None)
    amount.put(draft, "slice")
    draft.put("slice", round_to=round_to)
    draft.put("budget", allocation=allocation)
    if rotation == "per-layer":
        rotate = {"stage": "rotate", "signal": "normed", "stream": "compressed" if refit is False else "dense"}
        draft.stages[draft.stages.index(draft.stage("rotate_shared"))] = rotate
    if not amount.is_budget:
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


@reporting_errors
@with_options(BudgetOptions)
def factorize_model(
    run: BudgetOptions,
    rank_frac: Annotated[float | None, in_panel(Amounts, FRAC)] = None,
    rank: Annotated[int | None, in_panel(Amounts, "Rank of every matrix.")] = None,
    method: Annotated[
        Literal["anchored", "lord", "svd-llm", "asvd", "svd"], in_panel(Method, LORD_METHOD)
    ] = "anchored",
    allocation: Annotated[
        Literal["auto", "uniform", "energy", "mixed", "fisher"] | None, in_panel(Method, ALLOCATION)
    ] = None,
    target: Annotated[str | None, in_panel(Method, TARGET)] = None,
    form: Annotated[Literal["auto", "factors", "pivot"] | None, in_panel(Method, FORM)] = None,
    refit: Annotated[bool | None, in_panel(Method, LORD_REFIT, flag="--refit/--no-refit")] = None,
    bias: Annotated[bool | None, in_panel(Method, BIAS, flag="--bias/--no-bias")] = None,
    materialize: Annotated[bool, in_panel(Output, MATERIALIZE, flag="--materialize")] = False,
) -> None:
    """Factorize linear layers into low-rank products: fewer parameters, less arithmetic (LoRD and past it).

    Example: compress lord --model starcoder --rank-frac 0.6
    """
    problems, draft = Problems(), Draft.preset("lord-anchored" if method == "anchored" else "lord")
    with problems.collect():
        amount = run.amount(RANKS, rank_frac=rank_frac, rank=rank)
    with problems.collect():
        check_method(method, refit=refit)
    if not problems.found:
        with problems.collect():
            draft.data["method"] = f"lord-{method}"
            stage = draft.stage("factorize")
            stage["method"] = method
            stage.pop("rank_frac", None)
            if not amount.is_budget:
                stage.pop("allocation", None)
            amount.put(draft, "factorize")
            draft.put("factorize", allocation=allocation, target=names_in(target), form=form, bias=bias)
            draft.set("factorize.form", "dense" if materialize else None, "--materialize")
            if refit is False:
                draft.remove_stage("refit")
            run.put_type(draft, amount)
    run.compress(draft, problems, verb="lord", amount=lambda recipe: run.in_name(recipe, amount), export=run.export)
