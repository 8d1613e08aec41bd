"""A low-rank adapter B A for what a compressed weight lacks, E = W - S.

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
from compress.numerics.lowrank import Factors, InputMoments, svd, weighted

AdapterMethod = Literal["naive", "slim", "whitened"]


def fit_adapter(
    method: AdapterMethod,
    E: Float64[Tensor, "m n"],
    moments: InputMoments,
    rank: int,
    *,
    centred: bool,
    name: str,
) -> Factors:
    """centred: for `whitened`, errors about the mean count, and the factors' bias is what keeps the mean."""
    if method == "naive":
        return svd(E, rank)
    if method == "slim":
        x = saliency(moments.mean_abs, name=name)
        scaled = svd(E * x, rank)
        return Factors(scaled.B, scaled.A / x, None)
    return weighted(E, None, moments, rank, None, name=name, centred=centred)


def saliency(mean_abs: Float64[Tensor, "n"], *, name: str) -> Float64[Tensor, "n"]:
    moving = mean_abs[mean_abs > 0]
    if not len(moving) or not torch.isfinite(mean_abs).all():
        raise NumericalError(f"The inputs of {name} are all zero, or one is NaN or Inf. Calibrate on other text.")
    return mean_abs + moving.min()
