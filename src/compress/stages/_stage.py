from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from compress.models.branch import Branch
from compress.streaming.sites import StreamPoint
from compress.streaming.statistics import Need


class StageConfig(BaseModel):
    """What a stage is: strict fields, and data about itself that the walk and the plan go by.

    site: the kind of site it works on. after: the stages that must come before it in a recipe.
    stage: its name there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    site: ClassVar[type[Branch] | type[StreamPoint]]
    after: ClassVar[tuple[str, ...]] = ()
    stage: str

    @property
    def needs(self) -> tuple[Need, ...]:
        """The statistics that `apply` finds at a point of the stream."""
        return ()

    @abstractmethod
    def apply(self, site: Any) -> None:
        """Do it at one site."""

    def planned_width(self, point: StreamPoint) -> int | None:
        """The width this stage will give a stream of `point.width`, from the config alone; None if the data decides."""
        return point.width

    def faults(self, points: Sequence[StreamPoint]) -> list[str]:
        """What of this configuration does not fit a model with these points of the stream, a sentence each."""
        return []
