"""`compress quantize`: linear layers in fewer bits."""

from typing import Annotated, Literal

from compress.cli.compressing import RunOptions
from compress.cli.options import Amounts, Method, Output, in_panel, with_options
from compress.cli.recipes import Draft
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

BITS = "Weight precision: 2 to 8 bits, or fp8. Default: 4."
METHOD = "gptq, or round-to-nearest with scales of least squared error (mse) or by the maximum (absmax). Default: gptq."
COMPACT = "Store it as small as we can, in our own architecture. Default: packed, as compressed-tensors reads it."


@reporting_errors
@with_options(RunOptions)
def quantize_model(
    run: RunOptions,
    bits: Annotated[str | None, in_panel(Amounts, BITS)] = None,
    group: Annotated[str | None, in_panel(Amounts, GROUP)] = None,
    inputs: Annotated[Literal["fp8", "int8"] | None, in_panel(Amounts, INPUTS)] = None,
    method: Annotated[Literal["gptq", "mse", "absmax"] | None, in_panel(Method, METHOD)] = None,
    refit: Annotated[bool | None, in_panel(Method, REFIT, flag="--refit/--no-refit")] = None,
    act_order: Annotated[bool, in_panel(Method, ACT_ORDER, flag="--act-order")] = False,
    asymmetric: Annotated[bool, in_panel(Method, ASYMMETRIC, flag="--asymmetric")] = False,
    target: Annotated[str | None, in_panel(Method, TARGET)] = None,
    compact: Annotated[bool, in_panel(Output, COMPACT, flag="--compact")] = False,
    materialize: Annotated[bool, in_panel(Output, MATERIALIZE, flag="--materialize")] = False,
) -> None:
    """Quantize linear layers, each fitted toward the dense model (GPTQ and past it).

    Example: compress quantize --model llama-2-7b --bits 4 --group 128
    """
    problems, draft = Problems(), Draft.preset("quantize")
    with problems.collect():
        put_bits(draft, bits)
        draft.set("slim.quantize.method", method, f"--method {method}")
        switches = {"act_order": act_order, "asymmetric": asymmetric, "compact": compact, "materialize": materialize}
        put_storage(draft, group=group, inputs=inputs, refit=refit, target=target, **switches)
    run.compress(draft, problems, verb="quantize", amount=amount_of)
