"""Deadwooding: multipliers draw the smallest weights of the network to zero; then robust distillation."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.fgsm import Fgsm
from nas.attacks.pgd import Pgd
from nas.compression.layers import Layer
from nas.compression.masks import Score, Selection, competing, masked, plan_of, weights_of
from nas.compression.penalised import Penalised, carriers, without
from nas.compression.plan import Plan
from nas.errors import InputError
from nas.objective import Attack, Batch, Metrics, Objective, Setting, State
from nas.threat_model import ThreatModel
from nas.training.standard import Standard
from nas.training.teacher import Teacher, divergence

MULTIPLIER, KEPT = "deadwooding_multiplier", "deadwooding_kept"
"""Buffers of each layer of a steered network: the multipliers (one for each weight, or one), and which weights are
among the largest of the network."""
EPOCH = "deadwooding_epoch"
"""Buffer of the network: the epoch that multipliers are of."""


@dataclass(frozen=True)
class Deadwooding:
    """Deadwooding: Lagrange multipliers draw all but the globally largest weights to zero; then robust distillation.

    After Kaur, Fioretto & Salekin, 2022, arXiv 2202.05226. A *reconstruction*: of the paper only the abstract could be
    read; that it prunes single weights globally, by a Lagrangian dual, and then fine-tunes by distillation and FGSM
    training, is from there and from a survey (arXiv 2409.01249). The rule of the multipliers is that of Fioretto et
    al., arXiv 2001.09394; all else is inferred. No published number is promised.

    With T the indices of the share ``keep`` of largest |theta| of the network, found anew at each epoch,

        min over theta of  loss + sum_{i not in T} lambda_i |theta_i|,
        lambda_i := lambda_i + rho |theta_i| after each epoch, for i not in T,

    for ``epochs`` epochs by ordinary SGD along a sub-gradient (the training loop owns the step, so that there is no
    proximal one and weights become small, not zero, before they are cut). The loss is what the network was trained by.
    What is outside T at the end is masked, and the rest fine-tuned to minimise

        alpha CE(x~, y) + (1 - alpha) t^2 KL(p_parent(x) || p(x~)),

    at ``temperature`` t, x~ by one FGSM step of 1.25 epsilon from a random start in the attack's threat model.

    keep: share of the competing weights that stays, above 0 and at most 1.  epochs: of steering; with 0 the mask is
    that of magnitude.  rho: step of the multipliers: a weight that nothing holds shrinks in proportion to itself, over
    all by learning rate x steps x rho x epochs / 2.  multipliers: one for each "weight" (as much memory as the
    weights), "layer", or "global", the last two by the mean of |theta| outside T.  reset: a weight that enters T loses
    its multiplier.  natural: steer by cross-entropy on clean images instead.  score, floor: of the ranking, see
    ``masks.Selection``.  distil: False fine-tunes by what the recipe says.  attack: whose threat model fine-tuning
    takes; with fgsm = False, itself.
    """

    retrains: ClassVar[bool] = True

    keep: float = 0.1
    epochs: int = 20
    rho: float = 1.0
    multipliers: Literal["weight", "layer", "global"] = "weight"
    reset: bool = False
    natural: bool = False
    score: Score = "magnitude"
    floor: float = 0.005
    distil: bool = True
    alpha: float = 0.5
    temperature: float = 4.0
    fgsm: bool = True
    attack: Attack = field(default_factory=Pgd)

    def __post_init__(self) -> None:
        self._selection()
        if self.epochs < 0:
            raise InputError(f"epochs of steering must be at least 0 (0 = none), not {self.epochs}")
        if not 0 <= self.rho < math.inf:
            raise InputError(f"rho must be a number of at least 0, not {self.rho}")
        if self.multipliers not in ("weight", "layer", "global"):
            raise InputError(f"multipliers must be 'weight', 'layer' or 'global', not '{self.multipliers}'")
        if self.reset and self.multipliers != "weight":
            raise InputError(f"reset is of multipliers of single weights, not of '{self.multipliers}' ones")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha is a weight from 0 to 1, not {self.alpha}")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature must be above 0, not {self.temperature}")

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        """Which weights of ``model``, steered or not, stay: the largest."""
        return plan_of("deadwooding", model, self._selection()(weights_of(model)))

    @staticmethod
    def apply(plan: Plan, model: nn.Module, *, fit: bool = True) -> nn.Module:
        """A copy of ``model`` with the plan's masks as parametrisations of its weights."""
        return masked(plan, model)

    def steered(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` that carries T and multipliers of 0."""
        copied = copy.deepcopy(model)
        weights = weights_of(copied)
        kept = self._selection()(weights)
        for name, layer in competing(copied).items():
            weight = weights[name]
            like = torch.zeros_like(weight) if self.multipliers == "weight" else weight.new_zeros(())
            layer.register_buffer(MULTIPLIER, like)
            layer.register_buffer(KEPT, kept[name])
        copied.register_buffer(EPOCH, torch.zeros((), dtype=torch.int64, device=next(iter(weights.values())).device))
        return copied

    def steering(self, objective: Objective) -> Penalised:
        """``objective``, or cross-entropy on clean images, with the pull of the multipliers."""
        return Penalised(Standard() if self.natural else objective, self)

    def released(self, steered: nn.Module) -> nn.Module:
        """The network without multipliers."""
        return without(steered, (MULTIPLIER, KEPT), EPOCH)

    def recovery(self, objective: Objective, parent: nn.Module) -> Objective:
        """Distillation from ``parent`` in place of ``objective``, or that where ``distil`` is off."""
        if not self.distil:
            return objective
        attack = self.attack
        if self.fgsm:
            threat_model = getattr(attack, "threat_model", None)
            if not isinstance(threat_model, ThreatModel):
                raise InputError(
                    f"deadwooding needs an attack with a threat model, which {type(attack).__name__} has not: set "
                    "fgsm = false to fine-tune by that attack itself"
                )
            attack = Fgsm(threat_model, random_start=True)
        return RobustDistillation(attack, Teacher(parent), self.alpha, self.temperature)

    def begin_epoch(self, model: nn.Module, epoch: int) -> None:
        """Multipliers after the epochs before ``epoch``, and the largest weights now, unless that was done."""
        known, layers = model.get_buffer(EPOCH), carriers(model, MULTIPLIER)
        if int(known) == epoch:
            return
        with torch.no_grad():
            self._ascend(layers)
            weights = {name: layer.weight.detach() for name, layer in layers.items()}
            for name, kept in self._selection()(weights).items():
                layers[name].get_buffer(KEPT).copy_(kept)
                if self.reset:
                    layers[name].get_buffer(MULTIPLIER).masked_fill_(kept, 0)
        known.fill_(epoch)

    def penalty(self, model: nn.Module) -> tuple[Tensor, Metrics]:
        """sum lambda |theta| outside T;  residual: the share of sum |theta| that is outside T and about to be cut."""
        layers = carriers(model, MULTIPLIER).values()
        sizes = [layer.weight.abs() for layer in layers]
        outside = [size * ~layer.get_buffer(KEPT) for size, layer in zip(sizes, layers, strict=True)]
        pulls = [(layer.get_buffer(MULTIPLIER) * v).sum() for v, layer in zip(outside, layers, strict=True)]
        cut, whole = (torch.stack([t.detach().sum() for t in some]).sum() for some in (outside, sizes))
        return torch.stack(pulls).sum(), {"residual": cut / whole.clamp_min(1e-30)}

    def _ascend(self, layers: dict[str, Layer]) -> None:
        """The step of the multipliers by what is left outside T."""
        inside = {name: layer.get_buffer(KEPT) for name, layer in layers.items()}
        outside = {name: layer.weight.abs() * ~inside[name] for name, layer in layers.items()}
        if self.multipliers != "weight":
            sums = {name: (v.sum(), (~inside[name]).sum()) for name, v in outside.items()}
            if self.multipliers == "global":
                total, count = (torch.stack([pair[i] for pair in sums.values()]).sum() for i in (0, 1))
                sums = dict.fromkeys(sums, (total, count))
            outside = {name: total / count.clamp_min(1) for name, (total, count) in sums.items()}
        for name, violation in outside.items():
            layers[name].get_buffer(MULTIPLIER).add_(self.rho * violation)

    def _selection(self) -> Selection:
        return Selection(self.keep, "global", self.score, self.floor)


@dataclass(frozen=True)
class RobustDistillation:
    """alpha CE(x~, y) + (1 - alpha) t^2 KL(p_teacher(x) || p(x~)), mean over the batch; x~ by ``attack``."""

    attack: Attack
    teacher: Teacher
    alpha: float
    temperature: float

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The loss; both terms without their weights among the metrics."""
        x_adv = self.attack(model, batch.x, batch.y, generator=state.attack_generator)
        logits = model(x_adv)
        labels = F.cross_entropy(logits, batch.y)
        distilled = divergence(logits, self.teacher(batch.x), self.temperature)
        metrics = {
            "accuracy": (logits.argmax(1) == batch.y).float().mean(),
            "cross_entropy": labels.detach(),
            "divergence": distilled.detach(),
        }
        return self.alpha * labels + (1 - self.alpha) * distilled, metrics


PLUGIN = Deadwooding
