"""Adversarial training for free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.errors import InputError
from nas.objective import Batch, Metrics, Setting, State
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class Free:
    """Free adversarial training: a backward pass moves weights and perturbation, each batch ``replays`` times.

    Shafahi et al., NeurIPS 2019, arXiv 1904.12843, algorithm 1: a perturbation, kept from batch to batch, climbs by a
    whole epsilon along the steepest direction of the gradient that the weight step computes anyway, and is brought back
    into the ball. A step costs a pass forward and one backward, as much as training on clean images: give it
    1/replays of the epochs. Batch normalisation sees the perturbed images in train mode.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    replays: int = 4

    def __post_init__(self) -> None:
        if self.replays < 1:
            raise InputError(f"replays must be at least 1, not {self.replays}")

    def prepare(self, setting: Setting) -> FreeTraining:
        """The training with its first perturbation, which is none."""
        shape = (setting.batch_size, *setting.data.input_shape)
        return FreeTraining(self.threat_model, self.replays, torch.zeros(shape, device=setting.data.x_train.device))

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """As if this batch were the first."""
        return self._first(batch)(model, batch, state)

    def gradients(
        self, model: nn.Module, batch: Batch, state: State, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor | None], Metrics]:
        """As if this batch were the first."""
        return self._first(batch).gradients(model, batch, state, parameters)

    def _first(self, batch: Batch) -> FreeTraining:
        return FreeTraining(self.threat_model, self.replays, torch.zeros_like(batch.x))


@dataclass
class FreeTraining:
    """What ``Free`` prepares.  delta: the perturbation [batch_size, C, H, W] that the next batch begins with."""

    threat_model: ThreatModel
    replays: int
    delta: Tensor

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy of the perturbed batch."""
        del state
        logits = model(self._perturbed(batch.x))
        return F.cross_entropy(logits, batch.y), {"accuracy": _accuracy(logits, batch.y)}

    def gradients(
        self, model: nn.Module, batch: Batch, state: State, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor | None], Metrics]:
        """Gradients of the weights; those of the images move the perturbation."""
        del state
        point = self._perturbed(batch.x).requires_grad_(True)
        logits = model(point)
        loss = F.cross_entropy(logits, batch.y)
        *gradients, towards = torch.autograd.grad(loss, [*parameters, point], allow_unused=True)
        moved = self.delta[: len(batch.x)].to(batch.x)
        if towards is not None:
            ball = self.threat_model
            moved = ball.geometry.shrink(moved + ball.epsilon * ball.geometry.steepest(towards), ball.epsilon)
        self.delta = torch.cat([moved.detach(), self.delta[len(batch.x) :].to(moved)])
        return loss.detach(), [*gradients], {"accuracy": _accuracy(logits, batch.y)}

    def _perturbed(self, x: Tensor) -> Tensor:
        if len(x) > len(self.delta):
            raise InputError(f"a perturbation for {len(self.delta)} images, but a batch of {len(x)}")
        ball = self.threat_model
        return (x + self.delta[: len(x)].to(x)).clamp(ball.lower, ball.upper).detach()

    def tree(self) -> Mapping[str, Any]:
        """The perturbation, for the checkpoint."""
        return {"delta": self.delta}

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Put the perturbation of ``tree`` back."""
        self.delta = tree["delta"]


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == y).float().mean()


PLUGIN = Free
