"""The iterative fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class IterativeFgsm:
    """Iterative fast gradient sign method (I-FGSM, BIM): small steepest-ascent steps from the clean image.

    Kurakin, Goodfellow & Bengio, ICLR 2017 workshop, arXiv 1607.02533, section 2.2: projected gradient descent without
    a random start, the last iterate kept. For norms other than l_inf the step is that norm's. step_size is in pixel
    units; 0 means epsilon / steps.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 10
    step_size: float = 0.0
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        self._pgd(self.step_size)  # refuses what it cannot do

    @property
    def step(self) -> float:
        """The step size in force."""
        return self.step_size or self.threat_model.epsilon / self.steps

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]; draws nothing."""
        return self._pgd(self.step)(model, x, y, generator=generator)

    def _pgd(self, step: float) -> Pgd:
        return Pgd(self.threat_model, self.steps, step, self.loss, random_start=False)

    def __str__(self) -> str:
        return f"I-FGSM-{self.steps}, {self.threat_model}, step {self.step:.6g}, {self.loss}"


PLUGIN = IterativeFgsm
