"""`compress quantize`: linear layers in fewer bits."""

from typing import Annotated, Literal

from compress.cli.options import Amounts, Method, Output, in_panel
from compress.cli.reporting import reporting_errors
from compress.cli.run_options import RunOptions, with_run_options
from compress.cli.storing import ACT_ORDER, ASYMMETRIC, BIT_WIDTHS, GROUP, INPUTS, TARGET, Asked
from compress.errors import Faults, UsageError

BITS = "Bits of each weight: 2 to 8, or fp8."
METHOD = "gptq: errors of a column are made up for by later ones. mse, absmax: rounded to nearest."
REFIT = "Solve every linear again, towards the dense model, before it is quantized."
COMPACT = "Store it as small as we can, in our own architecture. Default: packed, as compressed-tensors reads it."
MATERIALIZE = "Write the rounded weights as dense ones: a stock model of the old size, for any engine."


@reporting_errors
@with_run_options()
def quantize_model(
    run: RunOptions,
    bits: Annotated[str, in_panel(Amounts, BITS)] = "4",
    group: Annotated[str | None, in_panel(Amounts, GROUP)] = None,
    inputs: Annotated[Literal["fp8", "int8"] | None, in_panel(Amounts, INPUTS)] = None,
    method: Annotated[Literal["gptq", "mse", "absmax"], in_panel(Method, METHOD)] = "gptq",
    refit: Annotated[bool, in_panel(Method, REFIT, flag="--refit/--no-refit")] = True,
    act_order: Annotated[bool, in_panel(Method, ACT_ORDER, flag="--act-order")] = False,
    asymmetric: Annotated[bool, in_panel(Method, ASYMMETRIC, flag="--asymmetric")] = False,
    target: Annotated[str, in_panel(Method, TARGET)] = "all",
    compact: Annotated[bool, in_panel(Output, COMPACT, flag="--compact")] = False,
    materialize: Annotated[bool, in_panel(Output, MATERIALIZE, flag="--materialize")] = False,
) -> None:
    """Store linear layers in fewer bits, each fitted towards the dense model (GPTQ and past it).

    Example: compress quantize --model llama-2-7b --bits 4 --group 128
    """
    amounts = {"bits": bits, "sparsity": "none", "adapter_rank": 0, "group": group, "inputs": inputs}
    parts = {"quantizer": method, "refit": refit, "pruner": None, "adapter": None}
    flags = {"act_order": act_order, "asymmetric": asymmetric, "compact": compact, "materialize": materialize}
    faults = Faults()
    with faults.noted():
        if bits not in BIT_WIDTHS:
            raise UsageError(f"--bits is 2 to 8 or fp8, got {bits!r}. Try 4.")
        asked = Asked("anchored", amounts, parts, {**flags, "fast": False, "important_inputs": False}, None)
        stages = asked.stages(target)
    resources = run.check(faults)

    from compress.recipe import slim

    recipe = run.recipe(resources.source, "quantize", slim(**stages, measure_error=run.measure_error))
    own = {"bits": bits, "group": group, "inputs": inputs, "refit": refit, **flags, "target": target}
    command = run.command("quantize", method, resources.source, recipe, own)
    run.deliver(resources, recipe, amount=asked.in_name, command=command)
