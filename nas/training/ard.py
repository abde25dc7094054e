"""Adversarially robust distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.objective import Attack, Batch, Metrics, Setting, State
from nas.training.teacher import Teacher, divergence, load_teacher


@dataclass(frozen=True)
class Ard:
    """ARD: on attacked images the network answers as a robust teacher does on the clean ones.

    Goldblum, Fowl, Feizi & Goldstein, AAAI 2020, arXiv 1905.09747. Minimises

        alpha t^2 KL(p_teacher(x) || p(x~)) + (1 - alpha) CE(p(x), y),

    probabilities at ``temperature`` t in the first term, x~ by the recipe's attack (the paper: PGD on cross-entropy
    with the true label). Defaults are those of the released code, which divides KL by the number of classes, too; here
    it is the mean over the images.

    teacher: folder of a finished network (model.json) for the same images and classes. Its robustness is what is
    passed on: choose one by its worst case, not by natural accuracy.
    """

    attack: Attack = field(default_factory=Pgd)
    teacher: str = field(kw_only=True)
    alpha: float = 1.0
    temperature: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha of ARD is a weight from 0 to 1, not {self.alpha}")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature of ARD must be above 0, not {self.temperature}")

    def prepare(self, setting: Setting) -> DistilledByArd:
        """The method with its teacher. Raises ``InputError`` where that does not fit the data."""
        return DistilledByArd(self, load_teacher(self.teacher, setting))


@dataclass(frozen=True)
class DistilledByArd:
    """ARD with its teacher at hand."""

    method: Ard
    teacher: Teacher

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The mean over the batch. A term of weight 0 costs no pass but that on the attacked images."""
        method = self.method
        x_adv = method.attack(model, batch.x, batch.y, generator=state.attack_generator)
        logits = model(x_adv)
        distilled = divergence(logits, self.teacher(batch.x), method.temperature)
        loss = method.alpha * distilled
        metrics = {"accuracy": (logits.argmax(1) == batch.y).float().mean(), "divergence": distilled.detach()}
        if method.alpha < 1:
            natural = F.cross_entropy(model(batch.x), batch.y)
            loss = loss + (1 - method.alpha) * natural
            metrics["natural_loss"] = natural.detach()
        return loss, metrics


PLUGIN = Ard
