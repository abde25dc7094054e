"""Second-order adversarial training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.krylov import Krylov
from nas.errors import InputError
from nas.objective import Attack, Batch, Metrics, State


@dataclass(frozen=True)
class KrylovAt:
    """Krylov adversarial training (reconstruction): second-order adversarial images, found without a Hessian.

    After Qian et al., arXiv 2207.01396 (and Int. J. Appl. Math. Comput. Sci. 34(3), 2024), of which the
    abstracts alone were read; it promises no published number. The attack climbs the quadratic model of the loss in a
    Krylov subspace (``nas.attacks.krylov``); a recipe that names no attack gets it, and one that names another is
    refused: with one dimension, which is PGD, this is PGD adversarial training. A step of the attack with m dimensions
    costs the gradient and m products of two gradients each, 1 + 2 m in place of 1: compare at equal cost.

    clean_weight: share of the cross-entropy that is taken at the clean images (inferred: none).
    """

    inner_attack: ClassVar[str] = "krylov"

    attack: Attack = field(default_factory=Krylov)
    clean_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.clean_weight <= 1:
            raise InputError(f"clean_weight of Krylov adversarial training is from 0 to 1, not {self.clean_weight}")

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the attacked and, where they have weight, of the clean images."""
        x_adv = self.attack(model, batch.x, batch.y, generator=state.attack_generator)
        logits = model(x_adv)
        loss = F.cross_entropy(logits, batch.y)
        metrics = {"accuracy": (logits.argmax(1) == batch.y).float().mean()}
        if self.clean_weight > 0:
            natural = F.cross_entropy(model(batch.x), batch.y)
            loss = (1 - self.clean_weight) * loss + self.clean_weight * natural
            metrics["natural_loss"] = natural.detach()
        return loss, metrics


PLUGIN = KrylovAt
