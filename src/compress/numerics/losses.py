"""What next-token distributions are compared by, in nats: cross-entropy, and the Kullback-Leibler divergence.

    cross-entropy   -ln q(target)
    KL(p || q)      sum over the vocabulary of p (ln p - ln q)

p = softmax(dense), q = softmax(logits), in their own dtype. Gradients are of sums over predictions, by the logits.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


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
