"""TRADES."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.losses import kl
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.objective import Attack, Batch, Metrics, State
from nas.training.standard import check_label_smoothing


@dataclass(frozen=True)
class Trades:
    """TRADES: cross-entropy on clean images plus beta times KL(p(clean) || p(adversarial)).

    Zhang et al., ICML 2019, arXiv 1901.08573, eq. 5 (beta = 1/lambda). The images are found by maximising the same
    divergence: a recipe that names no attack loss gets "kl". label_smoothing: share of each label that is spread over
    all classes (0.1 with extra images in Wang et al., ICML 2023, arXiv 2302.04638).
    """

    inner_loss: ClassVar[str] = "kl"

    attack: Attack = field(default_factory=lambda: Pgd(loss="kl"))
    beta: float = 6.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)
        if not self.beta >= 0:
            raise InputError(f"TRADES beta must be at least 0, not {self.beta}")

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean natural loss plus ``beta`` times mean divergence."""
        x_adv = self.attack(model, batch.x, batch.y, generator=state.attack_generator)
        clean_logits = model(batch.x)
        logits = model(x_adv)
        natural = F.cross_entropy(clean_logits, batch.y, label_smoothing=self.label_smoothing)
        divergence = kl(logits, batch.y, clean_logits).mean()
        metrics = {
            "accuracy": (logits.argmax(1) == batch.y).float().mean(),
            "natural_loss": natural.detach(),
            "divergence": divergence.detach(),
        }
        return natural + self.beta * divergence, metrics


PLUGIN = Trades
