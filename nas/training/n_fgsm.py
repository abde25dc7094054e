"""Noise-FGSM adversarial training."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.gradient import input_gradient
from nas.errors import InputError
from nas.model_state import crafting
from nas.objective import Batch, Metrics, State
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class NoiseFgsm:
    """N-FGSM: one-step adversarial training around noisy images, without clipping to the ball.

    De Jorge et al., NeurIPS 2022, arXiv 2202.01181, algorithm 1: noise uniform in ``noise`` times the ball, one step of
    ``step_size`` (pixel units; 0 means epsilon) along the gradient there. What it trains on may lie outside of the ball
    by design (up to noise + 1 times epsilon), within the pixel bounds; it is evaluated in the ball like any other
    method. Costs two passes a step, without the collapse of plain FGSM training.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    noise: float = 2.0
    step_size: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < float("inf") or not 0 <= self.step_size < float("inf"):
            raise InputError(f"noise and step_size must be at least 0, not {self.noise} and {self.step_size}")

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy on the images it makes."""
        logits = model(self.attack(model, batch.x, batch.y, generator=state.attack_generator))
        loss = F.cross_entropy(logits, batch.y)
        return loss, {"accuracy": (logits.argmax(1) == batch.y).float().mean()}

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """The images [N, C, H, W] for images ``x`` and labels ``y`` [N]; no ``Attack``, as they may leave the ball."""
        ball = self.threat_model
        noise = ball.geometry.draw(x, self.noise * ball.epsilon, generator)
        with crafting(model):
            noisy = (x + noise).clamp(ball.lower, ball.upper)
            gradient, _, _ = input_gradient(model, noisy, y, "cross_entropy", None)
        step = (self.step_size or ball.epsilon) * ball.geometry.steepest(gradient)
        return (x + noise + step).clamp(ball.lower, ball.upper)


PLUGIN = NoiseFgsm
