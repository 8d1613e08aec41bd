"""The loop: a step of AdamW on every batch, a look at the held-out windows now and then, the best state kept.

Nothing of it is drawn at random but the first A of a LoRA: a step's windows follow from its number and the seed, and
dropout is off, so that a run that goes on gives the same bits as one that was never interrupted. Several processes
share a step's windows; each has the mean gradient of all of them, and so the same state.

What is descended is the next token's cross-entropy, or the divergence from the dense model's distribution over it.
Logits are the largest tensors of a step: a vocabulary of 49,152 takes 3 GB for 16 windows of 1,024 tokens, and a loss
keeps several of that size. So they are made for some tokens at a time, and the head's gradients are taken before the
next ones are made; only the hidden states after the last block are kept for all tokens.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import families
from compress.errors import NumericalError
from compress.numerics.functional import cross_entropy_and_gradient, kl_and_gradient
from compress.own_model.modeling_compress import CompressForCausalLM, finished_logits
from compress.progress import Progress, Steps
from compress.tuning.settings import Rate, Settings, batch, share_of_rate
from compress.tuning.trained import Trained

LARGEST_GRADIENT = 1.0  # a step's gradient is made no longer than this
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
BETAS = (0.9, 0.95)  # as SliceGPT's recovery fine-tuning has them
# Logits made at a time: on a CPU what its caches and its allocator's heap hold, elsewhere so many that starting the
# kernels does not count. But never for fewer tokens than a matrix product needs to be fast.
LOGITS = {"cpu": 2**22}
LOGITS_ELSEWHERE = 2**27
FEWEST = 64


@dataclass
class Course:
    """How far it has come. losses: of each look its step, the mean loss of the steps before it, the held-out loss.

    The held-out loss is the cross-entropy of the next token in nats, whatever is descended; step 0 is before training.
    """

    step: int = 0
    losses: list[tuple[int, float | None, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float]:
        """The step and the held-out loss of the best look, the first of equal ones."""
        step, _, loss = min(self.losses, key=lambda look: (look[2], look[0]))
        return step, loss

    def has_stalled(self, patience: int) -> bool:
        """Whether the last `patience` looks were none of them better than the best before, the untrained one aside.

        At its highest the rate may take a model away from where it began; while it comes back, it gets better.
        """
        losses = [loss for step, _, loss in self.losses if step > 0]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


class Training:
    """The training loop. best: the parameters at the best look. moments: AdamW's, by the parameter's name."""

    def __init__(
        self,
        trained: Trained,
        teacher: PreTrainedModel | None,
        windows: Int64[Tensor, "windows seq_len"],
        held_out: Int64[Tensor, "held_out seq_len"],
        settings: Settings,
        rate: Rate,
        accelerator: Accelerator,
    ) -> None:
        self.trained, self.windows, self.held_out = trained, windows, held_out
        self.settings, self.accelerator = settings, accelerator
        self.device = next(iter(trained.parameters.values())).device
        self.num_steps = settings.num_steps(len(windows))
        self.course = Course()
        self.best: dict[str, Tensor] = {}
        self.parameters = list(trained.parameters.values())
        self.objective = Objective(trained.model, teacher, accelerator.autocast)
        self.text_objective = Objective(trained.model, None, accelerator.autocast)
        # AdamW in one call for all parameters that have the same rate.
        groups: dict[float, list[nn.Parameter]] = defaultdict(list)
        for parameter in self.parameters:
            groups[rate.of(parameter)].append(parameter)
        alike = [{"params": params, "highest": highest} for highest, params in groups.items()]
        self.optimizer = torch.optim.AdamW(alike, betas=BETAS, weight_decay=0.0, fused=True)
        self._since_look: list[float] = []
        without_dropout(trained.model)
        trained.model.train()

    def run(self, on_look: Callable[["Training"], None], progress: Progress) -> None:
        """To the end, or until looks stop getting better. on_look: hears of every look, the one before training too."""
        steps, course = Steps(progress, "training", self.num_steps, done=self.course.step), self.course
        while True:
            due = course.step % self.settings.eval_every == 0 or course.step == self.num_steps
            if due and (not course.losses or course.losses[-1][0] < course.step):
                steps.begin("held-out windows")
                self.look()
                on_look(self)
            if course.step >= self.num_steps or course.has_stalled(self.settings.patience):
                return
            steps.begin(f"held-out loss {course.losses[-1][2]:.3f}")
            self._since_look.append(self.step())
            steps.advance()

    def step(self) -> float:
        """One step; the loss before it, of all processes."""
        settings, accelerator = self.settings, self.accelerator
        for group in self.optimizer.param_groups:
            share = share_of_rate(self.course.step, self.num_steps, settings.warmup)
            group["lr"] = share * group["highest"]
        ids = batch(self.windows, self.course.step, settings.batch_size, settings.seed)
        self.optimizer.zero_grad()
        loss = self.objective.backward(self._share(ids))
        if accelerator.num_processes > 1:
            # In one message: what is trained is small beside what is frozen.
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            means = accelerator.reduce(torch.cat([each.flatten() for each in gradients]), "mean")
            for gradient, part in zip(gradients, means.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = nn.utils.clip_grad_norm_(self.parameters, LARGEST_GRADIENT)
        self.course.step += 1
        mean = float(accelerator.reduce(loss, "mean"))
        if not math.isfinite(mean) or not math.isfinite(float(norm)):
            raise NumericalError(
                f"The loss of step {self.course.step} is {mean}, its gradient {float(norm)}. Use a smaller --lr "
                "or --dtype float32."
            )
        self.optimizer.step()
        return mean

    def look(self) -> None:
        """The held-out loss, and the state kept if it is the best one."""
        trained = sum(self._since_look) / len(self._since_look) if self._since_look else None
        self._since_look = []
        self.course.losses.append((self.course.step, trained, self.held_out_loss()))
        if self.course.best[0] == self.course.step:
            self.best = {name: each.detach().clone() for name, each in self.trained.parameters.items()}

    def held_out_loss(self) -> float:
        """The mean cross-entropy of the held-out windows, which the processes share."""
        model = self.trained.model
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        share = self._share(self.held_out)
        for ids in share.split(self.settings.batch_size) if len(share) else ():
            total += len(ids) * self.text_objective.loss(ids).double()
        model.train()
        return float(self.accelerator.reduce(total, "sum")) / len(self.held_out)

    def take_best(self) -> None:
        """The parameters as they were at the best look."""
        for name, parameter in self.trained.parameters.items():
            parameter.data.copy_(self.best[name])

    def _share(self, ids: Int64[Tensor, "windows seq_len"]) -> Int64[Tensor, "share seq_len"]:
        """This process's windows, on its device."""
        return ids[self.accelerator.process_index :: self.accelerator.num_processes].to(self.device)


def without_dropout(model: nn.Module) -> None:
    """A few steps on little text need none, and what is distilled from has none."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def snapshot(training: Training) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Where a run is: as plain data, and as tensors."""
    tensors = dict[str, Tensor]()
    for name, parameter in training.trained.parameters.items():
        moments = training.optimizer.state.get(parameter, {})
        tensors |= {f"now.{name}": parameter.detach(), f"best.{name}": training.best[name]}
        tensors |= {f"{kind}.{name}": moments[kind] for kind in MOMENTS if kind in moments}
    return {"step": training.course.step, "losses": training.course.losses}, tensors


def restore(training: Training, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put a run where a snapshot says that it was."""
    training.course = Course(data["step"], [tuple(look) for look in data["losses"]])
    for name, parameter in training.trained.parameters.items():
        on = parameter.device
        parameter.data.copy_(tensors[f"now.{name}"])
        training.best[name] = tensors[f"best.{name}"].to(on)
        if f"exp_avg.{name}" in tensors:
            moments = {kind: tensors[f"{kind}.{name}"].to(on) for kind in MOMENTS}
            steps = torch.tensor(float(training.course.step), device=on)
            training.optimizer.state[parameter] = {"step": steps, **moments}


# The loss.


class SplitModel:
    """A causal LM in two steps: to the hidden states after its last block, and from there to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.body, self.head, config = model.base_model, model.get_output_embeddings(), model.config
        if isinstance(model, CompressForCausalLM):
            self.rules, self.config = config.structure["logits"], config.text_config
        else:
            family = families.find(config)
            self.body = model.get_submodule(family.body)
            self.rules, self.config = family.logits, config
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
