"""MART."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.objective import Attack, Batch, Metrics, State


@dataclass(frozen=True)
class Mart:
    """MART: boosted cross-entropy on adversarial images, and a divergence that counts most where images are missed.

    Wang et al., ICLR 2020 ("Improving Adversarial Robustness Requires Revisiting Misclassified Examples"), eq. 11: with
    p, q the probabilities of the clean and the adversarial image, mean of
    -log q_y - log(1 - max_{k != y} q_k) + beta KL(p || q) (1 - p_y). The weight 1 - p_y is followed by the gradient, as
    in the authors' program. Costs one pass more than adversarial training.
    """

    attack: Attack = field(default_factory=Pgd)
    beta: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < float("inf"):
            raise InputError(f"MART beta must be a number of at least 0, not {self.beta}")

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean boosted cross-entropy plus ``beta`` times the weighted divergence."""
        x_adv = self.attack(model, batch.x, batch.y, generator=state.attack_generator)
        clean, adversarial = model(batch.x).log_softmax(1), model(x_adv).log_softmax(1)
        boosted = boosted_cross_entropy(adversarial, batch.y)
        right = clean.gather(1, batch.y.unsqueeze(1)).squeeze(1).exp()
        divergence = ((clean.exp() * (clean - adversarial)).sum(1) * (1 - right)).mean()
        metrics = {
            "accuracy": (adversarial.argmax(1) == batch.y).float().mean(),
            "boosted_loss": boosted.detach(),
            "divergence": divergence.detach(),
        }
        return boosted + self.beta * divergence, metrics


def boosted_cross_entropy(log_probabilities: Tensor, y: Tensor) -> Tensor:
    """Mean of -log p_y - log(1 - largest other p); log_probabilities: [N, K],  y: [N]."""
    nll = F.nll_loss(log_probabilities, y)
    runner_up = log_probabilities.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    # A little above 1, so that a certain wrong answer has a finite loss.
    return nll - torch.log(1.0001 - runner_up.exp()).mean()


PLUGIN = Mart
