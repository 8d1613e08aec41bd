"""Where a training is, as plain data and as tensors, so that a killed one goes on with the same bits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.tuning.training import Course, Training

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


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
