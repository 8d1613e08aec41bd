"""`compress slim`: linear layers in fewer bits, sparse, with adapters for what they lose."""

from typing import Annotated, Literal

from compress.cli.options import Amounts, Method, Output, in_panel
from compress.cli.reporting import reporting_errors
from compress.cli.run_options import RunOptions, with_run_options
from compress.cli.storing import ACT_ORDER, ASYMMETRIC, GROUP, INPUTS, TARGET, Asked
from compress.errors import Faults

BITS = "Of each weight: 2 to 8, fp8, or none to leave them as they are."
SPARSITY = "What is pruned: 2:4 keeps two of every four weights, 50% deletes half wherever they are; or none."
RANK = "Rank of the adapters: a share of each matrix's full rank below 1, or a number; 0: none."
METHOD = "anchored: ours, refitted to the dense model. slim: the paper's. The options below change parts of either."
PRUNER = "Default: admm for anchored, wanda for slim."
QUANTIZER = "Default: gptq for anchored, slim for slim."
ADAPTER = "Default: anchored (several rounds, towards the dense model) for anchored, slim for slim."
REFIT = "Solve every linear again, towards the dense model, before it is compressed. Default: --refit for anchored."
FAST = "anchored: 20 iterations of ADMM instead of 40, and one round of the adapter."
IMPORTANT = "SLiM-Quant^O: round one input in a hundred twice as finely. For --compact and --materialize."
COMPACT = "Store it as small as we can, in our own architecture: 2:4 in 4 bits takes 2.75 bits a weight and scales."
MATERIALIZE = "Multiply everything out again: a stock model of the old size, for any engine."
ADAPTER_BITS = "Of the adapters' own numbers, with --compact: 2 to 8. Default: the model's dtype."


@reporting_errors
@with_run_options()
def slim_model(
    run: RunOptions,
    bits: Annotated[str, in_panel(Amounts, BITS)] = "4",
    sparsity: Annotated[str, in_panel(Amounts, SPARSITY)] = "2:4",
    adapter_rank: Annotated[float, in_panel(Amounts, RANK, min=0)] = 0.1,
    group: Annotated[str | None, in_panel(Amounts, GROUP)] = None,
    inputs: Annotated[Literal["fp8", "int8"] | None, in_panel(Amounts, INPUTS)] = None,
    method: Annotated[Literal["anchored", "slim"], in_panel(Method, METHOD)] = "anchored",
    pruner: Annotated[Literal["magnitude", "wanda", "sparsegpt", "admm"] | None, in_panel(Method, PRUNER)] = None,
    quantizer: Annotated[Literal["absmax", "slim", "mse", "gptq"] | None, in_panel(Method, QUANTIZER)] = None,
    adapter: Annotated[Literal["naive", "slim", "whitened", "anchored"] | None, in_panel(Method, ADAPTER)] = None,
    refit: Annotated[bool | None, in_panel(Method, REFIT, flag="--refit/--no-refit")] = None,
    fast: Annotated[bool, in_panel(Method, FAST, flag="--fast")] = False,
    act_order: Annotated[bool, in_panel(Method, ACT_ORDER, flag="--act-order")] = False,
    asymmetric: Annotated[bool, in_panel(Method, ASYMMETRIC, flag="--asymmetric")] = False,
    important_inputs: Annotated[bool, in_panel(Method, IMPORTANT, flag="--important-inputs")] = False,
    target: Annotated[str, in_panel(Method, TARGET)] = "all",
    compact: Annotated[bool, in_panel(Output, COMPACT, flag="--compact")] = False,
    materialize: Annotated[bool, in_panel(Output, MATERIALIZE, flag="--materialize")] = False,
    adapter_bits: Annotated[int | None, in_panel(Output, ADAPTER_BITS, min=2, max=8)] = None,
) -> None:
    """Store linear layers in fewer bits, sparse, with adapters that correct the error (SLiM and past it).

    Example: compress slim --model llama-2-7b --bits 4 --sparsity 2:4 --adapter-rank 0.1
    """
    typed = {"bits": bits, "sparsity": sparsity, "adapter_rank": adapter_rank, "group": group, "inputs": inputs}
    parts = {"pruner": pruner, "quantizer": quantizer, "adapter": adapter, "refit": refit}
    flags = {"fast": fast, "act_order": act_order, "asymmetric": asymmetric}
    flags |= {"important_inputs": important_inputs, "compact": compact, "materialize": materialize}
    faults = Faults()
    with faults.noted():
        asked = Asked(method, typed, parts, flags, adapter_bits)
        stages = asked.stages(target)
    resources = run.check(faults)

    from compress.recipe import slim

    name = f"slim-{method}" if method != "slim" else "slim"
    recipe = run.recipe(resources.source, name, slim(**stages, measure_error=run.measure_error))
    spelled = {**typed, **parts, **flags, "adapter_bits": adapter_bits, "target": target}
    command = run.command("slim", method, resources.source, recipe, spelled)
    run.deliver(resources, recipe, amount=asked.in_name, command=command)
