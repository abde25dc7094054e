"""Adversarial weight perturbation around any training method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nas.errors import InputError
from nas.objective import Batch, Gradients, Metrics, Objective, State, kept_by


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
        attacks: list[_Remembering] = []
        objective = _remembering(self.objective, attacks) if is_dataclass(self.objective) else self.objective
        # Both passes see the same images, the same draws and the same statistics.
        draws = replace(state, method_generator=state.method_generator.clone_state())
        with _restored([*model.buffers()]):
            _, upwards, _ = self._gradients(objective, model, batch, draws, parameters)
        for attack in attacks:
            attack.repeat()
        with _restored(parameters), torch.no_grad():
            for parameter, gradient in zip(parameters, upwards, strict=True):
                if parameter.dim() > 1 and gradient is not None:
                    parameter.add_(perturbation(parameter, gradient, self.gamma))
            with torch.enable_grad():
                return self._gradients(objective, model, batch, state, parameters)

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


@contextmanager
def _restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Afterwards they have the values, to the bit, that they had before."""
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)


class _Remembering:
    """An attack that is carried out once: after ``repeat`` it gives the images it found again, in the same order."""

    def __init__(self, attack: Any) -> None:
        self.attack = attack
        self.found: list[Tensor] = []
        self.again: Iterator[Tensor] | None = None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **more: Any) -> Tensor:
        return self._images(lambda: self.attack(model, x, y, **more))

    def maximise(self, model: nn.Module, objective: Any, x: Tensor, **more: Any) -> Tensor:
        return self._images(lambda: self.attack.maximise(model, objective, x, **more))

    def repeat(self) -> None:
        self.again = iter(self.found)

    def _images(self, craft: Callable[[], Tensor]) -> Tensor:
        if self.again is not None:
            return next(self.again)
        self.found.append(craft())
        return self.found[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attack, name)


def _remembering(objective: Any, attacks: list[_Remembering]) -> Any:
    """``objective`` with attacks that remember, which are added to ``attacks``.

    An attack is what is called ``attack``, a field or a method, in the objective and in what it consists of.
    """
    changes: dict[str, Any] = {}
    for field in fields(objective):
        part = getattr(objective, field.name)
        if field.name != "attack" and is_dataclass(part) and not isinstance(part, type):
            changed = _remembering(part, attacks)
            changes |= {field.name: changed} if changed is not part else {}
    if hasattr(objective, "attack"):
        attacks.append(_Remembering(objective.attack))
        changes["attack"] = attacks[-1]
    if not changes:
        return objective
    # Not ``replace``: what was checked is not checked again.
    changed = copy.copy(objective)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    return changed
