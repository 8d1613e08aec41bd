from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict

from compress.models.storage import Storage
from compress.streaming.linears import FactorShape, LinearShape, LinearSite
from compress.streaming.sites import Count, Site, StreamPoint
from compress.streaming.spectra import LinearWatch
from compress.streaming.statistics import Need
from compress.streaming.survey import SurveyNeed


class StageConfig(BaseModel):
    """What a stage is: strict fields, and data about itself that the walk and the plan go by.

    site: the kind of site it works on. after: the stages that must come before it in a recipe, each entry one stage or
    several with `or` between them. reshapes: whether norms or widths of the model change by it.
    in_written_form: whether it finds linears as the checkpoint has them, not as the walk does. stage: its name there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    site: ClassVar[type[Site]]
    after: ClassVar[tuple[str, ...]] = ()
    reshapes: ClassVar[bool] = False
    in_written_form: ClassVar[bool] = False
    stage: str

    @property
    def needs(self) -> tuple[Need, ...]:
        """The statistics that `apply` finds at a point of the stream."""
        return ()

    @property
    def dense_inputs(self) -> bool:
        """Whether it goes by what the dense model gives each linear, not by what the compressed prefix does."""
        return False

    @property
    def plain_inputs(self) -> bool:
        """Whether it is content with what the compressed prefix gives each linear while its branch is not yet changed.

        Otherwise a linear's inputs come from those of its branch that are already rewritten, and tokens of writers
        weigh as the next norm will weigh them.
        """
        return False

    @property
    def survey(self) -> SurveyNeed:
        """What it needs to know of the whole dense model before the walk."""
        return SurveyNeed.NONE

    @property
    def watch(self) -> LinearWatch | None:
        """Which linears the survey is to look at for it."""
        return None

    @property
    def held_out_share(self) -> float:
        """The share of the calibration windows that it chooses on and does not fit on."""
        return 0.0

    @property
    def in_trials(self) -> "StageConfig":
        """The stage as trials run it: cheaper, where that does not change which choice is best."""
        return self

    @abstractmethod
    def apply(self, site: Any) -> None:
        """Do it at one site."""

    def apply_together(self, sites: Sequence[Any]) -> None:
        """Do it at several linears that are given the same inputs."""
        for site in sites:
            self.apply(site)

    def resolved(self, steps: Mapping[str, int]) -> "StageConfig":
        """With what was left to the architecture: widths of each kind come in multiples of its step."""
        return self

    @property
    def rounds(self) -> str | None:
        """The kind of width whose step it leaves to the architecture."""
        return None

    @property
    def opens(self) -> str | None:
        """What it leaves to the recipe's budget: a kind of width, `hidden`, `neurons` or `kv_groups`, or `ranks`."""
        return None

    @property
    def step(self) -> int:
        """Widths that it gives come in multiples of this."""
        return 1

    def fitted(self, counts: Mapping[str, Any]) -> "StageConfig":
        """With the widths that the budget came to, by kind, or the `ranks` by linear."""
        return self

    def planned_width(self, point: StreamPoint) -> int | None:
        """The width this stage will give a stream of `point.width`, from the config alone; None if the data decides."""
        return point.width

    def planned_units(self, kind: str, count: int) -> Count:
        """How many of `count` units of a kind this stage leaves in the blocks."""
        return count

    def faults(self, points: Sequence[StreamPoint], units: Mapping[str, int]) -> list[str]:
        """What of this configuration does not fit a model with these points of the stream and units of each kind."""
        return []


class FactorisingStage(StageConfig):
    """A stage that makes linears low-rank: what the plan and the budget ask it about ranks."""

    site: ClassVar = LinearSite

    @property
    @abstractmethod
    def open_ranks(self) -> bool:
        """Whether its ranks are to be found, from the survey or under a budget."""

    @property
    @abstractmethod
    def writes_factors(self) -> bool:
        """Whether it leaves linears in factors, and does not multiply them out."""

    @property
    @abstractmethod
    def uniform(self) -> "FactorisingStage":
        """With the ranks that it would give without looking at the model."""

    @property
    @abstractmethod
    def allocations(self) -> tuple[str, ...]:
        """The ways to spread ranks over the linears that are to be compared."""

    @property
    @abstractmethod
    def watch(self) -> LinearWatch: ...

    @abstractmethod
    def targets(self, linear: LinearShape) -> bool:
        """Whether it means to factorise a linear."""

    @abstractmethod
    def planned_factors(self, linears: Sequence[LinearShape]) -> dict[str, FactorShape]:
        """What becomes of the linears that it factorises, by path; those that stay dense are left out."""

    @abstractmethod
    def settled(self, linears: Sequence[LinearShape]) -> "FactorisingStage":
        """With what it plans for each linear said, so that it does not depend on how the walk meets it."""

    @abstractmethod
    def factor_shape(self, linear: LinearShape, rank: int) -> FactorShape:
        """What it makes of a linear at a rank."""

    @abstractmethod
    def rank_ladder(self, linear: LinearShape) -> list[int]:
        """The ranks that it can give a linear to make it smaller, increasing; none where it leaves it alone."""

    @abstractmethod
    def linear_faults(self, linears: Sequence[LinearShape]) -> list[str]:
        """What of this configuration does not fit a model with these linears in its blocks."""


class StoringStage(StageConfig):
    """A stage that stores linears in fewer bits or numbers: what the plan asks it about them.

    form: what it leaves: linears stored as `Storage` says, or dense ones of the old size.
    """

    site: ClassVar = LinearSite
    in_written_form: ClassVar = True
    form: Literal["packed", "compact", "dense"] = "packed"

    @abstractmethod
    def settled(self, linears: Sequence[LinearShape], dtype: torch.dtype) -> "StoringStage":
        """With what goes by the model's linears and the dtype that is written said."""

    @abstractmethod
    def planned_storage(self, linears: Sequence[LinearShape]) -> dict[str, Storage]:
        """How it stores the linears that it works on, by path."""

    @abstractmethod
    def linear_faults(self, linears: Sequence[LinearShape]) -> list[str]:
        """What of this configuration does not fit a model with these linears in its blocks."""
