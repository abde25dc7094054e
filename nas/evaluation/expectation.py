"""Models that answer at random: attacked and judged by the mean of many answers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from nas.attacks.apgd import Apgd
from nas.attacks.apgd_t import ApgdT
from nas.attacks.autoattack import AutoAttack
from nas.attacks.fab import Fab
from nas.attacks.pgd import Pgd
from nas.defences.noise import NoiseEnsemble
from nas.objective import Attack


class Expectation(nn.Module):
    """The mean of the logits of ``draws`` passes: gradients of it are those of expectation over transformation.

    Athalye et al., arXiv 1802.00420, section 4.1.2. Any attack on it is an attack by expectation, and its answer hardly
    depends on luck. Passes run one after another: memory of a gradient grows with ``draws``.
    """

    def __init__(self, model: nn.Module, draws: int = 20) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be at least 1, not {draws}")
        self.model, self.draws = model, draws

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.model(x) for _ in range(self.draws)]).mean(0)


def answers_at_random(model: nn.Module) -> bool:
    """Whether ``model`` is, or contains, a mean over randomness that is drawn anew for every prediction."""
    return any(isinstance(module, Expectation | NoiseEnsemble) for module in model.modules())


def suited(attack: Attack, model: nn.Module) -> Attack:
    """``attack`` as it has to run on ``model``: what answers at random breaks single samples by luck.

    There no attack stops at the first wrong answer, which the next one may take back, and AutoAttack is its "rand"
    version. Other attacks, and other models, are left as they are.
    """
    if answers_at_random(model):
        if isinstance(attack, AutoAttack) and attack.version != "rand":
            return replace(attack, version="rand")
        if isinstance(attack, Pgd | Apgd | ApgdT | Fab) and attack.stop_when_broken:
            return replace(attack, stop_when_broken=False)
    return attack
