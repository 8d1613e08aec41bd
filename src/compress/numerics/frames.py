"""Nested subspaces of the residual stream and bases for them.

A frame gives for every width d a decode (d, D), orthonormal rows that span the subspace, and an encode (D, d) with
encode^T decode^T = I: x is kept as x encode and stands for x encode decode. An orthogonal frame has encode = decode^T,
the nearest point of the subspace (SliceGPT). An oblique one projects along directions that the loss does not feel.

Dimensions: D the dense width, d <= D a kept width.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from compress.numerics.linalg import pca
from compress.numerics.ridge import cholesky


@runtime_checkable
class Frame(Protocol):
    @property
    def energy(self) -> Float64[Tensor, "D"]:
        """The stream's mean square along each direction of the decode; an orthogonal frame's by decreasing energy."""

    def encode(self, width: int) -> Float64[Tensor, "D d"]: ...

    def decode(self, width: int) -> Float64[Tensor, "d D"]: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that define it."""


@dataclass(frozen=True)
class OrthogonalFrame:
    Q: Float64[Tensor, "D D"]
    energy: Float64[Tensor, "D"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.Q, self.energy

    def encode(self, width: int) -> Float64[Tensor, "D d"]:
        return self.Q[:, :width].contiguous()

    def decode(self, width: int) -> Float64[Tensor, "d D"]:
        return self.Q[:, :width].T.contiguous()


@dataclass(frozen=True)
class ObliqueFrame:
    """Q R = Dec, the directions that are kept; Enc^T Dec = I.

    importance: what each direction of Dec holds of what the frame ranks by, in decreasing order.
    """

    Q: Float64[Tensor, "D D"]
    R: Float64[Tensor, "D D"]
    Enc: Float64[Tensor, "D D"]
    energy: Float64[Tensor, "D"]
    importance: Float64[Tensor, "D"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.Q, self.R, self.Enc, self.energy, self.importance

    def encode(self, width: int) -> Float64[Tensor, "D d"]:
        if width == len(self.Q):
            return self.Q  # all of the space: every projection is the identity
        return self.Enc[:, :width] @ self.R[:width, :width].T

    def decode(self, width: int) -> Float64[Tensor, "d D"]:
        return self.Q[:, :width].T.contiguous()


# Of the mean variance: keeps directions in which the calibration text never moves from having none at all.
FLOOR = 1e-6


def balanced_frame(
    C: Float64[Tensor, "D D"], G: Float64[Tensor, "D D"] | None, gradient_weight: float, *, name: str
) -> Frame:
    """Balanced truncation: order directions by the stream's energy and the loss's gradient in them.

    C: second moment of the normalized stream. G: that of the loss's gradient there. With both scaled to trace D and
    C = L L^T, the frame keeps the top eigenvectors V of L^T ((1 - w) I + w G) L, w the gradient weight: Dec = L V,
    Enc = L^-T V. For w = 0 these are C's principal components and the frame is orthogonal.
    """
    if G is None or gradient_weight == 0:
        return OrthogonalFrame(*pca(C, name=name))
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    L = cholesky(C / C.diagonal().mean() + FLOOR * identity, name=name)
    felt = (1 - gradient_weight) * identity + gradient_weight * G / G.diagonal().mean()
    V, importance = pca(L.T @ felt @ L, name=f"the loss's gradient at {name}")
    Q, R = torch.linalg.qr(L @ V)
    energy = (Q * (C @ Q)).sum(0)
    return ObliqueFrame(Q, R, torch.linalg.solve_triangular(L.T, V, upper=True), energy, importance)


def beside_the_mean(frame_of: Frame, complement: Float64[Tensor, "D D_less_1"]) -> Frame:
    """Extend a frame of the space without the mean direction to the whole space: the mean comes last, with no energy.

    complement: an orthonormal basis of the vectors whose coordinates sum to zero, which is where LayerNorm lives.
    """
    D = len(complement)
    ones = complement.new_full((D, 1), D**-0.5)

    def widened(matrix: Tensor) -> Tensor:
        return torch.cat([complement @ matrix, ones], dim=1)

    def with_none(values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(1)])

    if isinstance(frame_of, ObliqueFrame):
        R = torch.block_diag(frame_of.R, frame_of.R.new_ones(1, 1))
        shares = (with_none(values) for values in (frame_of.energy, frame_of.importance))
        return ObliqueFrame(widened(frame_of.Q), R, widened(frame_of.Enc), *shares)
    assert isinstance(frame_of, OrthogonalFrame)
    return OrthogonalFrame(widened(frame_of.Q), with_none(frame_of.energy))


def zero_mean_basis(width: int) -> Float64[Tensor, "width width_less_1"]:
    """Orthonormal columns, each of which sums to zero: the Householder reflection that takes (1, ..., 1) to an axis."""
    v = torch.full((width, 1), width**-0.5, dtype=torch.float64)
    v[0] -= 1
    reflection = torch.eye(width, dtype=torch.float64)
    if width > 1:
        reflection -= 2 * v @ v.T / v.square().sum()
    return reflection[:, 1:].contiguous()
