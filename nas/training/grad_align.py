"""GradAlign."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.fgsm import Fgsm
from nas.errors import InputError
from nas.model_state import frozen_statistics, twice_differentiable
from nas.objective import Attack, Batch, Metrics, State
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class GradAlign:
    """GradAlign: adversarial training in one step, with input gradients kept alike inside the ball.

    Andriushchenko & Flammarion, NeurIPS 2020, arXiv 2007.02617, eq. 5: cross-entropy on the attacked images plus
    ``weight`` times 1 - cos(grad_x L(x), grad_x L(x + eta)), eta uniform in the ball. The first gradient is taken as
    given, the second is differentiated (double backward). One-step attacks stay honest where the loss is nearly linear.
    weight: 0.2 is the authors' for 8/255 on CIFAR-10. Costs about three times a one-step training.
    """

    attack: Attack = field(default_factory=Fgsm)
    threat_model: ThreatModel = field(default_factory=ThreatModel)
    weight: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise InputError(f"the weight of GradAlign must be a number of at least 0, not {self.weight}")

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the attacked batch plus the mean misalignment."""
        x_adv = self.attack(model, batch.x, batch.y, generator=state.attack_generator)
        logits = model(x_adv)
        loss = F.cross_entropy(logits, batch.y)
        metrics = {"accuracy": (logits.argmax(1) == batch.y).float().mean()}
        if not self.weight:
            return loss, metrics
        nearby = self.threat_model.random_start(batch.x, state.method_generator)
        # Statistics are recorded once a step: by the pass above.
        with frozen_statistics(model), twice_differentiable():
            here = _input_gradient(model, batch.x, batch.y, create_graph=False)
            there = _input_gradient(model, nearby, batch.y, create_graph=True)
        misalignment = 1 - cosine(here, there).mean()
        metrics["alignment"] = 1 - misalignment.detach()
        return loss + self.weight * misalignment, metrics


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between [N, ...] and [N, ...]: [N]; 0, with gradient 0, where one of them vanishes."""
    a, b = a.flatten(1), b.flatten(1)
    product, sizes = (a * b).sum(1), a.norm(dim=1) * b.norm(dim=1)
    there = sizes > 0
    return torch.where(there, product / torch.where(there, sizes, 1.0), 0.0)


def _input_gradient(model: nn.Module, x: Tensor, y: Tensor, *, create_graph: bool) -> Tensor:
    point = x.detach().requires_grad_(True)
    loss = F.cross_entropy(model(point), y, reduction="sum")
    # Kept: an auxiliary head may have a loss of its own on this pass.
    (gradient,) = torch.autograd.grad(loss, point, create_graph=create_graph, retain_graph=True)
    return gradient


PLUGIN = GradAlign
