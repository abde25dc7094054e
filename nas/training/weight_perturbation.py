"""Adversarial weight perturbation around any training method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nas.errors import InputError
from nas.model_state import frozen_statistics
from nas.objective import Attack, Batch, Gradients, Metrics, Objective, State, kept_by


@dataclass(frozen=True)
class WeightPerturbation:
    """Adversarial weight perturbation (AWP): the gradient of ``objective`` at the worst weights nearby.

    Wu, Xia & Wang, NeurIPS 2020, arXiv 2004.05884, eq. 7-10. On the adversarial images of the weights w as they are,
    every weight tensor of at least two dimensions climbs the loss by v = gamma |w| g / |g|, tensor by tensor; the step
    is taken from w along the gradient at w + v. gamma: 0.005 to 0.01. begins: share of the training before which
    nothing is perturbed. Costs one more pass forward and backward a step. The direction does not depend on the size of
    the authors' proxy step, which is normalised away.
    """

    objective: Objective
    gamma: float = 0.005
    begins: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < float("inf"):
            raise InputError(f"gamma of the weight perturbation must be a number of at least 0, not {self.gamma}")
        if not 0 <= self.begins <= 1:
            raise InputError(f"begins is a share of the training in [0, 1], not {self.begins}")
        own = kept_by(self.objective, Gradients)
        if own is not None:
            raise InputError(
                f"weights are perturbed along the gradient of one loss, but {type(own).__name__} has gradients of its "
                "own: leave out one of them"
            )

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The loss where the weights are."""
        return self.objective(model, batch, state)

    def gradients(
        self, model: nn.Module, batch: Batch, state: State, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor | None], Metrics]:
        """Gradients at the perturbed weights; loss and metrics are those there."""
        if not self.gamma or state.progress < self.begins:
            return self._gradients(self.objective, model, batch, state, parameters)
        found: list[Tensor] = []
        # Both passes see the same images and the same draws.
        draws = replace(state, method_generator=state.method_generator.clone_state())
        with frozen_statistics(model):
            _, upwards, _ = self._gradients(_with(self.objective, found, True), model, batch, draws, parameters)
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            with torch.no_grad():
                for parameter, gradient in zip(parameters, upwards, strict=True):
                    if parameter.dim() > 1 and gradient is not None:
                        parameter.add_(perturbation(parameter, gradient, self.gamma))
            again = _with(self.objective, found, False)
            return self._gradients(again, model, batch, state, parameters)
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)

    @staticmethod
    def _gradients(
        objective: Objective, model: nn.Module, batch: Batch, state: State, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor | None], Metrics]:
        loss, metrics = objective(model, batch, state)
        return loss.detach(), [*torch.autograd.grad(loss, [*parameters], allow_unused=True)], metrics


def perturbation(weight: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    """``gamma`` |weight| along ``gradient``; 0 where that vanishes."""
    size = gradient.norm()
    return torch.where(size > 0, gamma * weight.norm() * gradient / size.clamp_min(1e-30), 0.0)


class _Kept:
    """An attack that is carried out once: its images are kept, and given again in the same order."""

    def __init__(self, attack: Attack, found: list[Tensor], crafts: bool) -> None:
        self.attack, self.found, self.crafts = attack, found, crafts
        self.given = 0

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, **start: Any) -> Tensor:
        if self.crafts:
            self.found.append(self.attack(model, x, y, generator=generator, **start))
        self.given += 1
        return self.found[self.given - 1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attack, name)


def _with(objective: Any, found: list[Tensor], crafts: bool) -> Any:
    """``objective`` with attacks (field ``attack``, also of what it wraps) that craft, or give again what was found."""
    names = {field.name for field in fields(objective)} if is_dataclass(objective) else set()
    changes: dict[str, Any] = {}
    if "attack" in names:
        changes["attack"] = _Kept(objective.attack, found, crafts)
    if "objective" in names:
        changes["objective"] = _with(objective.objective, found, crafts)
    return replace(objective, **changes) if changes else objective
