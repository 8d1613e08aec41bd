"""How linears are to be stored, from what was typed: the stages of `slim` and `quantize`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import UsageError

GROUP = "Granularity of scales: tensor, channel, or a group size. Default: 128, or channel where 128 is no divisor."
INPUTS = "Round each token's inputs too, when the model runs: fp8 beside fp8 weights, int8 beside integers."
ACT_ORDER = "gptq: take columns in order of decreasing activation."
ASYMMETRIC = "Grids with zero points."
TARGET = "all, attention, mlp, or patterns of names such as *.down_proj; several with commas."

BIT_WIDTHS = ("fp8", *"2345678")

# What each method's parts are by default.
METHODS: dict[str, dict[str, Any]] = {
    "anchored": {"pruner": "admm", "quantizer": "gptq", "adapter": "anchored", "group": None, "refit": True},
    "slim": {"pruner": "wanda", "quantizer": "slim", "adapter": "slim", "group": "tensor", "refit": False},
}
ROUNDS = 2  # of the anchored adapter
POLISH = 3  # without an adapter; with one every round polishes again
POLISH_A_ROUND = 2
FAST_ITERATIONS = 20


@dataclass(frozen=True)
class Asked:
    """What was typed, to be made into stages.

    amounts: bits, sparsity, adapter_rank, group and inputs. parts: of the method, None where it decides.
    """

    method: str
    amounts: Mapping[str, Any]
    parts: Mapping[str, Any]
    flags: Mapping[str, bool]
    adapter_bits: int | None

    @property
    def in_name(self) -> str:
        """As the default output folder says it."""
        bits, sparsity, rank = (self.amounts[name] for name in ("bits", "sparsity", "adapter_rank"))
        said = [f"w{bits}" if bits != "none" else "", sparsity.replace(":", "-").replace("%", "pc"), f"r{rank:g}"]
        return "-".join(word for word in said if word not in ("", "none", "r0"))

    def part(self, name: str) -> Any:
        given = self.parts[name]
        return METHODS[self.method][name] if given is None else given

    def stages(self, target: str) -> dict[str, Any]:
        """The arguments of `recipe.slim`. Raises UsageError where options do not go together."""
        prune, quantize, adapt = self.prune(), self.quantize(), self.adapt()
        self.check(prune, quantize, adapt)
        ours = self.method == "anchored"
        form = "compact" if self.flags["compact"] else "dense" if self.flags["materialize"] else "packed"
        return {
            "prune": prune,
            "quantize": quantize,
            "adapt": adapt,
            "refit": self.part("refit"),
            "polish": (POLISH if adapt is None else POLISH_A_ROUND) if ours else 0,
            "centre": ours,
            "inputs": self.amounts["inputs"],
            "form": form,
            "target": [word.strip() for word in target.split(",")],
        }

    def prune(self) -> dict[str, Any] | None:
        pattern = self.amounts["sparsity"]
        if pattern == "none":
            return None
        iterations = {"iterations": FAST_ITERATIONS} if self.flags["fast"] and self.part("pruner") == "admm" else {}
        return {"method": self.part("pruner"), "pattern": pattern, **iterations}

    def quantize(self) -> dict[str, Any] | None:
        bits = self.amounts["bits"]
        if bits == "none":
            return None
        if bits not in BIT_WIDTHS:
            raise UsageError(f"--bits is 2 to 8, fp8 or none, got {bits!r}. Try 4.")
        floating, given = bits == "fp8", self.parts["quantizer"]
        method = "mse" if floating and given is None and self.method == "slim" else self.part("quantizer")
        return {
            "method": method,
            "bits": 8 if floating else int(bits),
            "floating": floating,
            "group": self.group(),
            "symmetric": not self.flags["asymmetric"],
            "act_order": self.flags["act_order"],
            "important_inputs": self.flags["important_inputs"],
        }

    def group(self) -> str | int | None:
        group = METHODS[self.method]["group"] if self.amounts["group"] is None else self.amounts["group"]
        if group in (None, "tensor", "channel"):
            return None if group is None else str(group)
        if not re.fullmatch(r"[2-9]|[1-9]\d+", group):
            raise UsageError(f"--group is tensor, channel or a number of inputs, got {group!r}. Try 128.")
        return int(group)

    def adapt(self) -> dict[str, Any] | None:
        rank, adapter = self.amounts["adapter_rank"], self.part("adapter")
        if rank == 0:
            return None
        if rank > 1 and not float(rank).is_integer():
            raise UsageError(f"--adapter-rank is a share below 1 or a whole number, got {rank:g}. Try 0.1 or 64.")
        rounds = ROUNDS if adapter == "anchored" and not self.flags["fast"] else 1
        return {
            "method": "whitened" if adapter == "anchored" else adapter,
            "rank": int(rank) if rank >= 1 else rank,
            "rounds": rounds,
            "bits": self.adapter_bits,
        }

    def check(self, prune: Any, quantize: Any, adapt: Any) -> None:
        if self.flags["compact"] and self.flags["materialize"]:
            raise UsageError("--compact and --materialize are two ways to store it. Leave one out.")
        if prune is None and quantize is None:
            raise UsageError("With --bits none and --sparsity none nothing gets smaller. Give one of them.")
        if self.flags["fast"] and self.method != "anchored":
            raise UsageError("--fast is an option of --method anchored. Leave it out.")
        unused = [
            ("adapter", adapt is None, "--adapter-rank 0"),
            ("pruner", prune is None, "--sparsity none"),
            ("quantizer", quantize is None, "--bits none"),
        ]
        for name, is_off, because in unused:
            if is_off and self.parts[name] is not None:
                raise UsageError(f"--{name} has no effect with {because}. Leave one out.")
        if quantize is None:
            idle = ["group"] if self.amounts["group"] is not None else []
            idle += [name for name in ("asymmetric", "act_order", "important_inputs") if self.flags[name]]
            if idle:
                raise UsageError(f"--{idle[0].replace('_', '-')} has no effect with --bits none. Leave one out.")
        if adapt is None and self.adapter_bits is not None:
            raise UsageError("--adapter-bits has no effect with --adapter-rank 0. Leave one out.")
        if self.parts["adapter"] == "anchored" and not self.part("refit"):
            raise UsageError("--adapter anchored is fitted towards the dense model: it needs --refit.")
