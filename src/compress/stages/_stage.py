from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from compress.streaming.sites import Count, Site, StreamPoint
from compress.streaming.statistics import Need
from compress.streaming.survey import SurveyNeed


class StageConfig(BaseModel):
    """What a stage is: strict fields, and data about itself that the walk and the plan go by.

    site: the kind of site it works on. after: the stages that must come before it in a recipe, each entry one stage or
    several with `or` between them.
    stage: its name there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    site: ClassVar[type[Site]]
    after: ClassVar[tuple[str, ...]] = ()
    stage: str

    @property
    def needs(self) -> tuple[Need, ...]:
        """The statistics that `apply` finds at a point of the stream."""
        return ()

    @property
    def survey(self) -> SurveyNeed:
        """What it needs to know of the whole dense model before the walk."""
        return SurveyNeed.NONE

    @property
    def held_out_share(self) -> float:
        """The share of the calibration windows that it chooses on and does not fit on."""
        return 0.0

    @abstractmethod
    def apply(self, site: Any) -> None:
        """Do it at one site."""

    def resolved(self, steps: Mapping[str, int]) -> "StageConfig":
        """With what was left to the architecture: widths of each kind come in multiples of its step."""
        return self

    @property
    def rounds(self) -> str | None:
        """The kind of width whose step it leaves to the architecture."""
        return None

    @property
    def opens(self) -> str | None:
        """The kind of width that it leaves to the recipe's budget: `hidden`, `neurons` or `kv_groups`."""
        return None

    @property
    def step(self) -> int:
        """Widths that it gives come in multiples of this."""
        return 1

    def fitted(self, counts: Mapping[str, Count]) -> "StageConfig":
        """With the widths that the budget came to, by kind."""
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
