"""What is descended: the next token's cross-entropy, or the divergence from the dense model's distribution over it."""

from jaxtyping import Float, Int64
from torch import Tensor, nn


def cross_entropy(
    logits: Float[Tensor, "batch tokens vocabulary"], ids: Int64[Tensor, "batch tokens"]
) -> Float[Tensor, ""]:
    """Of the next token, in nats, the mean over all tokens that have one; taken in float32 at least."""
    wide = logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(wide.float() if wide.dtype.itemsize < 4 else wide, ids[:, 1:].flatten())


def divergence(
    logits: Float[Tensor, "batch tokens vocabulary"], dense: Float[Tensor, "batch tokens vocabulary"]
) -> Float[Tensor, ""]:
    """KL(dense || model) over the next token, in nats, the mean over the same tokens as the cross-entropy's.

    The last token's distribution, which no text checks, is left out (distillation at temperature 1; Hinton et al.,
    arXiv 1503.02531).
    """
    p, q = (log_probabilities(each[:, :-1].flatten(0, 1)) for each in (dense, logits))
    return nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")


def log_probabilities(logits: Float[Tensor, "tokens vocabulary"]) -> Float[Tensor, "tokens vocabulary"]:
    return (logits.float() if logits.dtype.itemsize < 4 else logits).log_softmax(-1)
