"""Adversarial training."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.objective import Attack, Batch, Metrics, State


@dataclass(frozen=True)
class PgdAt:
    """PGD adversarial training: cross-entropy on adversarial images only.

    Madry et al., ICLR 2018, arXiv 1706.06083, eq. 2.1. The attack runs on the model as it stands; its gradient
    with respect to the weights is not followed (Danskin).
    """

    attack: Attack = field(default_factory=Pgd)

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy on the attacked batch."""
        x_adv = self.attack(model, batch.x, batch.y, generator=state.attack_generator)
        logits = model(x_adv)
        loss = F.cross_entropy(logits, batch.y)
        return loss, {"accuracy": (logits.argmax(1) == batch.y).float().mean()}


PLUGIN = PgdAt
