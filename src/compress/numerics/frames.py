"""Nested subspaces of the residual stream and bases for them.

A frame gives for every width d a decode (d, D), orthonormal rows that span the subspace, and an encode (D, d) with
encode^T decode^T = I: x is kept as x encode and stands for x encode decode. An orthogonal frame has encode = decode^T,
the nearest point of the subspace (SliceGPT). An oblique one projects along directions that the loss does not feel.

A `Lift` goes the other way, isometrically into a wider space.

Principal components after SliceGPT (arXiv 2401.15024, section 3.3): C = sum over tokens of x x^T, its eigenvectors by
decreasing eigenvalue are the rotation Q. C is a second moment, not a covariance: the stream is not centered. Ours is
the mean per token (the eigenvectors are the same), in float64; the reference adds 1% of the mean diagonal, which
changes no eigenvector.

Dimensions: D the dense width, d <= D a kept width.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.ridge import cholesky


def pca(C: Float[Tensor, "D D"], *, name: str) -> tuple[Float[Tensor, "D D"], Float[Tensor, "D"]]:
    """Q with orthonormal columns and the eigenvalues, both by decreasing eigenvalue.

    Each column's largest entry is positive, so that the signs do not depend on the LAPACK at hand.
    `name` says in an error where C came from.
    """
    if not torch.isfinite(C).all():
        raise NumericalError(f"The second moment of {name} has a NaN or Inf. Check the weights before it and the text.")
    eigenvalues, Q = torch.linalg.eigh(C)
    eigenvalues, Q = eigenvalues.flip(0).clamp_min(0), Q.flip(1)
    largest = Q.gather(0, Q.abs().argmax(0, keepdim=True))
    return (Q * largest.sign()).contiguous(), eigenvalues


def random_orthogonal(width: int, generator: torch.Generator) -> Float[Tensor, "width width"]:
    """A rotation drawn from the Haar measure: the Q of a Gaussian matrix's QR, its signs fixed by R's diagonal."""
    gaussian = torch.randn(width, width, dtype=torch.float64, generator=generator)
    Q, R = torch.linalg.qr(gaussian)
    return Q * R.diagonal().sign()


SPECTRUM = 128  # values, at most


def spectrum(energy: Float[Tensor, "D"]) -> list[float]:
    """Share of the energy per direction, averaged over at most 128 ranges of directions."""
    total = float(energy.sum()) or 1.0
    stretches = energy.tensor_split(min(SPECTRUM, len(energy)))
    return [float(f"{float(stretch.mean()) / total:.4g}") for stretch in stretches]


def kept_energy(eigenvalues: Float[Tensor, "D"], width: int) -> float:
    """The share of the signal's energy, sum of squares, in its first `width` principal components."""
    total = eigenvalues.sum()
    return float(eigenvalues[:width].sum() / total) if total > 0 else 1.0


def width_for_energy(eigenvalues: Float[Tensor, "D"], share: float) -> int:
    """The least width whose principal components hold `share` of the energy."""
    energy = eigenvalues.cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1


@dataclass(frozen=True)
class Frame:
    """Q: the directions, orthonormal, in order. energy: the stream's mean square along each of them.

    Of an oblique frame also R and Enc: Q R = Dec, the directions that are kept, and Enc^T Dec = I; and importance: what
    each direction of Dec holds of what the frame ranks by, in decreasing order.
    """

    Q: Float64[Tensor, "D D"]
    energy: Float64[Tensor, "D"]
    R: Float64[Tensor, "D D"] | None = None
    Enc: Float64[Tensor, "D D"] | None = None
    importance: Float64[Tensor, "D"] | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        every = (self.Q, self.R, self.Enc, self.energy, self.importance)
        return tuple(tensor for tensor in every if tensor is not None)

    def encode(self, width: int) -> Float64[Tensor, "D d"]:
        if self.R is None or self.Enc is None:
            return self.Q[:, :width].contiguous()
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
        return Frame(*pca(C, name=name))
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    L = cholesky(C / C.diagonal().mean() + FLOOR * identity, name=name)
    felt = (1 - gradient_weight) * identity + gradient_weight * G / G.diagonal().mean()
    V, importance = pca(L.T @ felt @ L, name=f"the loss's gradient at {name}")
    Q, R = torch.linalg.qr(L @ V)
    energy = (Q * (C @ Q)).sum(0)
    return Frame(Q, energy, R, torch.linalg.solve_triangular(L.T, V, upper=True), importance)


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

    found = Frame(widened(frame_of.Q), with_none(frame_of.energy))
    if frame_of.R is None or frame_of.Enc is None or frame_of.importance is None:
        return found
    R = torch.block_diag(frame_of.R, frame_of.R.new_ones(1, 1))
    return replace(found, R=R, Enc=widened(frame_of.Enc), importance=with_none(frame_of.importance))


def zero_mean_basis(width: int) -> Float64[Tensor, "width width_less_1"]:
    """Orthonormal columns, each of which sums to zero: the Householder reflection that takes (1, ..., 1) to an axis."""
    v = torch.full((width, 1), width**-0.5, dtype=torch.float64)
    v[0] -= 1
    reflection = torch.eye(width, dtype=torch.float64)
    if width > 1:
        reflection -= 2 * v @ v.T / v.square().sum()
    return reflection[:, 1:].contiguous()


@dataclass(frozen=True, eq=False)
class Lift:
    """A map between a narrower and a wider basis. columns: (wide, narrow); None for the identity."""

    columns: Tensor | None = None
    scale: float = 1.0

    @property
    def is_identity(self) -> bool:
        return self.columns is None and self.scale == 1.0

    def rows(self, M: Float[Tensor, "narrow *rest"]) -> Float[Tensor, "wide *rest"]:
        """Map each column of M, or the vector M."""
        return (M if self.columns is None else self.columns.to(M) @ M) * self.scale

    def functional(self, M: Float[Tensor, "rest narrow"]) -> Float[Tensor, "rest wide"]:
        """The matrix that maps v' to M v."""
        return (M if self.columns is None else M @ self.columns.T.to(M)) / self.scale

    def up(self, x: Float[Tensor, "*batch narrow"]) -> Float[Tensor, "*batch wide"]:
        return (x if self.columns is None else x @ self.columns.T.to(x)) * self.scale

    def down(self, x: Float[Tensor, "*batch wide"]) -> Float[Tensor, "*batch narrow"]:
        return (x if self.columns is None else x @ self.columns.to(x)) / self.scale
