"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nas.attacks.gradient import (
    Objective,
    ascend,
    better,
    check_loss,
    check_start,
    clean_logits_for,
    input_gradient,
)
from nas.attacks.losses import LOSSES, right
from nas.errors import InputError
from nas.model_state import crafting
from nas.objective import Attack
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class Pgd:
    """Projected gradient descent: repeated steepest-ascent steps from a random start in the ball.

    Madry et al., ICLR 2018, arXiv 1706.06083. step_size is in pixel units; 0 means 2.5 epsilon / steps, but no more
    than epsilon. keep: "last" iterate (as in training) or, per sample, the one of highest loss ("best").
    statistics: which batch-norm statistics the network uses meanwhile; neither changes its buffers.
    stop_when_broken: a sample stays at its first misclassified iterate, the start included, and costs nothing from
    there on. Meant for evaluation: a sample broken without it is broken with it; training wants the highest loss.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 10
    step_size: float = 0.0
    loss: str = "cross_entropy"
    random_start: bool = True
    keep: Literal["last", "best"] = "last"
    statistics: Literal["running", "batch"] = "running"
    stop_when_broken: bool = False

    def __post_init__(self) -> None:
        check_loss(self.loss)
        check_start(self.loss, self.random_start)
        if self.steps < 1:
            raise InputError(f"attack steps must be at least 1, not {self.steps}")
        if not self.step_size >= 0:
            raise InputError(f"attack step_size must be at least 0 (0 = automatic), not {self.step_size}")
        if self.stop_when_broken and self.statistics == "batch":
            raise InputError(
                "stop_when_broken needs statistics = 'running': with those of the batch, samples that stop "
                "would change what the others see"
            )

    @property
    def step(self) -> float:
        """The step size in force."""
        return self.step_size or min(2.5 / self.steps, 1.0) * self.threat_model.epsilon

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, start: Tensor | None = None
    ) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N].

        start: images in the ball around ``x`` to begin from, instead of a random start or ``x`` itself.
        """
        with crafting(model, batch_statistics=self.statistics == "batch"):
            clean_logits = clean_logits_for(self.loss, model, x)
            x_adv = self._start(x, generator) if start is None else start
            if self.stop_when_broken:
                return self._walk_until_broken(model, x_adv, x, y, clean_logits)
            loss = LOSSES[self.loss]
            return self._ascend(lambda images: loss(model(images), y, clean_logits), x_adv, x)

    def maximise(self, model: nn.Module, objective: Objective, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """Images found by the same steps up ``objective`` (images [N, C, H, W] -> [N], by ``model``), not the loss.

        For training methods that maximise what they minimise. ``stop_when_broken`` has no meaning here.
        """
        with crafting(model, batch_statistics=self.statistics == "batch"):
            return self._ascend(objective, self._start(x, generator), x)

    def _start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.threat_model.random_start(x, generator) if self.random_start else x

    def _ascend(self, objective: Objective, x_adv: Tensor, x: Tensor) -> Tensor:
        return ascend(objective, x_adv, x, self.threat_model, steps=self.steps, step=self.step, keep=self.keep)

    def _walk_until_broken(
        self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, clean_logits: Tensor | None
    ) -> Tensor:
        """The same steps, each sample until it is misclassified; ``rows`` are those that still are not."""
        result = x_adv.clone()
        rows = torch.arange(len(x), device=x.device)
        best, best_losses = x_adv, torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
        for step in range(self.steps + 1):
            if step < self.steps:
                gradient, losses, logits = input_gradient(model, x_adv, y, self.loss, clean_logits)
            elif self.keep == "best":
                gradient = x_adv  # no step follows
                with torch.no_grad():
                    logits = model(x_adv)
                    losses = LOSSES[self.loss](logits, y, clean_logits)
            else:
                break  # nothing depends on whether the last iterate breaks its sample
            if self.keep == "best":
                best, best_losses = better(best, best_losses, x_adv, losses)
            held = right(logits, y)
            if not bool(held.all()):
                result[rows[~held]] = x_adv[~held]
                rows, x_adv, x, y, gradient = rows[held], x_adv[held], x[held], y[held], gradient[held]
                best, best_losses = best[held], best_losses[held]
                clean_logits = None if clean_logits is None else clean_logits[held]
                if len(rows) == 0:
                    return result
            if step < self.steps:
                x_adv = self._stepped(x_adv, gradient, x)
        result[rows] = best if self.keep == "best" else x_adv
        return result

    def _stepped(self, x_adv: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        """The next iterate."""
        threat_model = self.threat_model
        return threat_model.project(x_adv + self.step * threat_model.geometry.steepest(gradient), x)

    def __str__(self) -> str:
        start = "random start" if self.random_start else "no random start"
        kept = f"{self.keep} iterate" + (", stops when broken" if self.stop_when_broken else "")
        return f"PGD-{self.steps}, {self.threat_model}, step {self.step:.6g}, {self.loss}, {start}, {kept}"


def maximiser(attack: Attack, what: str) -> Pgd:
    """``attack`` as one that can maximise ``what``, the objective of a training method; ``InputError`` if it cannot."""
    if not isinstance(attack, Pgd) or attack.stop_when_broken:
        raise InputError(
            f"{what} is maximised by projected gradient descent to the end: give an attack with name 'pgd' "
            "and without stop_when_broken"
        )
    return attack


PLUGIN = Pgd
