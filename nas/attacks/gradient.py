"""The gradient of an attack loss with respect to the input, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nas.attacks.losses import LOSSES, NEEDS_CLEAN_LOGITS
from nas.errors import InputError, nearest
from nas.threat_model import ThreatModel


def check_loss(name: str) -> None:
    """Raise ``InputError`` for an unknown attack loss."""
    if name not in LOSSES:
        raise InputError(f"unknown attack loss '{name}': {nearest(name, LOSSES)}")


def check_start(loss: str, random_start: bool) -> None:
    """Raise ``InputError`` for a loss that has its minimum at the clean images where the attack starts there."""
    if loss in NEEDS_CLEAN_LOGITS and not random_start:
        raise InputError(
            f"attack loss '{loss}' compares with the clean images and has no gradient there: give an attack with a "
            "random start"
        )


def clean_logits_for(loss: str, model: nn.Module, x: Tensor) -> Tensor | None:
    """Logits of the clean images where ``loss`` compares with them: the model's own, or see ``compared_with``."""
    if loss not in NEEDS_CLEAN_LOGITS:
        return None
    with torch.no_grad():
        logits: Tensor = vars(model).get(_REFERENCE, model)(x)
        return logits


@contextmanager
def compared_with(model: nn.Module, reference: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, attacks on ``model`` whose loss compares with the clean images compare with ``reference(x)`` there.

    reference: images [N, C, H, W] -> logits [N, K], such as another network.
    """
    # A function: copies of the network that are made meanwhile share it, and it is no module of the network.
    object.__setattr__(model, _REFERENCE, lambda x: reference(x))
    try:
        yield
    finally:
        object.__delattr__(model, _REFERENCE)


_REFERENCE = "_answers_on_clean_images"


def input_gradient(
    model: nn.Module, x: Tensor, y: Tensor, loss: str, clean_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient [N, C, H, W] of the summed loss at ``x``, the losses [N] and the logits [N, K].

    Summed, not averaged: the gradient of a sample does not depend on the rest of the batch. Call it inside
    ``model_state.crafting``.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        logits = model(point)
        losses = LOSSES[loss](logits, y, clean_logits)
        (gradient,) = torch.autograd.grad(losses.sum(), point)
    return gradient, losses.detach(), logits.detach()


def input_jacobian(model: nn.Module, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients [N, M, C, H, W] of M logits of each sample with respect to ``x``, and all logits [N, K].

    classes: [N, M], which logits of which sample; None for all K. Takes one forward and M backward passes. Call it
    inside ``model_state.crafting``.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        logits = model(point)
        if classes is None:
            classes = torch.arange(logits.shape[1], device=x.device).expand(len(x), -1)
        columns = logits.gather(1, classes).sum(0)
        last = len(columns) - 1
        rows = [torch.autograd.grad(column, point, retain_graph=i < last)[0] for i, column in enumerate(columns)]
    return torch.stack(rows, 1), logits.detach()


Objective = Callable[[Tensor], Tensor]
"""Images [N, C, H, W] -> what an attack maximises [N], differentiable."""


@runtime_checkable
class Maximiser(Protocol):
    """An attack that can climb an objective instead of its loss, for methods that maximise what they minimise.

    ``maximise(model, objective, x, generator=g) -> x_adv``, under the conditions of ``nas.objective.Attack``; the
    objective is called inside ``model_state.crafting``.
    """

    def maximise(self, model: nn.Module, objective: Objective, x: Tensor, *, generator: torch.Generator) -> Tensor: ...


def maximiser(attack: object, what: str) -> Maximiser:
    """``attack``, where it can maximise ``what``; ``InputError`` otherwise."""
    if not isinstance(attack, Maximiser):
        raise InputError(f"attack '{type(attack).__name__}' cannot maximise {what}: give one of name 'pgd' or 'fgsm'")
    return attack


def objective_gradient(objective: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [N, C, H, W] of the summed ``objective`` at ``x``, and its values [N]."""
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        values = objective(point)
        (gradient,) = torch.autograd.grad(values.sum(), point)
    return gradient, values.detach()


def ascend(
    objective: Objective,
    start: Tensor,
    x: Tensor,
    threat_model: ThreatModel,
    *,
    steps: int,
    step: float,
    keep: Literal["last", "best"] = "last",
    free: Tensor | None = None,
) -> Tensor:
    """Projected steepest ascent from ``start`` in the ball around ``x``: the loop of projected gradient descent.

    keep: the last iterate or, per sample, the one of highest ``objective``. free: mask, broadcast to the images, of the
    pixels that may change; None for all.
    """
    x_adv, geometry = start, threat_model.geometry
    best, best_values = x_adv, torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
    for _ in range(steps):
        gradient, values = objective_gradient(objective, x_adv)
        if keep == "best":
            best, best_values = better(best, best_values, x_adv, values)
        if free is not None:
            gradient = gradient * free
        x_adv = threat_model.project(x_adv + step * geometry.steepest(gradient), x)
    if keep == "best":
        with torch.no_grad():
            values = objective(x_adv)
        x_adv, _ = better(best, best_values, x_adv, values)
    return x_adv


def better(best: Tensor, best_values: Tensor, x_adv: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Per sample the images of the higher value, and that value; ``best`` in case of a tie."""
    higher = values > best_values
    return torch.where(per_image(higher, x_adv), x_adv, best), torch.where(higher, values, best_values)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """``values`` [N] in a shape that broadcasts over images ``like`` [N, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))
