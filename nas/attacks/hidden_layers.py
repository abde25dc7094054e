"""Projected gradient descent that also drives hidden layers away from what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nas.attacks.gradient import Objective, ascend, check_loss, check_start, clean_logits_for
from nas.attacks.hidden_features import features_of, hidden_layers, recorded, relative_change
from nas.attacks.losses import LOSSES
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class HiddenLayers:
    """Hidden-layer attack, imperceptible kind: PGD on the loss plus the change of hidden layers.

    Reconstruction after Shen et al., arXiv 2011.14045, of which the abstract alone was read: maximises
    loss + weight * sum_l |F_l(x') - F_l(x)|_2 / |F_l(x)|_2 in the ball; the distance, its scaling and the weight are
    inferred. With weight 0, or in a network without hidden layers, it is projected gradient descent.

    layers: module names; none means the last block of every stage (``hidden_features.hidden_layers``). step_size is in
    pixel units; 0 means 2.5 epsilon / steps, but no more than epsilon. keep: the last iterate or the one of the
    highest objective.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 20
    step_size: float = 0.0
    loss: str = "cross_entropy"
    weight: float = 1.0
    layers: tuple[str, ...] = ()
    random_start: bool = True
    keep: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        check_loss(self.loss)
        check_start(self.loss, self.random_start)
        check_hidden(self.steps, self.step_size, self.weight)

    @property
    def step(self) -> float:
        """The step size in force."""
        return self.step_size or min(2.5 / self.steps, 1.0) * self.threat_model.epsilon

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]."""
        start = self.threat_model.random_start(x, generator) if self.random_start else x

        def climb(objective: Objective) -> Tensor:
            steps, step = self.steps, self.step
            return ascend(objective, start, x, self.threat_model, steps=steps, step=step, keep=self.keep)

        return with_hidden_objective(model, x, y, self.loss, self.weight, self.layers, climb)

    def __str__(self) -> str:
        start = "random start" if self.random_start else "no random start"
        return (
            f"hidden-layer PGD-{self.steps}, {self.threat_model}, step {self.step:.6g}, "
            f"{described(self.loss, self.weight, self.layers)}, {start}, {self.keep} iterate"
        )


def check_hidden(steps: int, step_size: float, weight: float) -> None:
    """Raise ``InputError`` for settings that no attack on hidden layers can have."""
    if steps < 1:
        raise InputError(f"attack steps must be at least 1, not {steps}")
    if not step_size >= 0:
        raise InputError(f"attack step_size must be at least 0 (0 = automatic), not {step_size}")
    if not 0 <= weight < float("inf"):
        raise InputError(f"the weight of the hidden layers must be a number of at least 0, not {weight}")


def described(loss: str, weight: float, layers: tuple[str, ...]) -> str:
    """The objective in words."""
    return f"{loss} + {weight:.6g} x change of {', '.join(layers) or 'the last block of every stage'}"


def with_hidden_objective(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: str,
    weight: float,
    layers: tuple[str, ...],
    climb: Callable[[Objective], Tensor],
) -> Tensor:
    """What ``climb`` makes of the objective loss + weight * relative change of ``layers``, within ``crafting``."""
    with crafting(model):
        layers = (layers or hidden_layers(model, x)) if weight else ()
        clean_logits = clean_logits_for(loss, model, x)
        with recorded(model, layers) as features:
            clean = features_of(model, x, features) if layers else {}

            def objective(images: Tensor) -> Tensor:
                losses = LOSSES[loss](model(images), y, clean_logits)
                return losses + weight * relative_change(features, clean) if clean else losses

            return climb(objective)


PLUGIN = HiddenLayers
