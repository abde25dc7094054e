"""The fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nas.attacks.gradient import check_loss, check_start, input_gradient
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class Fgsm:
    """Fast gradient sign method: one steepest-ascent step of size epsilon, no random start.

    Goodfellow et al., ICLR 2015, arXiv 1412.6572; for norms other than l_inf the step is that norm's.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    loss: str = "cross_entropy"
    statistics: Literal["running", "batch"] = "running"

    def __post_init__(self) -> None:
        check_loss(self.loss)
        check_start(self.loss, random_start=False)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]; nothing is drawn at random."""
        del generator
        threat_model = self.threat_model
        with crafting(model, batch_statistics=self.statistics == "batch"):
            gradient, _, _ = input_gradient(model, x, y, self.loss, None)
        return threat_model.project(x + threat_model.epsilon * threat_model.geometry.steepest(gradient), x)

    def __str__(self) -> str:
        return f"FGSM, {self.threat_model}, {self.loss}"


PLUGIN = Fgsm
