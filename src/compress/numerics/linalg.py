"""Principal components of the residual stream.

SliceGPT (arXiv 2401.15024, section 3.3): C = sum over tokens of x x^T, its eigenvectors by decreasing eigenvalue are
the rotation Q. C is a second moment, not a covariance: the stream is not centered. Ours is the mean per token (the
eigenvectors are the same), in float64; the reference adds 1% of the mean diagonal, which changes no eigenvector.

Dimensions: D the dense width, d <= D a kept width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from compress.errors import NumericalError


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
