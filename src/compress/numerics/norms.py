"""Turn LayerNorm into RMSNorm by folding it into the linears around it.

SliceGPT (arXiv 2401.15024, section 3.2, equation 4): LayerNorm(x) = RMSNorm(x M) diag(a) + b with M = I - 11^T/D, so M
goes into whatever writes the stream, diag(a) and b into whatever reads it. Exact, in float64. The reference subtracts
the embeddings' mean for RMSNorm models as well and fixes eps at 1e-5; neither preserves the function, we do neither.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def center_rows(W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
    """M W: center a writer's output over the stream's coordinates."""
    return W - W.mean(0, keepdim=True)


def fold_gain(W: Float[Tensor, "d_out d_in"], gain: Float[Tensor, "d_in"]) -> Float[Tensor, "d_out d_in"]:
    return W * gain


def fold_offset(
    W: Float[Tensor, "d_out d_in"], bias: Float[Tensor, "d_out"] | None, offset: Float[Tensor, "d_in"]
) -> Float[Tensor, "d_out"]:
    """Fold the norm's offset into a reader's bias; W is the weight before the gain is folded."""
    folded = W @ offset
    return folded if bias is None else bias + folded


def rms_normed(x: Float[Tensor, "*tokens d"], width: int, eps: float) -> Float[Tensor, "*tokens d"]:
    """x / sqrt(sum(x^2) / width + eps); `width` is the dense one, for which deleted coordinates count as zeros."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / width + eps)
