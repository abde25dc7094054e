"""Adversarial training with two objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.min_norm import min_norm_weight
from nas.objective import Attack, Batch, Metrics, State

Gradient = list[Tensor | None]


@dataclass(frozen=True)
class MultiObjective:
    """Multi-objective adversarial training: steps that lower natural and adversarial loss together (min-norm).

    The gradients g_n of the cross-entropy L_n on clean images and g_a of L_a on adversarial ones are weighed anew in
    every step, by multiple-gradient descent (Desideri, 2012; Sener and Koltun, NeurIPS 2018, arXiv 1810.04650,
    algorithm 2): u is the shortest convex combination of s_n g_n and s_a g_a, and the step is along w g_a + (1 - w)
    g_n, which is u up to a positive factor, so that a learning rate means the same as for one loss. As long as the
    floor does not bind, neither loss rises to first order; where u = 0, none can be lowered without raising the other.

    normalisation: s is 1 ("none"), 1 / |g| ("l2"), 1 / L ("loss") or 1 / (L |g|) ("loss+"), as in the authors' code.
    Without it the shorter gradient gets the larger weight, and that is the natural one once clean images are fitted.
    floor: least weight w of the adversarial loss; 1 is PGD adversarial training. Inferred: the default of both, and
    that the factors s scale the step itself and not only the search for its weights.
    """

    attack: Attack = field(default_factory=Pgd)
    normalisation: Literal["none", "l2", "loss", "loss+"] = "loss+"
    floor: float = 0.5

    def __post_init__(self) -> None:
        if self.normalisation not in ("none", "l2", "loss", "loss+"):
            raise InputError(f"normalisation is 'none', 'l2', 'loss' or 'loss+', not '{self.normalisation}'")
        if not 0 <= self.floor <= 1:
            raise InputError(f"floor is a weight of at least 0 and at most 1, not {self.floor}")

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The weighed loss; its gradient is that of ``gradients``, at one more pass back."""
        natural, adversarial, metrics = self._losses(model, batch, state)
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        first, second = (_by(loss, weights, retain_graph=True) for loss in (natural, adversarial))
        weight, told = self._weight(natural, adversarial, first, second)
        return weight * adversarial + (1 - weight) * natural, {**metrics, **told}

    def gradients(
        self, model: nn.Module, batch: Batch, state: State, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, Gradient, Metrics]:
        """The weighed loss (detached), its gradient by ``parameters``, and both losses among the metrics."""
        natural, adversarial, metrics = self._losses(model, batch, state)
        first, second = (_by(loss, parameters) for loss in (natural, adversarial))
        weight, told = self._weight(natural, adversarial, first, second)
        loss = weight * adversarial.detach() + (1 - weight) * natural.detach()
        return loss, [_weighed(1 - weight, a, weight, b) for a, b in zip(first, second, strict=True)], metrics | told

    def _losses(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Tensor, Metrics]:
        x_adv = self.attack(model, batch.x, batch.y, generator=state.attack_generator)
        natural = F.cross_entropy(model(batch.x), batch.y)
        logits = model(x_adv)
        adversarial = F.cross_entropy(logits, batch.y)
        metrics = {
            "accuracy": (logits.argmax(1) == batch.y).float().mean(),
            "natural_loss": natural.detach(),
            "adversarial_loss": adversarial.detach(),
        }
        return natural, adversarial, metrics

    def _weight(self, natural: Tensor, adversarial: Tensor, first: Gradient, second: Gradient) -> tuple[float, Metrics]:
        """The weight of the adversarial loss, and what there is to say about both gradients."""
        u_n, u_a = _flat(first, second), _flat(second, first)
        scale_n, scale_a = self._scale(natural, u_n), self._scale(adversarial, u_a)
        share = min_norm_weight(scale_a * u_a, scale_n * u_n)
        along_a, along_n = share * scale_a, (1 - share) * scale_n
        weight = max(along_a / (along_a + along_n), self.floor)
        told = {
            "adversarial_weight": natural.new_tensor(weight),
            "gradient_cosine": F.cosine_similarity(u_n, u_a, dim=0),
        }
        return weight, told

    def _scale(self, loss: Tensor, gradient: Tensor) -> float:
        """The factor of a gradient; 1 for a gradient or a loss of 0, which needs none."""
        factors = {"none": (), "l2": (gradient.norm(),), "loss": (loss,), "loss+": (loss, gradient.norm())}
        scale = 1.0
        for factor in factors[self.normalisation]:
            scale /= float(factor.detach()) or 1.0
        return scale


def _by(loss: Tensor, parameters: Sequence[nn.Parameter], *, retain_graph: bool = False) -> Gradient:
    return [*torch.autograd.grad(loss, [*parameters], retain_graph=retain_graph, allow_unused=True)]


def _flat(gradient: Gradient, other: Gradient) -> Tensor:
    """All entries [P], zeros where only ``other`` depends on a parameter."""
    parts = []
    for mine, theirs in zip(gradient, other, strict=True):
        if mine is not None:
            parts.append(mine.flatten())
        elif theirs is not None:
            parts.append(torch.zeros_like(theirs).flatten())
    return torch.cat(parts)


def _weighed(a: float, first: Tensor | None, b: float, second: Tensor | None) -> Tensor | None:
    if first is None:
        return None if second is None else b * second
    return a * first if second is None else a * first + b * second


PLUGIN = MultiObjective
