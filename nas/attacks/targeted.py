"""Attacks that aim at a class: what they are, PGD as one of them, and how often they hit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel


class Targeted(Protocol):
    """``attack.towards(model, x, target, generator=g) -> x_adv``: images to be classified as ``target`` [N]."""

    def towards(self, model: nn.Module, x: Tensor, target: Tensor, *, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class TargetedPgd:
    """Targeted PGD: from a random start, repeated steps that lower the cross-entropy of the target class.

    Madry et al., arXiv 1706.06083, with the sign of the targeted attack of Kurakin et al., arXiv 1607.02533. Every
    sample takes all steps; the last iterate is the result. step_size: pixel units; 0 means 2.5 epsilon / steps, at
    most epsilon.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 40
    step_size: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"attack steps must be at least 1, not {self.steps}")
        if not self.step_size >= 0:
            raise InputError(f"attack step_size must be at least 0 (0 = automatic), not {self.step_size}")

    @property
    def step(self) -> float:
        """The step size in force."""
        return self.step_size or min(2.5 / self.steps, 1.0) * self.threat_model.epsilon

    def towards(self, model: nn.Module, x: Tensor, target: Tensor, *, generator: torch.Generator) -> Tensor:
        """Images [N, C, H, W] in the ball around ``x`` that should be classified as ``target`` [N]."""
        threat_model = self.threat_model
        with crafting(model), torch.enable_grad():
            x_adv = threat_model.random_start(x, generator)
            for _ in range(self.steps):
                point = x_adv.detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), target, reduction="sum"), point)
                step = self.step * threat_model.geometry.steepest(gradient)
                x_adv = threat_model.project(x_adv.detach() - step, x)
        return x_adv

    def __str__(self) -> str:
        return f"targeted PGD-{self.steps}, {self.threat_model}, step {self.step:.6g}, cross_entropy, random start"


def success_matrix(
    attack: Targeted,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    classes: int,
    *,
    generator: torch.Generator,
    batch_size: int = 256,
) -> Tensor:
    """Share of the images of class ``row`` that end up classified as ``column``, float64 [classes, classes].

    Each image is sent to every class but its own: the diagonal is NaN, as is the row of a class without images. Give
    only images that the model classifies correctly, or the attack is credited with the model's own mistakes.
    """
    hits = torch.zeros(classes, classes, dtype=torch.float64, device=x.device)
    for shift in range(1, classes):
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            target = (labels + shift) % classes
            x_adv = attack.towards(model, images, target, generator=generator)
            with crafting(model), torch.no_grad():
                hit = model(x_adv).argmax(1) == target
            hits.index_put_((labels, target), hit.double(), accumulate=True)
    rates = hits / y.bincount(minlength=classes).unsqueeze(1)
    return rates.fill_diagonal_(torch.nan)
