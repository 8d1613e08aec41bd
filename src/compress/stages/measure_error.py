"""How far the compressed prefix has taken the stream from the dense model's, at each point: a number for the report.

The error at a point is that of everything before it; what is cut away at the point itself shows at the next.
It costs a second pass of every block, the dense one, and a second activation cache.
"""

from typing import ClassVar, Literal

from compress.calibration.sites import Requirements, StreamPoint
from compress.calibration.statistics import RelativeError
from compress.stages._stage import StageConfig


class MeasureError(StageConfig):
    site: ClassVar = StreamPoint
    stage: Literal["measure_error"] = "measure_error"

    @property
    def requires(self) -> Requirements:
        return Requirements(statistics=(RelativeError(),))

    def apply(self, point: StreamPoint) -> None:
        point.notes["relative_error"] = float(point.statistics[RelativeError()])
