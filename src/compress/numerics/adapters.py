"""Low-rank adapters B A for the error of a compressed weight, E = W - S.

    naive     the nearest in weights: the SVD of E
    slim      SLiM-LoRA (arXiv 2410.09615, section 3.2): the SVD of E diag(x), x the mean |x| of each input and a shift
    whitened  the nearest in outputs: E ||(E - B A) x||^2, by `numerics/lowrank.py`; a bias keeps what the mean lacks

SLiM shifts by the least |x|, which does not help where an input is dead; ours is the least of those that move. Its code
takes the inputs' norm for the mean, and falls back to `naive` without a word where one is zero.
"""

from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.linalg import pca
from compress.numerics.lowrank import Factors, InputMoments, weighted

AdapterMethod = Literal["naive", "slim", "whitened"]


def fit_adapter(
    method: AdapterMethod,
    E: Float64[Tensor, "m n"],
    moments: InputMoments,
    rank: int,
    *,
    centered: bool,
    name: str,
) -> Factors:
    """centered: for `whitened`, errors about the mean count, and the factors' bias is what keeps the mean."""
    if method == "naive":
        return cut_off(E, rank, name=name)
    if method == "slim":
        x = saliency(moments.mean_abs, name=name)
        scaled = cut_off(E * x, rank, name=name)
        return Factors(scaled.B, scaled.A / x, None)
    return weighted(E, None, moments, rank, None, name=name, centered=centered)


def cut_off(E: Float64[Tensor, "m n"], rank: int, *, name: str) -> Factors:
    """The truncated SVD, by eigenvectors of the smaller of E E^T and E^T E: many times as fast as a whole one."""
    m, n = E.shape
    if m <= n:
        U = pca(E @ E.T, name=f"what {name} lacks")[0][:, :rank]
        return Factors(U, U.T @ E, None)
    V = pca(E.T @ E, name=f"what {name} lacks")[0][:, :rank]
    return Factors(E @ V, V.T, None)


def saliency(mean_abs: Float64[Tensor, "n"], *, name: str) -> Float64[Tensor, "n"]:
    """Scales of the input columns; 1 for dead inputs, those that only rounding errors move included."""
    if not torch.isfinite(mean_abs).all():
        raise NumericalError(f"The inputs of {name} have a NaN or Inf. Check the weights before it and the text.")
    moving = mean_abs[mean_abs > 1e-7 * mean_abs.max()]
    return mean_abs + moving.min() if len(moving) else torch.ones_like(mean_abs)
