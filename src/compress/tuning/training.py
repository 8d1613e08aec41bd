"""The loop: a step of AdamW on every batch, a look at the held-out windows now and then, the best state kept.

Nothing of it is drawn at random but the first A of a LoRA: a step's windows follow from its number and the seed, and
dropout is off, so that a run that goes on gives the same bits as one that was never interrupted. Several processes
share a step's windows; each has the mean gradient of all of them, and so the same state.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import NumericalError
from compress.progress import Progress, Steps
from compress.tuning.losses import Objective
from compress.tuning.settings import Rate, Settings, share_of_rate
from compress.tuning.texts import batch
from compress.tuning.trained import Trained

LARGEST_GRADIENT = 1.0  # a step's gradient is made no longer than this
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
BETAS = (0.9, 0.95)  # as SliceGPT's recovery fine-tuning has them


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
    """
    best: the parameters at the best look. moments: AdamW's, by the parameter's name.
    """

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
        self.objective = Objective(trained.model, teacher, accelerator.autocast)
        self.text_objective = Objective(trained.model, None, accelerator.autocast)
        self.optimizer = new_optimizer(trained.parameters.values(), rate)
        self._since_look: list[float] = []
        without_dropout(trained.model)
        trained.model.train()

    def run(self, on_look: Callable[["Training"], None], progress: Progress) -> None:
        """To the end, or until looks stop getting better. on_look: hears of every look, the one before training too."""
        steps = Steps(progress, "training", self.num_steps, done=self.course.step)
        if not self.course.losses:
            steps.begin("held-out windows")
            self.look()
            on_look(self)
        while not self.is_over:
            steps.begin(f"held-out loss {self.course.losses[-1][2]:.3f}")
            self._since_look.append(self.step())
            steps.advance()
            if self.course.step % self.settings.eval_every == 0 or self.course.step == self.num_steps:
                steps.begin("held-out windows")
                self.look()
                on_look(self)

    @property
    def is_over(self) -> bool:
        return self.course.step >= self.num_steps or self.course.has_stalled(self.settings.patience)

    def step(self) -> float:
        """One step; the loss before it, of all processes."""
        settings, accelerator = self.settings, self.accelerator
        for group in self.optimizer.param_groups:
            share = share_of_rate(self.course.step, self.num_steps, settings.warmup)
            group["lr"] = share * group["highest"]
        ids = batch(self.windows, self.course.step, settings.batch_size, settings.seed)
        self.optimizer.zero_grad()
        loss = self.objective.backward(self._share(ids))
        average_gradients(list(self.trained.parameters.values()), accelerator)
        norm = nn.utils.clip_grad_norm_(self.trained.parameters.values(), LARGEST_GRADIENT)
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


def new_optimizer(parameters: Iterable[nn.Parameter], rate: Rate) -> torch.optim.AdamW:
    """AdamW in one call for all parameters that have the same rate."""
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[rate.of(parameter)].append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "highest": highest} for highest, params in groups.items()],
        betas=BETAS,
        weight_decay=0.0,
        fused=True,
    )


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """In one message: what is trained is small beside what is frozen."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = accelerator.reduce(torch.cat([each.flatten() for each in gradients]), "mean")
    for gradient, part in zip(gradients, mean.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


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
    tensors: dict[str, Tensor] = {}
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
