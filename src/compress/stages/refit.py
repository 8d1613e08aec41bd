"""The anchored refit: what reads and what writes the compressed stream is solved again, toward the dense model.

Every group of linears is asked to make of what the compressed prefix gives it what the dense model had at its place,
by ridge regression toward the weights it has (`calibration/groups.py` says what that means for readers and writers,
`numerics/ridge.py` how it is solved). Errors of the prefix are made up for by the groups after it, which a method that
lets each layer reproduce itself cannot do. Nothing changes where the compressed prefix is the dense one.

How strongly a group is drawn toward its weights is chosen on windows that it is not fitted on; where no fit is better
there than the weights as they are, they stay. So do those of an expert that none of these windows' tokens reach.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compress.calibration.groups import LinearGroup
from compress.calibration.sites import Requirements
from compress.numerics.ridge import choose_damping, ridge
from compress.stages._stage import StageConfig

TRIAL_DAMPING = 0.03


class Refit(StageConfig):
    """
    held_out: the share of the calibration windows to choose the damping on. damping: a fixed one instead, in units of
        the mean diagonal of the inputs' second moment.
    """

    site: ClassVar = LinearGroup
    stage: Literal["refit"] = "refit"
    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.125
    damping: Annotated[float, Field(gt=0)] | None = None

    @property
    def requires(self) -> Requirements:
        return Requirements(held_out=self.held_out)

    @property
    def in_trials(self) -> "Refit":
        return self if self.damping else self.model_copy(update={"damping": TRIAL_DAMPING})

    def apply(self, group: LinearGroup) -> None:
        if self.damping is not None:
            group.matrix, group.damping = ridge(group.fit, group.matrix, self.damping, name=group.name), self.damping
            return
        if not group.held_out.tokens:
            return
        chosen = choose_damping(group.fit, group.held_out, group.matrix, name=group.name, metric=group.metric)
        if chosen is None:
            return
        group.matrix = chosen.W
        group.damping = group.notes["damping"] = chosen.damping
