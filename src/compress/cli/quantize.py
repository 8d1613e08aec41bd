"""`compress quantize`: linear layers in fewer bits, for engines or as a GGUF file."""

from typing import Annotated, Any, Literal

from compress.cli.compressing import RunOptions
from compress.cli.options import Amounts, Method, Output, flag_of, in_panel, with_options
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
from compress.errors import Problems, UsageError

BITS = "Weight precision: 2 to 8 bits, or fp8. Default: 4."
TYPE = (
    "Write one GGUF file in llama.cpp's types instead: Q4_K_M, IQ4_XS, Q3_K_S and the like. Other types for some "
    "tensors: Q4_K_M,ffn_down=Q6_K."
)
METHOD = "gptq, or round-to-nearest with scales of least squared error (mse) or by the maximum (absmax). Default: gptq."
COMPACT = "Store it as small as we can, in our own architecture. Default: packed, as compressed-tensors reads it."


@reporting_errors
@with_options(RunOptions)
def quantize_model(
    run: RunOptions,
    bits: Annotated[str | None, in_panel(Amounts, BITS)] = None,
    group: Annotated[str | None, in_panel(Amounts, GROUP)] = None,
    gguf_type: Annotated[str | None, in_panel(Amounts, TYPE, flag="--type")] = None,
    inputs: Annotated[Literal["fp8", "int8"] | None, in_panel(Amounts, INPUTS)] = None,
    method: Annotated[Literal["gptq", "mse", "absmax"] | None, in_panel(Method, METHOD)] = None,
    refit: Annotated[bool | None, in_panel(Method, REFIT, flag="--refit/--no-refit")] = None,
    act_order: Annotated[bool, in_panel(Method, ACT_ORDER, flag="--act-order")] = False,
    asymmetric: Annotated[bool, in_panel(Method, ASYMMETRIC, flag="--asymmetric")] = False,
    target: Annotated[str | None, in_panel(Method, TARGET)] = None,
    compact: Annotated[bool, in_panel(Output, COMPACT, flag="--compact")] = False,
    materialize: Annotated[bool, in_panel(Output, MATERIALIZE, flag="--materialize")] = False,
) -> None:
    """Quantize linear layers, each fitted toward the dense model (GPTQ and past it); --type writes one GGUF file.

    Example: compress quantize --model llama-2-7b --bits 4 --group 128
    """
    problems, draft = Problems(), Draft.preset("quantize" if gguf_type is None else "gguf")
    switches = {"act_order": act_order, "asymmetric": asymmetric, "compact": compact, "materialize": materialize}
    with problems.collect():
        if gguf_type is None:
            put_bits(draft, bits)
        else:
            put_type(draft, gguf_type, bits=bits, group=group, inputs=inputs, **switches)
        draft.set("slim.quantize.method", method, f"--method {method}")
        put_storage(draft, group=group, inputs=inputs, refit=refit, target=target, **switches)
    run.compress(draft, problems, verb="quantize", amount=amount_of)


def put_type(draft: Draft, gguf_type: str, **others: Any) -> None:
    """A GGUF file's type. Raises UsageError for options of other formats."""
    if given := [flag_of(name) for name, value in others.items() if value and name != "act_order"]:
        raise UsageError(f"{given[0]} has no effect with --type, which says all of that. Leave one out.")
    draft.set("slim.quantize.gguf_type", gguf_type, f"--type {gguf_type}")
