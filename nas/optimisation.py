"""Stochastic gradient descent with its schedule, and the one place where weights take a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nas.errors import InputError


@dataclass(frozen=True)
class Sgd:
    """SGD with momentum, weight decay, gradient clipping and a learning-rate schedule.

    schedule: "cosine" from learning_rate to final_learning_rate, "steps" (times ``decay`` at each milestone, given as
    shares of the training), "one_cycle" (linear rise over the first ``warmup`` share, then linear fall to
    final_learning_rate) or "constant". clip: largest norm of the gradient, 0 for none.
    """

    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "steps", "one_cycle", "constant"] = "cosine"
    final_learning_rate: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    decay: float = 0.1
    warmup: float = 0.2
    clip: float = 5.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be above 0, not {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be at least 0 and below 1, not {self.momentum}")
        if not self.weight_decay >= 0 or not self.clip >= 0:
            raise InputError("weight_decay and clip must be at least 0")
        if not 0 < self.warmup < 1:
            raise InputError(f"warmup is a share of the training between 0 and 1, not {self.warmup}")
        if any(not 0 < milestone < 1 for milestone in self.milestones):
            raise InputError("milestones are shares of the training between 0 and 1, e.g. [0.5, 0.75]")

    def rate(self, progress: float) -> float:
        """The learning rate after the share ``progress`` of the training."""
        high, low = self.learning_rate, self.final_learning_rate
        if self.schedule == "cosine":
            return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "steps":
            return high * self.decay ** sum(progress >= milestone for milestone in self.milestones)
        if self.schedule == "one_cycle":
            if progress < self.warmup:
                return high * max(progress / self.warmup, 0.01)
            return low + (high - low) * (1 - progress) / (1 - self.warmup)
        return high

    def optimiser(self, parameters: list[nn.Parameter], undecayed: Sequence[nn.Parameter] = ()) -> torch.optim.SGD:
        """A torch optimiser over ``parameters``; those among them that are ``undecayed`` have no weight decay."""
        apart = {id(parameter) for parameter in undecayed}
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in apart]}]
        if free := [p for p in parameters if id(p) in apart]:
            groups.append({"params": free, "weight_decay": 0.0})
        return torch.optim.SGD(
            groups, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay, foreach=True
        )


def weight_step(
    loss: Tensor, parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer, rate: float, clip: float
) -> None:
    """Backward, clip, step."""
    gradient_step([*torch.autograd.grad(loss, parameters, allow_unused=True)], parameters, optimiser, rate, clip)


def gradient_step(
    gradients: Sequence[Tensor | None],
    parameters: Sequence[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    rate: float,
    clip: float,
) -> Tensor:
    """Clip, step: the only place where weights are trained. Returns the gradient's norm before clipping."""
    used = [gradient for gradient in gradients if gradient is not None]
    norm = nn.utils.get_total_norm(used, foreach=True)
    if clip:
        # Not in place: autograd hands out one tensor for two weights that are added, and expanded ones for sums.
        shrink = (clip / (norm + 1e-6)).clamp_max(1.0)
        shrunk = iter(torch._foreach_mul(used, shrink))
        gradients = [None if gradient is None else next(shrunk) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm


def optimiser_tree(optimiser: torch.optim.Optimizer) -> dict[str, dict[str, object]]:
    """The state of an optimiser as a tree for ``tensor_file``: parameter index -> name -> value."""
    return {str(index): dict(state) for index, state in optimiser.state_dict()["state"].items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, tree: dict[str, dict[str, object]]) -> None:
    """Put the state of ``optimiser_tree`` back."""
    state = optimiser.state_dict()
    state["state"] = {int(index): values for index, values in tree.items()}
    optimiser.load_state_dict(state)
