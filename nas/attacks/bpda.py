"""Backward pass differentiable approximation against activations that mask gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nas.activations.lossy import backward
from nas.attacks.gradient import check_loss, check_start
from nas.attacks.pgd import Pgd
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class Bpda:
    """BPDA: projected gradient descent whose gradients go through lossy activations as through smooth ones.

    Athalye, Carlini & Wagner, ICML 2018, arXiv 1802.00420, section 4.1. through: "identity", "sigmoid",
    "straight-through" or "true" derivatives, or "relu": the images are made on the network with rectifiers and have to
    transfer (see ``nas.activations.lossy.backward``). Networks without lossy activations are attacked by plain PGD.
    step_size is in pixel units; 0 means 2.5 epsilon / steps, but no more than epsilon. keep: the last iterate or, per
    sample, the one of highest loss.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 50
    step_size: float = 0.0
    loss: str = "margin"
    random_start: bool = True
    keep: Literal["last", "best"] = "last"
    through: Literal["identity", "sigmoid", "straight-through", "true", "relu"] = "identity"

    def __post_init__(self) -> None:
        check_loss(self.loss)
        check_start(self.loss, self.random_start)
        _ = self._pgd

    @property
    def _pgd(self) -> Pgd:
        return Pgd(self.threat_model, self.steps, self.step_size, self.loss, self.random_start, self.keep)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]."""
        with backward(model, self.through):
            return self._pgd(model, x, y, generator=generator)

    def __str__(self) -> str:
        return f"BPDA ({self.through}): {self._pgd}"


PLUGIN = Bpda
