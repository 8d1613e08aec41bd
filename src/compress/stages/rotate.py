"""The rotation of SliceGPT (arXiv 2401.15024, section 3.3): at each point of the stream, its own principal components.

Computational invariance makes it free: RMSNorm commutes with orthogonal matrices, so Q goes into the linears that
write the stream, Q^T into those that read it, and between two bases the stream passes through Q_l^T Q_(l+1).

signal: whether the components are those of the stream after the next norm (the paper, equation 8) or before it (the
    paper's code). stream: of the compressed prefix, as the paper has it, or the dense model's: where the writers are
    refitted afterwards, that is what they are fitted to.
final_orientation: see `Basis`; the reference rotates at random without a seed, ours draws from the run's seed.
"""

from typing import ClassVar, Literal

from compress.calibration.sites import Basis, Requirements, StreamPoint
from compress.calibration.statistics import SecondMoment
from compress.numerics.frames import Frame, pca
from compress.stages._stage import StageConfig


class Rotate(StageConfig):
    site: ClassVar = StreamPoint
    reshapes: ClassVar = True
    after: ClassVar = ("fold_norms",)
    stage: Literal["rotate"] = "rotate"
    signal: Literal["stream", "normed"] = "stream"
    stream: Literal["compressed", "dense"] = "compressed"
    final_orientation: Literal["pca", "random"] = "pca"

    @property
    def requires(self) -> Requirements:
        return Requirements(statistics=(self._moment,))

    @property
    def _moment(self) -> SecondMoment:
        return SecondMoment(self.signal, dense=self.stream == "dense")

    def apply(self, point: StreamPoint) -> None:
        frame = Frame(*pca(point.statistics[self._moment], name=f"the stream after {point.name}"))
        point.basis = Basis(frame, width=point.dense_width, orientation=self.final_orientation)
