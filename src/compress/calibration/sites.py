"""The sites that stages work on, and the interface of a stage.

A run meets seven kinds of sites: the dense model's blocks, of which some may be left out, and the whole model, before
the first weight is changed; a branch when its weights have been read, a group of linears when it is known what the
compressed prefix gives them and what the dense model gave them, a single linear when its group is done with, a point of
the residual stream when a branch has written it, and the tables of embeddings and head in their written form. A stage
names the kind it takes, the statistics it needs there and the stages that must come before it; the walk calls it at
each site of that kind and knows nothing else about it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Float64
from torch import Tensor

from compress.calibration.depth import Depth
from compress.calibration.groups import LinearGroup
from compress.calibration.linears import LinearSite
from compress.calibration.observers import LinearFilter
from compress.calibration.statistics import Need
from compress.calibration.survey import Survey, SurveyNeed
from compress.families import Family
from compress.models.branch import Branch
from compress.numerics.frames import Frame, kept_energy, random_orthogonal, spectrum
from compress.numerics.moments import InputMoments


@dataclass
class WholeModel:
    """The model before the walk: the survey of the dense one, and the frame that all points share.

    layer_norm: its norms are LayerNorms, so that the stream has no mean.
    """

    survey: Survey
    layer_norm: bool
    frame: Frame | None = None


@dataclass
class Basis:
    """A frame of the stream and how many of its directions are kept.

    orientation: how the kept subspace is spanned; `pca` by its principal components, `random` by a rotation of them,
        which spreads outliers over all coordinates and changes no function.
    is_shared: the frame is that of all points.
    """

    frame: Frame
    width: int
    orientation: Literal["pca", "random"] = "pca"
    is_shared: bool = False


@dataclass
class StreamPoint:
    """The residual stream after the embeddings (index 0) or after the branch `index` - 1.

    block: the block the point lies in; for the embeddings, the first one.
    statistics: what the stages declared, by need.
    basis: set by a stage that rotates; None leaves the stream as it is.
    notes: what stages have to say about the point in the report.
    """

    index: int
    block: int
    num_blocks: int
    is_last: bool
    dense_width: int
    name: str
    seed: int
    statistics: Mapping[Need, Tensor] = field(default_factory=dict)
    basis: Basis | None = None
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.dense_width if self.basis is None else self.basis.width

    def change(self, directions: int) -> tuple[Float64[Tensor, "D d"], Float64[Tensor, "d D"]] | None:
        """Matrices into the basis of the first `directions` of the frame, and back to the dense stream."""
        if self.basis is None:
            return None
        encode, decode = self.basis.frame.encode(directions), self.basis.frame.decode(directions)
        if self.basis.orientation == "random":
            turn = random_orthogonal(directions, self.generator()).to(encode.device)
            encode, decode = encode @ turn, turn.T @ decode
        return encode.contiguous(), decode.contiguous()

    def generator(self) -> torch.Generator:
        """A random generator seeded by the point, so that a resumed run draws the same numbers."""
        digest = hashlib.sha256(f"{self.seed}/{self.index}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def close(self) -> dict[str, Any]:
        """Return the point's report and free its matrices, which would make memory grow with depth."""
        report: dict[str, Any] = {"point": self.name, "width": self.width, "dense_width": self.dense_width}
        if self.basis is not None:
            energy = self.basis.frame.energy
            report |= {"kept_energy": kept_energy(energy, self.basis.width)}
            if self.index == 0 or not self.basis.is_shared:  # what all points share is said once
                report |= {"spectrum": spectrum(energy)}
        self.statistics, self.basis = {}, None
        return report | self.notes


@dataclass
class Table:
    """The embeddings' table or the head, as it is written.

    path: below the causal LM. weight: (vocabulary, d). inputs: of a head by itself; None of a table of embeddings.
    stored, values: set by a stage that quantizes it: the tensors that are stored, by their names below the path, and
    the weight that they stand for.
    """

    path: str
    weight: Tensor
    inputs: InputMoments | None = None
    stored: dict[str, Tensor] = field(default_factory=dict)
    values: Tensor | None = None


def stream_points(dense_width: int, *, num_blocks: int, branch_names: list[str], seed: int) -> list[StreamPoint]:
    """List the points of a decoder's stream in order: after the embeddings, then after each branch of each block."""
    places = [(0, "embeddings")]
    places += [(block, f"block {block} {name}") for block in range(num_blocks) for name in branch_names]
    last = len(places) - 1
    return [
        StreamPoint(index, block, num_blocks, index == last, dense_width, name, seed)
        for index, (block, name) in enumerate(places)
    ]


# How many units of a kind: in every block, or one number a block.
Count = int | tuple[int, ...]

Site = Depth | WholeModel | Branch | LinearGroup | LinearSite | StreamPoint | Table


@dataclass(frozen=True)
class Requirements:
    """What a stage needs of a run.

    statistics: at each point of the stream. survey: of the whole dense model, before the walk.
    watch: which linears the survey looks at. held_out: the share of the calibration windows that it chooses on and does
        not fit on.
    inputs: of each linear: `sequential`, from the linears of its branch that are already rewritten, with tokens of
        writers weighted as the next norm weights them; `single_pass`, those of the compressed prefix before the branch
        changes; `dense`, those of the dense model.
    """

    statistics: tuple[Need, ...] = ()
    survey: SurveyNeed = SurveyNeed.NONE
    watch: LinearFilter | None = None
    held_out: float = 0.0
    inputs: Literal["sequential", "single_pass", "dense"] = "sequential"


class Stage(Protocol):
    """A configuration and what it does at one site: all that the walk knows of a stage."""

    site: ClassVar[type[Site]]
    reshapes: ClassVar[bool]
    in_written_form: ClassVar[bool]

    @property
    def requires(self) -> Requirements: ...

    def apply(self, site: Any) -> None: ...

    def apply_together(self, sites: Sequence[Any]) -> None: ...


# What a walk needs, by all its stages.


def rotates_points(stages: Iterable[Stage]) -> bool:
    return any(stage.site is StreamPoint and stage.reshapes for stage in stages)


def has_linears(stages: Iterable[Stage]) -> bool:
    return any(stage.site is LinearSite or issubclass(stage.site, LinearGroup) for stage in stages)


def has_groups(stages: Sequence[Stage]) -> bool:
    """Whether stages see groups of linears, or single ones in their groups' order and weights.

    Where the basis changes, single ones are always met so: writers are encoded before they are rewritten.
    """
    reshapes = any(stage.reshapes for stage in stages)
    return any(
        issubclass(stage.site, LinearGroup)
        or (stage.site is LinearSite and (reshapes or stage.requires.inputs != "single_pass"))
        for stage in stages
    )


def follows_dense(stages: Iterable[Stage]) -> bool:
    """Whether the only inputs that stages see are the dense model's own."""
    return any(stage.requires.inputs == "dense" for stage in stages)


def is_anchored(stages: Sequence[Stage]) -> bool:
    """Whether groups are fitted to what the dense model has in their place."""
    return has_groups(stages) and not follows_dense(stages)


def keeps_before_post_norms(stages: Sequence[Stage], family: Family) -> bool:
    """Whether writers are fitted to what the norms after them are given in the dense model."""
    return family.has_post_norms and is_anchored(stages)


def num_streams(stages: Sequence[Stage]) -> int:
    """Return 1 for the compressed stream alone, 2 where a stage compares with the dense one."""
    compared = any(need.dense for stage in stages for need in stage.requires.statistics)
    return 2 if compared or is_anchored(stages) else 1
