"""Adversarial training."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.objective import Attack, Batch, Metrics, State
from nas.training.standard import check_label_smoothing


@dataclass(frozen=True)
class PgdAt:
    """PGD adversarial training: cross-entropy on adversarial images only.

    Madry et al., ICLR 2018, arXiv 1706.06083, eq. 2.1. The attack runs on the model as it stands; its gradient
    with respect to the weights is not followed (Danskin). label_smoothing: share of each label that is spread over all
    classes, in the loss of the weights only (Pang et al., ICLR 2021, arXiv 2010.00467, find up to 0.2 useful and more
    than 0.3 harmful).
    """

    attack: Attack = field(default_factory=Pgd)
    label_smoothing: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy on the attacked batch."""
        x_adv = self.attack(model, batch.x, batch.y, generator=state.attack_generator)
        logits = model(x_adv)
        loss = F.cross_entropy(logits, batch.y, label_smoothing=self.label_smoothing)
        return loss, {"accuracy": (logits.argmax(1) == batch.y).float().mean()}


PLUGIN = PgdAt
