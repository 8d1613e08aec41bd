"""The functions at a decoder's ends: norms, and what next-token distributions are compared by, in nats.

SliceGPT (arXiv 2401.15024, section 3.2, equation 4): LayerNorm(x) = RMSNorm(x M) diag(a) + b with M = I - 11^T/D, so M
goes into whatever writes the stream, diag(a) and b into whatever reads it. Exact, in float64. The reference subtracts
the embeddings' mean for RMSNorm models as well and fixes eps at 1e-5; neither preserves the function, we do neither.

    cross-entropy   -ln q(target)
    KL(p || q)      sum over the vocabulary of p (ln p - ln q)

p = softmax(dense), q = softmax(logits), in their own dtype. Gradients are of sums over predictions, by the logits.
"""

import torch
from jaxtyping import Float, Int64
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


def kl_divergence(
    dense: Float[Tensor, "*tokens vocabulary"], logits: Float[Tensor, "*tokens vocabulary"]
) -> Float[Tensor, "*tokens"]:
    """KL(dense || model) of each token."""
    log_p, log_q = dense.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def kl_and_gradient(
    dense: Float[Tensor, "predictions vocabulary"], logits: Float[Tensor, "predictions vocabulary"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "predictions vocabulary"]]:
    """The divergence, summed, and its gradient softmax(logits) - softmax(dense); in three tensors of their size."""
    log_q, log_p = logits.log_softmax(-1), dense.log_softmax(-1)
    p = log_p.exp()
    log_p -= log_q
    gradient = log_q.exp_().sub_(p)
    return p.mul_(log_p).sum(), gradient


@torch.no_grad()
def cross_entropy_and_gradient(
    targets: Int64[Tensor, "predictions"], logits: Float[Tensor, "predictions vocabulary"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "predictions vocabulary"]]:
    """The cross-entropy, summed, and its gradient softmax(logits) less 1 at the target."""
    log_q = logits.log_softmax(-1)
    places = targets[:, None]
    loss = -log_q.gather(1, places).sum()
    return loss, log_q.exp_().scatter_add_(1, places, log_q.new_full(places.shape, -1))
