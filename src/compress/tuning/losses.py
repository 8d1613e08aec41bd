"""What is descended: the next token's cross-entropy, or the divergence from the dense model's distribution over it.

Logits are the largest tensors of a step: a vocabulary of 49,152 takes 3 GB for 16 windows of 1,024 tokens, and a loss
keeps several of that size. So they are made for some tokens at a time, and the head's gradients are taken before the
next ones are made; only the hidden states behind the last block are kept for all tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from compress import families
from compress.numerics.losses import cross_entropy_and_gradient, kl_and_gradient
from compress.own_model.modeling_compress import CompressForCausalLM, finished_logits

# Logits made at a time: on a CPU what its caches and its allocator's heap hold, elsewhere so many that starting the
# kernels does not count. But never for fewer tokens than a matrix product needs to be fast.
LOGITS = {"cpu": 2**22}
LOGITS_ELSEWHERE = 2**27
FEWEST = 64


class SplitModel:
    """A causal LM in two steps: to the hidden states behind its last block, and from there to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.body, self.head, config = model.base_model, model.get_output_embeddings(), model.config
        if isinstance(model, CompressForCausalLM):
            self.rules, self.config = config.structure["logits"], config.text_config
        else:
            self.rules, self.config = families.find(config).logits, config
        self.vocabulary: int = config.vocab_size

    def hidden(self, ids: Int64[Tensor, "batch tokens"]) -> Float[Tensor, "predictions d"]:
        """Of all tokens but each window's last, whose prediction no text checks."""
        states: Tensor = self.body(input_ids=ids, use_cache=False).last_hidden_state
        return states[:, :-1].flatten(0, 1)

    def logits(self, hidden: Float[Tensor, "predictions d"]) -> Float[Tensor, "predictions vocabulary"]:
        """In float32 at least."""
        logits: Tensor = finished_logits(self.head(hidden), self.rules, self.config)
        return logits.float() if logits.dtype.itemsize < 4 else logits


class Objective:
    """The mean over a batch's predictions of what is descended, in nats.

    Without a teacher the cross-entropy of the next token. With one KL(teacher || student) of its distribution
    (distillation at temperature 1; Hinton et al., arXiv 1503.02531). autocast: for products in 16 bits.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.student = SplitModel(student)
        self.teacher = None if teacher is None else SplitModel(teacher)
        self.autocast = autocast

    @torch.no_grad()
    def loss(self, ids: Int64[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
        with self.autocast():
            hidden = self.student.hidden(ids)
            parts = [self._compared(self.student.logits(own), other) for own, other in self._parts(hidden, ids)]
        return torch.stack([loss for loss, _ in parts]).sum() / len(hidden)

    def backward(self, ids: Int64[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
        """The loss; its gradients are added to those that the parameters have."""
        with self.autocast():
            hidden = self.student.hidden(ids)
        losses, gradients = list[Tensor](), list[Tensor]()
        for own, other in self._parts(hidden.detach(), ids):
            own.requires_grad_()
            with self.autocast():
                logits = self.student.logits(own)
            loss, gradient = self._compared(logits, other)
            logits.backward(gradient.div_(len(hidden)))
            losses.append(loss)
            assert own.grad is not None
            gradients.append(own.grad)
        if hidden.requires_grad:  # not where the head alone is trained
            hidden.backward(torch.cat(gradients))
        return torch.stack(losses).sum() / len(hidden)

    def _parts(self, hidden: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states of some predictions at a time, and the next tokens or the teacher's hidden states."""
        rows = max(FEWEST, LOGITS.get(ids.device.type, LOGITS_ELSEWHERE) // self.student.vocabulary)
        if self.teacher is None:
            toward = ids[:, 1:].flatten()
        else:
            with torch.no_grad(), self.autocast():
                toward = self.teacher.hidden(ids)
        return zip(hidden.split(rows), toward.split(rows), strict=True)

    @torch.no_grad()
    def _compared(self, logits: Tensor, toward: Tensor) -> tuple[Tensor, Tensor]:
        if self.teacher is None:
            return cross_entropy_and_gradient(toward, logits)
        with self.autocast():
            wanted = self.teacher.logits(toward)
        return kl_and_gradient(wanted, logits)
