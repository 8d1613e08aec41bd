"""How much is to be deleted, from what was typed: a rule for the stage that does it, or a budget for the model."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.cli.options import parse_size
from compress.errors import UsageError

# The ways to say it, each with an example, for `slice` and for `lord`.
BUDGETS = {"keep_params": "--keep-params 0.75", "target_size": "--target-size 4GB"}
SLICING = {"ratio": "--ratio 0.25", **BUDGETS, "explained_variance": "--explained-variance 0.99"}
RANKS = {"rank_frac": "--rank-frac 0.6", "rank": "--rank 1024", **BUDGETS}
SHARES = {
    "explained_variance": "--explained-variance is a share above 0 and up to 1, such as 0.99",
    "rank_frac": "--rank-frac is a share above 0 and up to 1, such as 0.6, which keeps 60% of each rank",
}
IN_NAME = {
    "ratio": "{}",
    "keep_params": "kp{}",
    "target_size": "{}",
    "explained_variance": "ev{}",
    "rank_frac": "rf{}",
    "rank": "r{}",
}


@dataclass(frozen=True)
class Amount:
    """
    typed: the option it was given by and its value. rule: how the stage chooses; empty where the budget does.
    """

    typed: Mapping[str, Any]
    rule: dict[str, Any]
    budget: dict[str, Any] | None = None

    @property
    def in_name(self) -> str:
        """As the default output folder says it."""
        ((option, value),) = self.typed.items()
        # A ratio for each of many blocks is longer than a file's name may be.
        name = IN_NAME[option].format(value)
        if len(name) > 40:
            return f"ratios-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return name.replace(":", "-").replace(" ", "")


def parse_amount(typed: Mapping[str, Any], ways: Mapping[str, str], trial_samples: int | None) -> Amount:
    """
    typed: the values of the options in `ways`, None where not given. Raises UsageError unless exactly one is.
    """
    given = {option: value for option, value in typed.items() if value is not None}
    if len(given) != 1:
        raise UsageError(f"Say how much to delete by one of {', '.join(ways.values())}; got {len(given)} of them.")
    ((option, value),) = given.items()
    if option == "ratio":
        return Amount(given, ratio_rule(value))
    if option == "rank":
        return Amount(given, {"rank": value})
    if option in SHARES:
        if not 0 < value <= 1:
            raise UsageError(f"{SHARES[option]}, got {value}.")
        return Amount(given, {option: value})
    if option == "keep_params":
        if not 0 < value < 1:
            raise UsageError(f"--keep-params is a share above 0 and below 1, got {value}. 0.75 keeps three quarters.")
        return Amount(given, {}, {"keep_params": value, "trial_samples": trial_samples})
    size = parse_size(value, "--target-size")
    if size < 1:
        raise UsageError(f"--target-size is a size above 0, got {value!r}. Try 4GB.")
    return Amount(given, {}, {"target_size": size, "trial_samples": trial_samples})


def ratio_rule(ratio: str) -> dict[str, Any]:
    if ":" in ratio:
        ends = parse_ratios(ratio, ":")
        if len(ends) != 2:
            raise UsageError(f"--ratio FIRST:LAST takes two numbers, got {ratio!r}. Try 0.1:0.3.")
        return {"linear_ratios": ends}
    if "," in ratio:
        return {"block_ratios": parse_ratios(ratio, ",")}
    return {"ratio": parse_ratios(ratio, None)[0]}


def parse_ratios(text: str, separator: str | None) -> list[float]:
    ratios = []
    for word in text.split(separator) if separator else [text]:
        try:
            ratio = float(word)
        except ValueError as error:
            raise UsageError(f"--ratio is a number such as 0.25, got {word!r}.") from error
        if not 0 <= ratio < 1 or (ratio == 0 and separator is None):
            lowest = "above 0" if separator is None else "of at least 0"
            raise UsageError(
                f"--ratio is a share {lowest} and below 1, got {word}. 0.25 deletes a quarter of the hidden size."
            )
        ratios.append(ratio)
    return ratios
