import fnmatch
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from compress.architectures.architecture import ModelSpec
from compress.calibration.groups import LinearGroup
from compress.calibration.linears import LinearShape
from compress.calibration.sites import Requirements, Site

USUAL_GROUP = 128  # what engines' kernels are made for


class Strict(BaseModel):
    """Fields that are known, of the kinds that they say, and finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StageConfig(Strict):
    """A stage: strict fields, what it makes of a model's sizes, and what it does to weights at one kind of site.

    site: the kind of site that `apply` is called with. after: the stages that must come before it in a recipe, each
    entry one stage or several with `or` between them. reshapes: whether it changes norms or widths of the model.
    in_written_form: whether it finds linears as the checkpoint has them, not as the walk does. stage: its name there.
    rules: fields of which at most one says how much it keeps. step: widths that it gives come in multiples of this.
    opens: what it leaves to the recipe's budget: `hidden`, `neurons` or `kv_groups`, `blocks`, `ranks` or `types`.
    dropped: the blocks of the dense model that it leaves out, as far as they are known.
    """

    site: ClassVar[type[Site]]
    after: ClassVar[tuple[str, ...]] = ()
    reshapes: ClassVar[bool] = False
    in_written_form: ClassVar[bool] = False
    rules: ClassVar[tuple[str, ...]] = ()
    stage: str

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if len(self.told) > 1:
            raise ValueError(f"{self.stage} takes one of {', '.join(self.rules)}; got {', '.join(self.told)}")
        return self

    @property
    def told(self) -> list[str]:
        """Those of the rules that are given."""
        return [rule for rule in self.rules if getattr(self, rule) is not None]

    @property
    def requires(self) -> Requirements:
        return Requirements()

    @property
    def opens(self) -> str | None:
        return None

    @property
    def step(self) -> int:
        return 1

    @property
    def changes_stream(self) -> bool:
        """Whether it changes the basis or the norms of the stream."""
        return self.reshapes and not issubclass(self.site, LinearGroup)

    @property
    def dropped(self) -> tuple[int, ...]:
        return ()

    def decided(self, choice: Mapping[str, Any]) -> Self:
        """Take what the budget came to: widths by kind, `ranks` and `forms`, or `types` and those of `tables`."""
        return self

    def plan(self, spec: ModelSpec) -> tuple[Self, ModelSpec]:
        """Work out what it makes of a model: itself with all that follows from the model said, and the new sizes.

        Raises UsageError with what of its configuration does not fit.
        """
        return self, spec

    @property
    def in_trials(self) -> Self:
        """The stage as trials run it: cheaper, where that does not change which choice is best."""
        return self

    @abstractmethod
    def apply(self, site: Any) -> None:
        """Do it at one site."""

    def apply_together(self, sites: Sequence[Any]) -> None:
        """Do it at several linears that are given the same inputs."""
        for site in sites:
            self.apply(site)


# Which linears a stage works on, as a user says it: `all`, a part of the block, or patterns of names below a block.


def is_target(patterns: Sequence[str], name: str, part: str) -> bool:
    """Tell whether patterns match a linear.

    name: of the linear below its block. part: of the block, `attention`, `mlp` or `router`, which `all` leaves out.
    """
    name = name.removesuffix(".first").removesuffix(".second")  # of what is factorized
    return any(
        pattern == part
        or (pattern == "all" and part != "router")
        or fnmatch.fnmatchcase(name, pattern)
        or fnmatch.fnmatchcase(name, f"*.{pattern}")
        for pattern in patterns
    )


def unmatched(patterns: Sequence[str], linears: Sequence[LinearShape]) -> list[str]:
    """A sentence for each pattern that no linear matches."""
    names = ", ".join(sorted({linear.name for linear in linears}))
    return [
        f"No linear matches the target {pattern!r}. There are {names}."
        for pattern in patterns
        if not any(is_target((pattern,), linear.name, linear.part) for linear in linears)
    ]
