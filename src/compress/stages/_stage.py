from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from compress.streaming.sites import StreamPoint
from compress.streaming.statistics import SecondMoment


class StageConfig(BaseModel):
    """What stages have in common: strict fields, the name they go by in a recipe, and neutral answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    after: ClassVar[tuple[str, ...]] = ()
    stage: str

    @property
    def name(self) -> str:
        return self.stage

    @property
    def needs(self) -> tuple[SecondMoment, ...]:
        return ()

    def planned_width(self, point: StreamPoint) -> int | None:
        return point.width

    def faults(self, points: Sequence[StreamPoint]) -> list[str]:
        """What of this configuration does not fit a model with these points of the stream, a sentence each."""
        return []
