"""The fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nas.attacks.gradient import Objective, ascend, check_loss, check_start, clean_logits_for, input_gradient
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class Fgsm:
    """Fast gradient sign method: one steepest-ascent step of size epsilon, no random start.

    Goodfellow et al., ICLR 2015, arXiv 1412.6572; for norms other than l_inf the step is that norm's. With
    random_start it is FGSM-RS (Wong, Rice & Kolter, ICLR 2020, arXiv 2001.03994, algorithm 3): a start drawn uniformly
    from the ball, one step of 1.25 epsilon, projected; as the only attack of a training it avoids most of
    what a network learns to hide from plain FGSM. It is made for training: from an unlucky start the step does not
    reach the far side of the ball. step_size is in pixel units; 0 means epsilon, or 1.25 epsilon with random_start.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    loss: str = "cross_entropy"
    statistics: Literal["running", "batch"] = "running"
    random_start: bool = False
    step_size: float = 0.0

    def __post_init__(self) -> None:
        check_loss(self.loss)
        check_start(self.loss, self.random_start)
        if not self.step_size >= 0:
            raise InputError(f"attack step_size must be at least 0 (0 = automatic), not {self.step_size}")

    @property
    def step(self) -> float:
        """The step size in force."""
        return self.step_size or (1.25 if self.random_start else 1.0) * self.threat_model.epsilon

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, start: Tensor | None = None
    ) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N].

        start: images in the ball around ``x`` to step from, instead of a random start or ``x`` itself.
        """
        threat_model = self.threat_model
        with crafting(model, batch_statistics=self.statistics == "batch"):
            clean_logits = clean_logits_for(self.loss, model, x)
            if start is None:
                start = threat_model.random_start(x, generator) if self.random_start else x
            gradient, _, _ = input_gradient(model, start, y, self.loss, clean_logits)
        return threat_model.project(start + self.step * threat_model.geometry.steepest(gradient), x)

    def maximise(self, model: nn.Module, objective: Objective, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """The same step up ``objective`` (images [N, C, H, W] -> [N], by ``model``) instead of the loss."""
        threat_model = self.threat_model
        start = threat_model.random_start(x, generator) if self.random_start else x
        with crafting(model, batch_statistics=self.statistics == "batch"):
            return ascend(objective, start, x, threat_model, steps=1, step=self.step)

    def __str__(self) -> str:
        start = f"-RS, step {self.step:.6g}" if self.random_start else ""
        start = f", step {self.step:.6g}" if self.step_size and not self.random_start else start
        return f"FGSM{start}, {self.threat_model}, {self.loss}"


PLUGIN = Fgsm
