"""Lists of stages as the commands put them together, for tests of what is below the command line."""

from collections.abc import Mapping
from typing import Any


def slicegpt(
    rule: dict[str, Any],
    *,
    signal: str = "stream",
    final_orientation: str = "pca",
    round_to: int | None = None,
    slice_head: bool = False,
    measure_error: bool = False,
) -> list[dict[str, Any]]:
    """The stages of SliceGPT (arXiv 2401.15024). `rule` is how `slice` chooses widths, such as {"ratio": 0.25}."""
    return [
        {"stage": "fold_norms"},
        *([{"stage": "measure_error"}] if measure_error else []),
        {"stage": "rotate", "signal": signal, "final_orientation": final_orientation},
        {"stage": "slice", **rule, "round_to": round_to, "slice_head": slice_head},
    ]


def anchored(
    rule: dict[str, Any],
    *,
    rotation: str = "shared",
    gradient_weight: float = 0.9,
    refit: bool = True,
    units: Mapping[str, dict[str, Any]] | None = None,
    round_to: int | None = None,
    measure_error: bool = False,
) -> list[dict[str, Any]]:
    """The stages of the anchored method: `rotation` is `shared` or `per-layer`.

    units: how `prune_units` chooses of each kind, such as {"neurons": {"ratio": 0.25}}; {} where a budget decides.
    """
    rotate: dict[str, Any] = {"stage": "rotate", "signal": "normed", "stream": "dense" if refit else "compressed"}
    if rotation == "shared":
        rotate = {"stage": "rotate_shared", "gradient_weight": gradient_weight}
    return [
        {"stage": "fold_norms"},
        *([{"stage": "measure_error"}] if measure_error else []),
        rotate,
        {"stage": "slice", **rule, "round_to": round_to, "slice_head": True},
        *([{"stage": "refit"}] if refit else []),
        *({"stage": "prune_units", "units": kind, **how} for kind, how in (units or {}).items()),
    ]


def lowrank(
    method: str, rule: dict[str, Any], *, refit: bool = True, measure_error: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """The stages of a low-rank method: `anchored`, or one that reproduces each linear by itself.

    rule: how `factorize` chooses ranks, such as {"rank_frac": 0.6}; {} where a budget decides. options: its others.
    """
    given = {name: value for name, value in options.items() if value is not None}
    anchored = method == "anchored"
    return [
        *([{"stage": "measure_error"}] if measure_error else []),
        *([{"stage": "refit"}] if anchored and refit else []),
        {"stage": "factorize", "method": method, **rule, **given},
    ]


def slim(
    *,
    prune: dict[str, Any] | None,
    quantize: dict[str, Any] | None,
    adapt: dict[str, Any] | None,
    refit: bool,
    measure_error: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """The stages that store linears in fewer bits; what `slim` is not to do is None. options: its others."""
    given = {name: value for name, value in options.items() if value is not None}
    parts = {"prune": prune, "quantize": quantize, "adapt": adapt}
    return [
        *([{"stage": "measure_error"}] if measure_error else []),
        *([{"stage": "refit"}] if refit else []),
        {"stage": "slim", **{name: part for name, part in parts.items() if part is not None}, **given},
    ]
