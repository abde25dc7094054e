"""Universal perturbations: one for all images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.gradient import check_loss, check_start, objective_gradient
from nas.attacks.losses import LOSSES
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True, eq=False)
class Perturbation:
    """A perturbation [1, C, H, W] added to every image, brought back into the threat model of each."""

    threat_model: ThreatModel
    delta: Tensor

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """The perturbed images [N, C, H, W]; asks the model nothing."""
        del model, y, generator
        if x.shape[1:] != self.delta.shape[1:]:
            raise InputError(
                f"the perturbation is for images of shape {tuple(self.delta.shape[1:])}, not {tuple(x.shape[1:])}"
            )
        return self.threat_model.project(x + self.delta.to(x), x)

    def __str__(self) -> str:
        return f"universal perturbation, {self.threat_model}"


@dataclass(frozen=True)
class Universal:
    """Universal perturbation: one change of at most epsilon that misleads as many images as possible.

    The aim of Moosavi-Dezfooli et al., CVPR 2017, arXiv 1610.08401, by stochastic ascent as in Shafahi et al., AAAI
    2020, arXiv 1811.11304, algorithm 2: steepest steps on the summed loss of a random batch, each sample's loss cut off
    at ``cap`` so that none that is misled already keeps the rest waiting; steps fall by half a cosine. Of the
    perturbations after every pass over the images the one that misleads most is kept.

    Called as an attack it fits the batch it is given. ``fit`` finds the perturbation on some images, to be used on
    others. step_size, in pixel units, is the first; 0 means epsilon / 4. cap: in units of the loss.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    passes: int = 20
    batch_size: int = 128
    step_size: float = 0.0
    loss: str = "cross_entropy"
    cap: float = 9.0

    def __post_init__(self) -> None:
        check_loss(self.loss)
        check_start(self.loss, random_start=False)
        for name, count in (("passes", self.passes), ("batch_size", self.batch_size)):
            if count < 1:
                raise InputError(f"{name} of a universal perturbation must be at least 1, not {count}")
        if not self.step_size >= 0:
            raise InputError(f"attack step_size must be at least 0 (0 = automatic), not {self.step_size}")
        if not self.cap > 0:
            raise InputError(f"cap must be above 0, not {self.cap}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N], all perturbed alike."""
        return self.fit(model, x, y, generator=generator)(model, x, y, generator=generator)

    def fit(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Perturbation:
        """The perturbation found on images ``x`` [N, C, H, W] with labels ``y`` [N]: an attack on any images."""
        threat_model, loss = self.threat_model, LOSSES[self.loss]
        # No pixel bounds: each image meets its own when it is perturbed.
        ball = ThreatModel(threat_model.norm, threat_model.epsilon, -torch.inf, torch.inf)
        nothing = torch.zeros_like(x[:1])
        delta = ball.random_start(nothing, generator)
        best, most = delta, -1
        batches = -(-len(x) // self.batch_size)
        total, done = self.passes * batches, 0
        with crafting(model):
            for _ in range(self.passes):
                order = torch.randperm(len(x), generator=generator, device=x.device)
                for rows in order.split(self.batch_size):

                    def objective(shift: Tensor, rows: Tensor = rows) -> Tensor:
                        images = (x[rows] + shift).clamp(threat_model.lower, threat_model.upper)
                        return loss(model(images), y[rows], None).clamp_max(self.cap)

                    gradient, _ = objective_gradient(objective, delta)
                    step = (self.step_size or threat_model.epsilon / 4) * _falling(done, total)
                    delta = ball.project(delta + step * threat_model.geometry.steepest(gradient), nothing)
                    done += 1
                misled = self._misled(model, x, y, delta)
                best, most = (delta, misled) if misled > most else (best, most)
        return Perturbation(threat_model, best)

    def _misled(self, model: nn.Module, x: Tensor, y: Tensor, delta: Tensor) -> int:
        attack = Perturbation(self.threat_model, delta)
        count = 0
        with torch.no_grad():
            for images, labels in zip(x.split(self.batch_size), y.split(self.batch_size), strict=True):
                perturbed = attack(model, images, labels, generator=torch.Generator(x.device))
                count += int((model(perturbed).argmax(1) != labels).sum())
        return count

    def __str__(self) -> str:
        step = self.step_size or self.threat_model.epsilon / 4
        return (
            f"universal perturbation, {self.threat_model}, {self.passes} passes in batches of {self.batch_size}, "
            f"step {step:.6g}, {self.loss} up to {self.cap:.6g}"
        )


def _falling(done: int, total: int) -> float:
    """From 1 to 0 by half a cosine."""
    return (1 + math.cos(math.pi * done / total)) / 2


PLUGIN = Universal
