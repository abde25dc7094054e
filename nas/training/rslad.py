"""Robust soft label adversarial distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from nas.attacks.gradient import compared_with
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.objective import Attack, Batch, Metrics, Setting, State
from nas.training.teacher import Teacher, divergence, load_teacher


@dataclass(frozen=True)
class Rslad:
    """RSLAD: a robust teacher's probabilities take the place of the labels, in the attack and in both losses.

    Zi, Zhao, Ma & Jiang, ICCV 2021, arXiv 2108.07969. Minimises

        alpha KL(p_teacher(x) || p(x~)) + (1 - alpha) KL(p_teacher(x) || p(x)),

    x~ the images that maximise the first divergence: a recipe that names no attack loss gets "kl", measured from the
    teacher. No label enters then. alpha is that of the released code, which divides KL by the number of classes, too;
    here it is the mean over the images.

    teacher: folder of a finished network (model.json) for the same images and classes. Its robustness is what is
    passed on: choose one by its worst case, not by natural accuracy.
    """

    inner_loss: ClassVar[str] = "kl"

    attack: Attack = field(default_factory=lambda: Pgd(loss="kl"))
    teacher: str = field(kw_only=True)
    alpha: float = 5 / 6

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha of RSLAD is a weight from 0 to 1, not {self.alpha}")

    def prepare(self, setting: Setting) -> DistilledByRslad:
        """The method with its teacher. Raises ``InputError`` where that does not fit the data."""
        return DistilledByRslad(self, load_teacher(self.teacher, setting))


@dataclass(frozen=True)
class DistilledByRslad:
    """RSLAD with its teacher at hand."""

    method: Rslad
    teacher: Teacher

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The mean over the batch. Without weight on the clean images there is no pass on them."""
        alpha = self.method.alpha
        with compared_with(model, self.teacher):
            x_adv = self.method.attack(model, batch.x, batch.y, generator=state.attack_generator)
        logits = model(x_adv)
        adversarial = divergence(logits, self.teacher(batch.x))
        loss = alpha * adversarial
        metrics = {"accuracy": (logits.argmax(1) == batch.y).float().mean(), "divergence": adversarial.detach()}
        if alpha < 1:
            natural = divergence(model(batch.x), self.teacher(batch.x))
            loss = loss + (1 - alpha) * natural
            metrics["natural_divergence"] = natural.detach()
        return loss, metrics


PLUGIN = Rslad
