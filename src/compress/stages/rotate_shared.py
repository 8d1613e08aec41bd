"""One basis for the whole stream, so that it passes every branch as it is and a sliced model is a plain, narrower one.

SliceGPT (arXiv 2401.15024) gives each stretch of the stream a basis of its own and pays with shortcut matrices. Here
the second moments of the normalized stream at all norms are added up, from one survey of the dense model, and one frame
is taken of the sum. Directions count by how much the stream moves in them and how much the loss feels it there:
`balanced_frame` has the formula; `gradient_weight` 0 leaves the principal components, and no backward pass is made.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compress.calibration.sites import Requirements, WholeModel
from compress.calibration.survey import SurveyNeed
from compress.numerics.frames import balanced_frame, beside_the_mean, zero_mean_basis
from compress.stages._stage import StageConfig


class RotateShared(StageConfig):
    site: ClassVar = WholeModel
    reshapes: ClassVar = True
    after: ClassVar = ("fold_norms",)
    stage: Literal["rotate_shared"] = "rotate_shared"
    gradient_weight: Annotated[float, Field(ge=0, lt=1)] = 0.9

    @property
    def requires(self) -> Requirements:
        gradient = SurveyNeed.GRADIENT if self.gradient_weight else SurveyNeed.NONE
        return Requirements(survey=SurveyNeed.STREAM | gradient)

    def apply(self, model: WholeModel) -> None:
        C, G = model.survey.moment, model.survey.gradient
        name = "the stream of the whole model"
        if not model.layer_norm:
            model.frame = balanced_frame(C, G, self.gradient_weight, name=name)
            return
        H = zero_mean_basis(len(C)).to(C.device)
        within = balanced_frame(
            H.T @ C @ H, None if G is None else H.T @ G @ H, self.gradient_weight, name=f"{name} without its mean"
        )
        model.frame = beside_the_mean(within, H)
