"""Stages of the residual stream: its norms, its basis, its width, and how far it is from the dense model's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from compress.architectures.architecture import KERNEL_STEP, ModelSpec
from compress.calibration.sites import Basis, Count, Requirements, StreamPoint, WholeModel
from compress.calibration.statistics import RelativeError, SecondMoment
from compress.calibration.survey import SurveyNeed
from compress.errors import report
from compress.models.branch import Branch, set_bias, set_weight
from compress.numerics.frames import Frame, balanced_frame, beside_the_mean, pca, width_for_energy, zero_mean_basis
from compress.numerics.functional import center_rows, fold_gain, fold_offset
from compress.own_model.modeling_compress import GainlessRMSNorm
from compress.stages._stage import StageConfig

Share = Annotated[float, Field(ge=0, lt=1)]


class FoldNorms(StageConfig):
    """Norm conversion: every norm becomes an RMSNorm without gain; gain and offset go into the linears that read it.

    LayerNorm also subtracts the mean over the stream's coordinates: that goes into what writes the stream. See
    numerics/functional.py for the formula. The function is preserved exactly; epsilon is the model's own.
    """

    site: ClassVar = Branch
    reshapes: ClassVar = True
    stage: Literal["fold_norms"] = "fold_norms"

    def apply(self, branch: Branch) -> None:
        for writer in branch.writers.values() if branch.norm_kind == "layer" else ():
            weight = writer.weight.double()
            if isinstance(writer, nn.Embedding):
                set_weight(writer, center_rows(weight.T).T)
                continue
            set_weight(writer, center_rows(weight))
            if writer.bias is not None:
                set_bias(writer, writer.bias.double() - writer.bias.double().mean())
        for group in branch.reader_groups():
            gain, offset = gain_and_offset(group.norm, branch.norm_kind)
            for linear in group.readers.values():
                weight = linear.weight.double()
                if offset is not None:
                    bias = None if linear.bias is None else linear.bias.double()
                    set_bias(linear, fold_offset(weight, bias, offset))
                if gain is not None:
                    set_weight(linear, fold_gain(weight, gain))
            group.replace_norm(GainlessRMSNorm(branch.dense_width, branch.norm_eps))


def gain_and_offset(norm: nn.Module, kind: str) -> tuple[Tensor | None, Tensor | None]:
    """The norm's diag(a) and b in float64, None where it has none (LayerNorm without affine parameters)."""
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    gain = None if weight is None else weight.double() + (1.0 if kind == "rms_plus_one" else 0.0)
    return gain, None if bias is None else bias.double()


class Rotate(StageConfig):
    """The rotation of SliceGPT (arXiv 2401.15024, section 3.3): at each point of the stream its principal components.

    Computational invariance makes it free: RMSNorm commutes with orthogonal matrices, so Q goes into the linears that
    write the stream, Q^T into those that read it, and between two bases the stream passes through Q_l^T Q_(l+1).

    signal: whether the components are those of the stream after the next norm (the paper, equation 8) or before it (the
        paper's code). stream: of the compressed prefix, as the paper has it, or the dense model's: where the writers
        are refitted afterwards, that is what they are fitted to.
    final_orientation: see `Basis`; the reference rotates at random without a seed, ours draws from the run's seed.
    """

    site: ClassVar = StreamPoint
    reshapes: ClassVar = True
    after: ClassVar = ("fold_norms",)
    stage: Literal["rotate"] = "rotate"
    signal: Literal["stream", "normed"] = "stream"
    stream: Literal["compressed", "dense"] = "compressed"
    final_orientation: Literal["pca", "random"] = "pca"

    @property
    def requires(self) -> Requirements:
        return Requirements(statistics=(SecondMoment(self.signal, dense=self.stream == "dense"),))

    def apply(self, point: StreamPoint) -> None:
        (moment,) = self.requires.statistics
        frame = Frame(*pca(point.statistics[moment], name=f"the stream after {point.name}"))
        point.basis = Basis(frame, width=point.dense_width, orientation=self.final_orientation)


class RotateShared(StageConfig):
    """One basis for the whole stream, so that it passes every branch as it is and the model is a plain, narrower one.

    SliceGPT (arXiv 2401.15024) gives each stretch of the stream a basis of its own and pays with shortcut matrices.
    Here the second moments of the normalized stream at all norms are added up, from one survey of the dense model, and
    one frame is taken of the sum. Directions count by how much the stream moves in them and how much the loss feels it
    there: `balanced_frame` has the formula; `gradient_weight` 0 leaves the principal components, and no backward pass
    is made.
    """

    site: ClassVar = WholeModel
    reshapes: ClassVar = True
    after: ClassVar = ("fold_norms",)
    stage: Literal["rotate_shared"] = "rotate_shared"
    gradient_weight: Share = 0.9

    @property
    def requires(self) -> Requirements:
        gradient = SurveyNeed.GRADIENT if self.gradient_weight else SurveyNeed.NONE
        return Requirements(survey=SurveyNeed.STREAM | gradient)

    def apply(self, model: WholeModel) -> None:
        C, G, name = model.survey.moment, model.survey.gradient, "the stream of the whole model"
        if not model.layer_norm:
            model.frame = balanced_frame(C, G, self.gradient_weight, name=name)
            return
        H = zero_mean_basis(len(C)).to(C.device)
        gradient, name = None if G is None else H.T @ G @ H, f"{name} without its mean"
        model.frame = beside_the_mean(balanced_frame(H.T @ C @ H, gradient, self.gradient_weight, name=name), H)


class Slice(StageConfig):
    """Deleting the stream's least principal directions (SliceGPT, arXiv 2401.15024, section 3.4).

    How many are kept is a share of the hidden size (`ratio` says what is deleted: one number, or one for each block, or
    a line from the first block to the last), a `width`, or what holds a share of the energy (`explained_variance`, the
    paper's table 6); with none of these the recipe's budget decides. Widths are rounded down to a multiple of
    `round_to`, by default what suits the architecture. The last block's output and the head keep the full width unless
    `slice_head`, as in the paper's code: the head reads what no later block could correct.
    """

    site: ClassVar = StreamPoint
    reshapes: ClassVar = True
    after: ClassVar = ("rotate or rotate_shared",)
    rules: ClassVar = ("ratio", "block_ratios", "linear_ratios", "explained_variance", "width")
    stage: Literal["slice"] = "slice"
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    block_ratios: tuple[Share, ...] | None = None
    linear_ratios: tuple[Share, Share] | None = None
    explained_variance: Annotated[float, Field(gt=0, le=1)] | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    round_to: Annotated[int, Field(ge=1)] | None = None
    slice_head: bool = False

    @property
    def opens(self) -> str | None:
        return None if self.told else "hidden"

    @property
    def step(self) -> int:
        return self.round_to or 1

    def decided(self, choice: Mapping[str, Count]) -> "Slice":
        return self.model_copy(update={"width": choice["hidden"]}) if self.opens else self

    def plan(self, spec: ModelSpec) -> tuple["Slice", ModelSpec]:
        stage = self
        if self.round_to is None and self.width is None:
            step = spec.architecture.steps()["hidden"]
            stage = self.model_copy(update={"round_to": step})
            if spec.architecture.is_stock and step % KERNEL_STEP:
                note = (
                    f"Hidden sizes come in multiples of {step}: multiples of {KERNEL_STEP}, which Marlin kernels and "
                    "group-wise quantization take, would be too coarse for this model."
                )
                spec = replace(spec, notes=(*spec.notes, note))
        report(stage.problems(spec.points))
        if stage.opens:
            return stage, replace(spec, undecided=spec.undecided | {"hidden"})
        widths = (stage.planned_width(point) for point in spec.points)
        narrowed = (
            None if before is None or width is None else min(before, width)
            for before, width in zip(spec.widths, widths, strict=True)
        )
        return stage, replace(spec, widths=tuple(narrowed))

    def apply(self, point: StreamPoint) -> None:
        if point.basis is None:
            raise ValueError(f"{point.name} has no basis to slice: rotate comes first.")
        width = self.planned_width(point)
        if width is None:
            assert self.explained_variance is not None
            width = self.rounded(width_for_energy(point.basis.frame.energy, self.explained_variance), point.dense_width)
        point.basis.width = width

    def planned_width(self, point: StreamPoint) -> int | None:
        """The width that it gives the stream at a point; None if the data decides."""
        if (point.is_last and not self.slice_head) or self.opens:
            return point.dense_width
        if self.width is not None:
            return self.width
        ratio = self.ratio_at(point)
        return None if ratio is None else self.rounded(int((1 - ratio) * point.dense_width), point.dense_width)

    def ratio_at(self, point: StreamPoint) -> float | None:
        if self.linear_ratios is not None:
            first, last = self.linear_ratios
            return first + (last - first) * point.block / max(1, point.num_blocks - 1)
        return self.block_ratios[point.block] if self.block_ratios is not None else self.ratio

    def rounded(self, width: int, dense_width: int) -> int:
        """Down to a multiple of `round_to`, but at least one of them; the full width is left as it is."""
        return width if width == dense_width else max(width - width % self.step, self.step)

    def problems(self, points: Sequence[StreamPoint]) -> list[str]:
        """What does not fit a model whose stream has these points."""
        problems = []
        num_blocks, dense_width = points[0].num_blocks, points[0].dense_width
        if self.block_ratios is not None and len(self.block_ratios) != num_blocks:
            return [f"{len(self.block_ratios)} ratios are given for {num_blocks} blocks. Give one for each block."]
        ratios = [ratio for ratio in map(self.ratio_at, points) if ratio is not None]
        if self.width is not None and self.width > dense_width:
            problems.append(f"The width {self.width} is more than the model's hidden size of {dense_width}. Use less.")
        if ratios and int((1 - max(ratios)) * dense_width) < self.step:
            problems.append(
                f"The ratio {max(ratios)} leaves less than {self.round_to} of {dense_width} dimensions (widths are "
                f"multiples of {self.round_to}). Use a smaller ratio or --round-to."
            )
        if ratios and all(self.planned_width(point) == dense_width for point in points):
            problems.append(f"The ratio {max(ratios)} deletes nothing of {dense_width} dimensions. Use a larger one.")
        return problems


class MeasureError(StageConfig):
    """How far the compressed prefix has taken the stream from the dense model's at each point: a number for the report.

    The error at a point is that of everything before it; what is cut away at the point itself shows at the next.
    It costs a second pass of every block, the dense one, and a second activation cache.
    """

    site: ClassVar = StreamPoint
    stage: Literal["measure_error"] = "measure_error"

    @property
    def requires(self) -> Requirements:
        return Requirements(statistics=(RelativeError(),))

    def apply(self, point: StreamPoint) -> None:
        point.notes["relative_error"] = float(point.statistics[RelativeError()])
